"""Advantages by generalised advantage estimation, one rollout at a time. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def gae(
    values: Array, reward: float, *, gamma: float, lam: float, bootstrap: float = 0.0
) -> tuple[Array, Array]:
    """Advantages and returns of one rollout whose only reward comes with its last token.

    A completed or early-stopped rollout is terminal: `bootstrap` is 0, and for a stopped one
    `reward` is r_fail, so that one negative TD error stands at the stop and is passed back to the
    steps before it (arXiv 2605.29860, row 7 of the method). A rollout cut by length may bootstrap
    from V of the state after its last token.

    Args:
        values: V(s_t) of the state in which token t was sampled, shape [tokens].
        reward: the reward of the last token.
        bootstrap: V of the state after the last token, 0 where the rollout is terminal.

    Returns:
        advantages and returns (advantages + values), both of shape [tokens].
    """
    advantages = np.zeros_like(values)
    following, carried = bootstrap, 0.0
    for t in range(len(values) - 1, -1, -1):
        delta = (reward if t == len(values) - 1 else 0.0) + gamma * following - values[t]
        carried = delta + gamma * lam * carried
        advantages[t] = carried
        following = values[t]
    return advantages, advantages + values


def whiten(rows: list[Array]) -> list[Array]:
    """Shift and scale all tokens of a batch to mean 0 and deviation 1, rollout by rollout."""
    flat = np.concatenate(rows)
    return [(row - flat.mean()) / (flat.std() + 1e-8) for row in rows]
