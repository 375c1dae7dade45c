"""The success estimator on simulated streams whose true success probability is known."""

import dataclasses
import math

import numpy as np
import pytest

from espo_gateway.stop import fit as estimator
from espo_gateway.stop.estimate import SuccessEstimator, probabilities, sigmoid
from espo_gateway.stop.rules import Gate
from espo_rl.gate.outcomes import KnownRollouts, recorded_of
from espo_rl.types import EndReason
from tests.helpers.simulated import LENGTH, SLIP, censored, simulate


def fit(rollouts, audit_share=1.0):
    return estimator.fit([KnownRollouts.of(rollouts, audit_share).examples()])


def explained_variance(fitted, rollouts, audit_share=1.0):
    known = KnownRollouts.of(rollouts, audit_share)
    return known.explained_variance(probabilities(fitted.logits(known.recorded.features)))


def true_probabilities(rollouts):
    slipped = np.array([np.maximum.accumulate(rollout.logprobs < -4) for rollout in rollouts])
    left = LENGTH - 1 - np.arange(LENGTH)
    return np.where(slipped, 0.0, (1 - SLIP) ** left)


def calibration_error(fitted, rollouts):
    """Mean |P - truth| over tokens."""
    recorded = recorded_of(rollouts)
    estimated = np.vectorize(sigmoid)(fitted.logits(recorded.features))
    return np.abs(estimated - true_probabilities(rollouts))[recorded.known].mean()


def test_the_estimate_is_the_true_probability():
    fitted = fit(simulate(1500, 0))
    held_out = simulate(500, 1)
    assert calibration_error(fitted, held_out) < 0.06

    outcomes = np.array([[float(rollout.correct)] for rollout in held_out])
    best = 1 - np.var(outcomes - true_probabilities(held_out)) / np.var(outcomes * np.ones(LENGTH))
    assert explained_variance(fitted, held_out) == pytest.approx(best, abs=0.05)


def test_audits_undo_the_censoring_by_stops():
    full = simulate(3000, 2)
    first = fit(full[:800])
    # A careless bound stops many that would have been right, so censoring truly distorts.
    gate = Gate(rule="success-probability", p_star=0.3, estimator=first)
    seen = censored(full, gate, audit_share=0.2, seed=3)
    weighted, unweighted = fit(seen, audit_share=0.2), fit(seen)
    held_out = simulate(500, 4)
    assert calibration_error(weighted, held_out) < 0.08
    assert calibration_error(unweighted, held_out) > 0.12

    reference = explained_variance(weighted, full)
    assert explained_variance(weighted, seen, 0.2) == pytest.approx(reference, abs=0.1)


def test_batches_fitted_one_by_one_count_as_one():
    rollouts = simulate(600, 6)
    parts = [KnownRollouts.of(rollouts[i : i + 200], 1.0).examples() for i in (0, 200, 400)]
    together = fit(rollouts)
    assert estimator.fit(parts).weights == pytest.approx(together.weights, rel=1e-3, abs=1e-3)


def test_examples_of_long_rollouts_are_thinned_and_small():
    long = [
        dataclasses.replace(
            rollout,
            token_ids=[1] * 4000,
            logprobs=np.resize(rollout.logprobs, 4000),
            max_logprobs=np.resize(rollout.max_logprobs, 4000),
        )
        for rollout in simulate(3, 0)
    ]
    examples = KnownRollouts.of(long, 1.0).examples()
    assert len(examples.outcomes) in range(3 * 40, 3 * 60)
    assert examples.features.dtype == np.float32
    assert examples.features[:, 1].max() == pytest.approx(math.sqrt(4000), rel=0.02)


def test_only_a_length_limit_leaves_the_last_token_open():
    kinds = [EndReason.COMPLETED, EndReason.LENGTH, EndReason.EARLY_STOP]
    rollouts = [
        dataclasses.replace(rollout, end=end, audited=end is EndReason.EARLY_STOP)
        for rollout, end in zip(simulate(3, 0), kinds, strict=True)
    ]
    assert KnownRollouts.of(rollouts, 0.1).recorded.completed_at.tolist() == [LENGTH, 0, LENGTH]


def test_nothing_to_tell_apart_gives_no_estimator():
    same = [dataclasses.replace(rollout, correct=True) for rollout in simulate(5, 5)]
    assert fit(same) is None
    assert fit([]) is None
    assert estimator.fit([]) is None
    assert explained_variance(SuccessEstimator(weights=(0.0,) * 12, bias=0.0), same) is None
    assert explained_variance(SuccessEstimator(weights=(0.0,) * 12, bias=0.0), []) is None


def test_an_estimator_must_be_finite_and_whole():
    with pytest.raises(ValueError, match="entries"):
        SuccessEstimator(weights=(1.0,), bias=0.0)
    with pytest.raises(ValueError, match="finite"):
        SuccessEstimator(weights=(math.nan,) * 12, bias=0.0)
