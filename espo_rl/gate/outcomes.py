"""Rollouts of known outcome, as arrays for `espo_gateway.estimator`.

Stopping censors the data: the outcome of a stopped rollout is known only when it was audited.
Audited ones therefore stand for all stopped ones, weighted by one over the audit share.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.estimate import stream_features
from espo_gateway.stop.fit import KnownOutcomes
from espo_gateway.stop.recorded import pad, recorded_regrets
from espo_gateway.stop.regret import Array
from espo_rl.types import EndReason, Rollout


def with_outcome(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Those that ended by themselves or were audited: the uncensored sample, before weighting."""
    return [rollout for rollout in rollouts if rollout.correct is not None]


def weights(rollouts: Sequence[Rollout], audit_share: float) -> Array:
    """One weight a rollout: 1/audit_share for a stopped (so audited) one, shape [rollouts]."""
    return np.array([1.0 / audit_share if rollout.stopped else 1.0 for rollout in rollouts])


def regrets_of(rollouts: Sequence[Rollout]) -> Array:
    """g of every token, [rollouts, tokens], NaN where missing or past the end."""
    return recorded_regrets(
        pad([rollout.logprobs for rollout in rollouts]),
        pad([rollout.max_logprobs for rollout in rollouts]),
    )


def features(rollouts: Sequence[Rollout]) -> tuple[Array, NDArray[np.bool_]]:
    """Features [rollouts, tokens, features] and which of the [rollouts, tokens] are real tokens."""
    recorded = regrets_of(rollouts)
    surprises = -pad([rollout.logprobs for rollout in rollouts])
    prompts = np.array([len(rollout.prompt_ids) for rollout in rollouts], dtype=float)
    return stream_features(recorded, surprises, prompts), ~np.isnan(recorded)


class KnownRollouts(KnownOutcomes):
    """The rollouts of one batch whose outcome is known.

    How an audited one ended is not recorded; it is taken to have completed, which matters only for
    a decision at its last token.
    """

    def __init__(self, rollouts: Sequence[Rollout], audit_share: float) -> None:
        known = with_outcome(rollouts)
        super().__init__(
            pad([rollout.logprobs for rollout in known]),
            pad([rollout.max_logprobs for rollout in known]),
            prompt_tokens=np.array([len(rollout.prompt_ids) for rollout in known], dtype=float),
            completed_at=np.array(
                [0 if r.end is EndReason.LENGTH else len(r.token_ids) for r in known],
                dtype=np.int64,
            ),
            outcomes=np.array([bool(rollout.correct) for rollout in known], dtype=np.bool_),
            weights=weights(known, audit_share),
        )
