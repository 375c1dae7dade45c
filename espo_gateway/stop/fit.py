"""Fits the success estimator on rollouts whose outcome is known, given as arrays. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from espo_gateway.optional import needed
from espo_gateway.stop.estimate import SuccessEstimator, probabilities, stream_features
from espo_gateway.stop.recorded import recorded_regrets
from espo_gateway.stop.regret import Array

#: Neighbouring tokens say almost the same; this many a rollout are enough to fit on.
TOKENS_PER_ROLLOUT = 48


@dataclass(frozen=True)
class Examples:
    """What a fit needs of one batch: every (or every k-th) token of rollouts of known outcome."""

    features: NDArray[np.float32]  # [tokens, features]
    outcomes: NDArray[np.bool_]  # [tokens]
    weights: NDArray[np.float32]  # [tokens]


class KnownOutcomes:
    """Rollouts of known outcome; features are made once.

    Args:
        logprobs, max_logprobs: [rollouts, tokens], NaN where missing or past the end.
        prompt_tokens, outcomes, weights: [rollouts]. weights: how many rollouts each stands for.
        completed_at: length of those that ended by themselves, else 0, [rollouts].
    """

    def __init__(
        self,
        logprobs: Array,
        max_logprobs: Array,
        *,
        prompt_tokens: Array,
        completed_at: NDArray[np.int64],
        outcomes: NDArray[np.bool_],
        weights: Array,
    ) -> None:
        self.logprobs = logprobs
        self.max_logprobs = max_logprobs
        self.prompt_tokens = prompt_tokens
        self.completed_at = completed_at
        self.outcomes = outcomes
        self.weights = weights
        self.regrets = recorded_regrets(logprobs, max_logprobs)
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

    Returns None when all outcomes are the same: there is nothing to tell apart. Raises ImportError
    without scikit-learn.
    """
    linear = needed("sklearn.linear_model")
    preprocessing = needed("sklearn.preprocessing")
    batches = list(batches)
    outcomes = np.concatenate([batch.outcomes for batch in batches] or [np.empty(0, bool)])
    if outcomes.size == 0 or outcomes.all() or not outcomes.any():
        return None
    values = np.concatenate([batch.features for batch in batches]).astype(np.float64)
    weight = np.concatenate([batch.weights for batch in batches])
    scaler = preprocessing.StandardScaler().fit(values)
    # A scale of nearly 0 (a statistic that never moved) would blow up its weight.
    model = linear.LogisticRegression(max_iter=1000).fit(scaler.transform(values), outcomes, weight)
    unscaled = model.coef_[0] / scaler.scale_
    return SuccessEstimator(
        weights=tuple(map(float, unscaled)),
        bias=float(model.intercept_[0] - unscaled @ scaler.mean_),
    )


def _variance(values: Array, weight: Array) -> float:
    mean = np.average(values, weights=weight)
    return float(np.average((values - mean) ** 2, weights=weight))
