"""Fits the success estimator on rollouts whose outcome is known.

Stopping censors the data: the outcome of a stopped rollout is known only when it was audited.
Audited ones therefore stand for all stopped ones, weighted by one over the audit share.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from espo_gateway.monitor import pad
from espo_gateway.replay import recorded_regrets
from espo_gateway.values import SuccessEstimator, probabilities, stream_features
from espo_rl.types import Rollout

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


def fit(rollouts: Sequence[Rollout], audit_share: float) -> SuccessEstimator | None:
    """Logistic regression of the outcome on the stream's statistics at every (or every k-th) token.

    Returns None when all outcomes are the same: there is nothing to tell apart.
    """
    known = with_outcome(rollouts)
    outcomes = np.array([bool(rollout.correct) for rollout in known])
    if outcomes.size == 0 or outcomes.all() or not outcomes.any():
        return None
    values, real = features(known)
    stride = max(1, real.shape[1] // TOKENS_PER_ROLLOUT)
    real[:, np.arange(real.shape[1]) % stride != stride - 1] = False
    rows, _ = np.nonzero(real)
    scaler = StandardScaler().fit(values[real])
    # A scale of nearly 0 (a statistic that never moved) would blow up its weight.
    model = LogisticRegression(max_iter=1000).fit(
        scaler.transform(values[real]), outcomes[rows], weights(known, audit_share)[rows]
    )
    unscaled = model.coef_[0] / scaler.scale_
    return SuccessEstimator(
        weights=tuple(map(float, unscaled)),
        bias=float(model.intercept_[0] - unscaled @ scaler.mean_),
    )


def explained_variance(
    estimator: SuccessEstimator, rollouts: Sequence[Rollout], audit_share: float
) -> float | None:
    """1 - var(outcome - P)/var(outcome) over all tokens of rollouts with a known outcome.

    Ask it of rollouts that the estimator was not fitted on. None when all outcomes are the same.
    """
    known = with_outcome(rollouts)
    if not known:
        return None
    values, real = features(known)
    expected = probabilities(estimator.logits(values[real]))
    rows, _ = np.nonzero(real)
    outcomes = np.array([float(bool(rollout.correct)) for rollout in known])[rows]
    weight = weights(known, audit_share)[rows]
    total = _variance(outcomes, weight)
    return None if total == 0.0 else 1.0 - _variance(outcomes - expected, weight) / total


def _variance(values: Array, weight: Array) -> float:
    mean = np.average(values, weights=weight)
    return float(np.average((values - mean) ** 2, weights=weight))
