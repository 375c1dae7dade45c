"""Fits the success estimator on rollouts whose outcome is known.

Stopping censors the data: the outcome of a stopped rollout is known only when it was audited.
Audited ones therefore stand for all stopped ones, weighted by one over the audit share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from espo_gateway.monitor import pad
from espo_gateway.replay import recorded_regrets
from espo_gateway.values import SuccessEstimator, probabilities, stream_features
from espo_rl.types import EndReason, Rollout

Array = NDArray[np.float64]

#: Neighbouring tokens say almost the same; this many a rollout are enough to fit on.
TOKENS_PER_ROLLOUT = 48


def with_outcome(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Those that ended by themselves or were audited: the uncensored sample, before weighting."""
    return [rollout for rollout in rollouts if rollout.correct is not None]


def weights(rollouts: Sequence[Rollout], audit_share: float) -> Array:
    """One weight a rollout: 1/audit_share for a stopped (so audited) one, shape [rollouts]."""
    return np.array([1.0 / audit_share if rollout.stopped else 1.0 for rollout in rollouts])


def regrets(rollouts: Sequence[Rollout]) -> Array:
    """g of every token, [rollouts, tokens], NaN where missing or past the end."""
    return recorded_regrets(
        pad([rollout.logprobs for rollout in rollouts]),
        pad([rollout.max_logprobs for rollout in rollouts]),
    )


def features(rollouts: Sequence[Rollout]) -> tuple[Array, NDArray[np.bool_]]:
    """Features [rollouts, tokens, features] and which of the [rollouts, tokens] are real tokens."""
    recorded = regrets(rollouts)
    surprises = -pad([rollout.logprobs for rollout in rollouts])
    prompts = np.array([len(rollout.prompt_ids) for rollout in rollouts], dtype=float)
    return stream_features(recorded, surprises, prompts), ~np.isnan(recorded)


@dataclass(frozen=True)
class Examples:
    """What a fit needs of one batch: every (or every k-th) token of rollouts of known outcome."""

    features: NDArray[np.float32]  # [tokens, features]
    outcomes: NDArray[np.bool_]  # [tokens]
    weights: NDArray[np.float32]  # [tokens]


class KnownRollouts:
    """The rollouts of one batch whose outcome is known, as arrays; features are made once.

    completed_at: length of those that ended by themselves, else 0. How an audited one ended is not
        recorded; it is taken to have completed, which matters only for a decision at its last
        token.
    """

    def __init__(self, rollouts: Sequence[Rollout], audit_share: float) -> None:
        known = with_outcome(rollouts)
        self.logprobs = pad([rollout.logprobs for rollout in known])
        self.max_logprobs = pad([rollout.max_logprobs for rollout in known])
        self.prompt_tokens = np.array([len(rollout.prompt_ids) for rollout in known], dtype=float)
        self.completed_at = np.array(
            [0 if r.end is EndReason.LENGTH else len(r.token_ids) for r in known], dtype=np.int64
        )
        self.outcomes = np.array([bool(rollout.correct) for rollout in known], dtype=np.bool_)
        self.weights = weights(known, audit_share)
        self.regrets = recorded_regrets(self.logprobs, self.max_logprobs)
        self.real = ~np.isnan(self.regrets)

    @cached_property
    def features(self) -> Array:
        """The stream's statistics after each token, [rollouts, tokens, features]."""
        return stream_features(self.regrets, -self.logprobs, self.prompt_tokens)

    def probabilities(self, estimator: SuccessEstimator) -> Array:
        """P(success) after each token, [rollouts, tokens]."""
        return probabilities(estimator.logits(self.features))

    def examples(self) -> Examples:
        """Tokens to fit on."""
        chosen = self.real.copy()
        stride = max(1, chosen.shape[1] // TOKENS_PER_ROLLOUT)
        chosen[:, np.arange(chosen.shape[1]) % stride != stride - 1] = False
        rows, _ = np.nonzero(chosen)
        return Examples(
            features=self.features[chosen].astype(np.float32),
            outcomes=self.outcomes[rows],
            weights=self.weights[rows].astype(np.float32),
        )

    def explained_variance(self, expected: Array) -> float | None:
        """1 - var(outcome - P)/var(outcome) over all tokens.

        Args:
            expected: P, [rollouts, tokens], of an estimator that was not fitted on these rollouts.

        Returns:
            None when all outcomes are the same.
        """
        rows, _ = np.nonzero(self.real)
        outcomes, weight = self.outcomes[rows].astype(float), self.weights[rows]
        total = _variance(outcomes, weight) if rows.size else 0.0
        if total == 0.0:
            return None
        return 1.0 - _variance(outcomes - expected[self.real], weight) / total


def fit(batches: Iterable[Examples]) -> SuccessEstimator | None:
    """Logistic regression of the outcome on the stream's statistics.

    Returns None when all outcomes are the same: there is nothing to tell apart.
    """
    batches = list(batches)
    outcomes = np.concatenate([batch.outcomes for batch in batches] or [np.empty(0, bool)])
    if outcomes.size == 0 or outcomes.all() or not outcomes.any():
        return None
    values = np.concatenate([batch.features for batch in batches]).astype(np.float64)
    weight = np.concatenate([batch.weights for batch in batches])
    scaler = StandardScaler().fit(values)
    # A scale of nearly 0 (a statistic that never moved) would blow up its weight.
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(values), outcomes, weight)
    unscaled = model.coef_[0] / scaler.scale_
    return SuccessEstimator(
        weights=tuple(map(float, unscaled)),
        bias=float(model.intercept_[0] - unscaled @ scaler.mean_),
    )


def _variance(values: Array, weight: Array) -> float:
    mean = np.average(values, weights=weight)
    return float(np.average((values - mean) ** 2, weights=weight))
