"""Rollouts of known outcome, as arrays for `espo_gateway.stop`.

Stopping censors the data: the outcome of a stopped rollout is known only when it was audited.
Audited ones therefore stand for all stopped ones, weighted by one over the audit share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop import fit
from espo_gateway.stop.recorded import Recorded, pad, padded_probes
from espo_gateway.stop.regret import Array
from espo_gateway.stop.told import SourceName
from espo_gateway.traces.detection import pairs_within
from espo_rl.types import EndReason, Rollout


def with_outcome(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Those that ended by themselves or were audited: the uncensored sample, before weighting."""
    return [rollout for rollout in rollouts if rollout.correct is not None]


def weights(rollouts: Sequence[Rollout], audit_share: float) -> Array:
    """One weight a rollout: 1/audit_share for a stopped (so audited) one, shape [rollouts]."""
    return np.array([1.0 / audit_share if rollout.stopped else 1.0 for rollout in rollouts])


def recorded_of(rollouts: Sequence[Rollout]) -> Recorded:
    """Rollouts as arrays.

    How an audited one ended is not recorded; it is taken to have completed, which matters only for
    a decision at its last token.
    """
    critic = None
    if any(rollout.values is not None for rollout in rollouts):
        critic = [
            np.full(len(one.token_ids), np.nan) if one.values is None else one.values
            for one in rollouts
        ]
    return Recorded(
        pad([rollout.logprobs for rollout in rollouts]),
        pad([rollout.max_logprobs for rollout in rollouts]),
        np.array([len(rollout.prompt_ids) for rollout in rollouts], dtype=float),
        completed_at=np.array(
            [0 if r.end is EndReason.LENGTH else len(r.token_ids) for r in rollouts],
            dtype=np.int64,
        ),
        critic=None if critic is None else pad(critic),
        history=np.array([rollout.history for rollout in rollouts], dtype=float),
        probes=padded_probes(
            [rollout.probes for rollout in rollouts], [len(r.token_ids) for r in rollouts]
        ),
    )


@dataclass(frozen=True)
class KnownRollouts:
    """The rollouts of one batch whose outcome is known.

    correct, weights, prompts (which rollouts are of one): [rollouts]. known_share: of those that
        its gate stops; 1 without one.
    """

    recorded: Recorded
    correct: NDArray[np.bool_]
    weights: Array
    prompts: NDArray[np.int64]
    known_share: float

    @classmethod
    def of(
        cls, rollouts: Sequence[Rollout], audit_share: float, *, gated: bool = True
    ) -> KnownRollouts:
        """gated: under a rule."""
        known = with_outcome(rollouts)
        return cls(
            recorded_of(known),
            np.array([bool(rollout.correct) for rollout in known], dtype=np.bool_),
            weights(known, audit_share),
            np.unique([rollout.group for rollout in known], return_inverse=True)[1],
            audit_share if gated else 1.0,
        )

    def examples(self, sources: Sequence[SourceName] = ()) -> fit.Examples:
        """Tokens to fit an estimator on that reads these sources."""
        return fit.examples(self.recorded, self.correct, self.weights, sources)

    def auc_within(self, levels: NDArray[np.float32]) -> float | None:
        """Over pairs of a right and a wrong rollout of one prompt; None without any.

        levels: at which each would be stopped (`stop_levels`), [rollouts].
        """
        won, pairs = pairs_within(self.prompts, self.correct, self.weights, levels)
        return float(won.sum() / pairs.sum()) if pairs.sum() else None

    def explained_variance(self, expected: Array) -> float | None:
        """See `fit.explained_variance`. expected: V at each token, [rollouts, tokens]."""
        return fit.explained_variance(self.recorded, self.correct, self.weights, expected)
