"""Advantages and returns of a batch of rollouts. Pure numpy.

By generalised advantage estimation, or against the other rollouts of the same prompt (GRPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espo_rl.config import Ppo

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Trajectory:
    """What the advantages of one rollout depend on.

    reward: comes with the last token; a stopped rollout's is r_fail.
    penalties: subtracted from the reward of each token (KL in the reward), [tokens].
    values: V before each token, [tokens]; None without a critic.
    """

    group: int
    reward: float
    penalties: Array
    values: Array | None = None

    @property
    def rewards(self) -> Array:
        """Of each token, [tokens]."""
        rewards = -self.penalties
        rewards[-1] += self.reward
        return rewards


def estimate(
    trajectories: Sequence[Trajectory], ppo: Ppo
) -> tuple[list[Array], list[Array] | None]:
    """Advantages and the critic's targets of each rollout, [tokens] each; no targets without V.

    A completed or early-stopped rollout is terminal: nothing follows, so for a stopped one a single
    negative TD error stands at the stop and is passed back to the steps before it (arXiv
    2605.29860, row 7 of the method). One cut by length is terminal too.
    """
    valued = [(one, one.values) for one in trajectories if one.values is not None]
    rows = [gae(values, one.rewards, gamma=ppo.gamma, lam=ppo.lam) for one, values in valued]
    targets = [row + values for row, (_, values) in zip(rows, valued, strict=True)] or None
    if ppo.advantage == "group":
        advantages = group_advantages(
            [float(one.rewards.sum()) for one in trajectories],
            [one.group for one in trajectories],
        )
        of_all = zip(trajectories, advantages, strict=True)
        return [np.full_like(one.penalties, advantage) for one, advantage in of_all], targets
    return whiten(rows, targets) if ppo.whiten else rows, targets


def gae(values: Array, rewards: Array, *, gamma: float, lam: float) -> Array:
    """A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} − V_t (arXiv 1506.02438), [tokens].

    The last token leads to a terminal state, whose V is 0.

    Args:
        values: V(s_t) of the state in which token t was sampled, [tokens].
        rewards: r_t, [tokens].
    """
    advantages = np.zeros_like(values)
    following = carried = 0.0
    for t in range(len(values) - 1, -1, -1):
        delta = rewards[t] + gamma * following - values[t]
        carried = delta + gamma * lam * carried
        advantages[t] = carried
        following = values[t]
    return advantages


def group_advantages(returns: Sequence[float], groups: Sequence[int]) -> NDArray[np.float64]:
    """GRPO's advantage of each rollout (arXiv 2402.03300, 4.1.2), [rollouts].

    Its return minus the mean of its group, in the group's (population) standard deviations. A group
    whose rollouts all got the same, but for rounding, says nothing: 0.
    """
    all_returns, all_groups = np.asarray(returns, dtype=float), np.asarray(groups)
    advantages = np.zeros_like(all_returns)
    for group in np.unique(all_groups):
        members = all_groups == group
        advantages[members] = _standardised(all_returns[members])
    return advantages


def whiten(rows: list[Array], returns: list[Array] | None = None) -> list[Array]:
    """Shift and scale all tokens of a batch to mean 0 and deviation 1, rollout by rollout.

    returns: what they are the difference of to V; where both are large, so is their rounding.
    """
    of = None if returns is None else np.concatenate(returns).astype(np.float64)
    flat = _standardised(np.concatenate(rows).astype(np.float64), of).astype(np.float32)
    return np.split(flat, np.cumsum([len(row) for row in rows])[:-1])


def noise_variance(values: NDArray[np.float64]) -> float:
    """Variance that is as good as none: of rounding at the values' size, and verl's 1e-8 at least.

    Added to a variance before it divides, it keeps what differs by rounding alone near 0.
    """
    return 1e-8 * max(1.0, float(np.square(values).mean()))


def _standardised(
    values: NDArray[np.float64], of: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """of: the numbers whose rounding is noise; without them the values themselves."""
    noise = noise_variance(values if of is None else of)
    return (values - values.mean()) / np.sqrt(values.var() + noise)
