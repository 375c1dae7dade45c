"""Fits the success estimator to recorded rollouts whose outcome is known, and judges it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espo_gateway.optional import needed
from espo_gateway.stop.estimate import FEATURES, SuccessEstimator
from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.regret import Array
from espo_gateway.stop.told import TOLD, SourceName

#: Neighbouring tokens say almost the same; this many a rollout are enough to fit on.
TOKENS_PER_ROLLOUT = 48
#: Added to each feature's variance: what moves by far less than a tenth, of a share or of the root
#: of some nats, tells nothing, and rounding must not be scaled up to it.
NOISE = 1e-2


@dataclass(frozen=True)
class Examples:
    """What a fit needs of one batch: every (or every k-th) token of rollouts of known outcome."""

    features: NDArray[np.float32]  # [tokens, features], those of the sources last
    outcomes: NDArray[np.bool_]  # [tokens]
    weights: NDArray[np.float32]  # [tokens]
    rollouts: NDArray[np.int32]  # which of the batch each is of, [tokens]

    def where(self, chosen: NDArray[np.bool_]) -> Examples:
        """Some of them. chosen: [tokens]."""
        return Examples(
            self.features[chosen],
            self.outcomes[chosen],
            self.weights[chosen],
            self.rollouts[chosen],
        )


def examples(
    recorded: Recorded,
    correct: NDArray[np.bool_],
    weights: Array,
    sources: Sequence[SourceName] = (),
) -> Examples:
    """Tokens of rollouts of known outcome to fit on: those at which all sources have answered.

    Args:
        correct: [rollouts].
        weights: how many rollouts each stands for, [rollouts].
    """
    chosen = recorded.known.copy()
    told = recorded.told(sources)
    if told is not None:
        chosen &= np.isfinite(told).all(axis=-1)
    # Each by its own length: by the longest, one runaway would leave nothing of all others.
    place = np.cumsum(chosen, axis=1)
    stride = np.maximum(place[:, -1:] // TOKENS_PER_ROLLOUT, 1)
    chosen &= place % stride == 0
    rows, _ = np.nonzero(chosen)
    # A rollout is one outcome however many of its tokens are looked at: weighing one each against
    # the fit's penalty, they would have the first few rollouts learnt by heart.
    each = weights / np.maximum(chosen.sum(axis=1), 1)
    features = [recorded.features_where(chosen), *([] if told is None else [told[chosen]])]
    return Examples(
        features=np.concatenate(features, axis=-1).astype(np.float32),
        outcomes=correct[rows],
        weights=each[rows].astype(np.float32),
        rollouts=rows.astype(np.int32),
    )


def explained_variance(
    recorded: Recorded, correct: NDArray[np.bool_], weights: Array, expected: Array
) -> float | None:
    """1 - var(outcome - P)/var(outcome) over all tokens at which P is known.

    Args:
        correct, weights: as for `examples`.
        expected: P, [rollouts, tokens], of an estimator that was not fitted on these rollouts; NaN
            where it knows none.

    Returns:
        None when all outcomes are the same.
    """
    variance, rest = Variance(), Variance()
    known = recorded.known & ~np.isnan(expected)
    rows, _ = np.nonzero(known)
    outcomes, weight = correct[rows].astype(float), weights[rows]
    variance.add(outcomes, weight)
    rest.add(outcomes - expected[known], weight)
    return 1.0 - rest.value / variance.value if variance.value else None


class Variance:
    """Of weighted numbers that come in parts."""

    def __init__(self) -> None:
        self._weight = self._total = self._squares = 0.0

    def add(self, numbers: Array, weights: Array | float = 1.0) -> None:
        self._weight += float(np.broadcast_to(weights, numbers.shape).sum())
        self._total += float((weights * numbers).sum())
        self._squares += float((weights * numbers**2).sum())

    @property
    def value(self) -> float:
        """0 where nothing has come, or all is the same."""
        if not self._weight:
            return 0.0
        mean = self._total / self._weight
        return max(self._squares / self._weight - mean * mean, 0.0)


def fit(batches: Iterable[Examples], sources: Sequence[SourceName] = ()) -> SuccessEstimator | None:
    """Logistic regression of the outcome on the stream's statistics and what sources tell.

    Args:
        sources: those of the examples, or the first of them: the others are then left out.

    Returns None when all outcomes are the same: there is nothing to tell apart. Raises ImportError
    without scikit-learn.
    """
    linear = needed("sklearn.linear_model")
    preprocessing = needed("sklearn.preprocessing")
    batches = list(batches)
    outcomes = np.concatenate([batch.outcomes for batch in batches] or [np.empty(0, bool)])
    if outcomes.size == 0 or outcomes.all() or not outcomes.any():
        return None
    read = len(FEATURES) + sum(len(TOLD[source]) for source in sources)
    values = np.concatenate([batch.features[:, :read] for batch in batches]).astype(np.float64)
    weight = np.concatenate([batch.weights for batch in batches])
    scaler = preprocessing.StandardScaler().fit(values)
    scaler.scale_ = np.sqrt(scaler.var_ + NOISE)
    model = linear.LogisticRegression(solver="newton-cholesky").fit(
        scaler.transform(values), outcomes, weight
    )
    unscaled = model.coef_[0] / scaler.scale_
    return SuccessEstimator(
        weights=tuple(map(float, unscaled)),
        bias=float(model.intercept_[0] - unscaled @ scaler.mean_),
        sources=tuple(sources),
    )
