"""The success estimator on simulated streams whose true success probability is known."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest

from espo_gateway.stop import fit as estimator
from espo_gateway.stop.estimate import FEATURES, SuccessEstimator, probabilities, sigmoid
from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.regret import Array
from espo_gateway.stop.replay import estimated
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import SourceName
from espo_rl.gate.outcomes import KnownRollouts, recorded_of
from espo_rl.types import EndReason, Rollout
from tests.helpers.simulated import LENGTH, SLIP, censored, simulate


def fit(rollouts: list[Rollout], audit_share: float = 1.0) -> SuccessEstimator:
    fitted = estimator.fit([KnownRollouts.of(rollouts, audit_share).examples()])
    assert fitted is not None
    return fitted


def explained_variance(
    fitted: SuccessEstimator, rollouts: list[Rollout], audit_share: float = 1.0
) -> float | None:
    known = KnownRollouts.of(rollouts, audit_share)
    return known.explained_variance(probabilities(estimated(fitted, known.recorded)))


def true_probabilities(rollouts: list[Rollout]) -> Array:
    slipped = np.array([np.maximum.accumulate(rollout.logprobs < -4) for rollout in rollouts])
    left = LENGTH - 1 - np.arange(LENGTH)
    return np.where(slipped, 0.0, (1 - SLIP) ** left)


def calibration_error(fitted: SuccessEstimator, rollouts: list[Rollout]) -> float:
    """Mean |P - truth| over tokens."""
    recorded = recorded_of(rollouts)
    expected = np.vectorize(sigmoid)(estimated(fitted, recorded))
    return np.abs(expected - true_probabilities(rollouts))[recorded.known].mean()


def test_the_estimate_is_the_true_probability() -> None:
    fitted = fit(simulate(1500, 0))
    held_out = simulate(500, 1)
    assert calibration_error(fitted, held_out) < 0.06

    outcomes = np.array([[float(bool(rollout.correct))] for rollout in held_out])
    best = 1 - np.var(outcomes - true_probabilities(held_out)) / np.var(outcomes * np.ones(LENGTH))
    assert explained_variance(fitted, held_out) == pytest.approx(best, abs=0.05)


@pytest.mark.slow
def test_audits_undo_the_censoring_by_stops() -> None:
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


def test_batches_fitted_one_by_one_count_as_one() -> None:
    rollouts = simulate(600, 6)
    parts = [KnownRollouts.of(rollouts[i : i + 200], 1.0).examples() for i in (0, 200, 400)]
    one_by_one, together = estimator.fit(parts), fit(rollouts)
    assert one_by_one is not None
    assert one_by_one.weights == pytest.approx(together.weights, rel=1e-3, abs=1e-3)


def test_examples_of_long_rollouts_are_thinned_and_small() -> None:
    long = [resized(rollout, 4000) for rollout in simulate(3, 0)]
    examples = KnownRollouts.of(long, 1.0).examples()
    assert len(examples.outcomes) in range(3 * 40, 3 * 60)
    assert examples.features.dtype == np.float32
    assert examples.features[:, 1].max() == pytest.approx(math.sqrt(4000), rel=0.02)


@pytest.mark.parametrize("longest", [40, 8192])
def test_what_a_rollout_gives_to_fit_on_does_not_hang_on_the_longest(longest: int) -> None:
    rollouts = simulate(30, 5)
    odd = resized(rollouts[0], longest)
    short = resized(rollouts[1], 3)
    examples = KnownRollouts.of([*rollouts, odd, short], 1.0).examples()
    alone = KnownRollouts.of(rollouts, 1.0).examples()
    assert np.array_equal(examples.features[: len(alone.outcomes)], alone.features)
    assert np.array_equal(examples.outcomes[: len(alone.outcomes)], alone.outcomes)
    assert len(examples.outcomes) - len(alone.outcomes) - 3 in range(40, 60)


@pytest.mark.parametrize("tokens", [1, 7, 40, 400])
def test_a_rollout_weighs_as_one_outcome_however_long_it_is(tokens: int) -> None:
    rollouts = [resized(one, tokens) for one in simulate(3, 0)] + simulate(2, 1)
    examples = KnownRollouts.of(rollouts, 1.0).examples()
    assert np.bincount(examples.rollouts, examples.weights) == pytest.approx(np.ones(5))


def test_few_rollouts_are_not_learnt_by_heart() -> None:
    """Outcomes that have nothing to do with the streams: there is nothing to say but how many."""
    few = [dataclasses.replace(one, correct=i % 2 == 0) for i, one in enumerate(simulate(16, 0))]
    said = probabilities(estimated(fit(few), recorded_of(simulate(200, 1))))
    assert np.abs(said - 0.5).mean() < 0.1


def resized(rollout: Rollout, tokens: int) -> Rollout:
    return dataclasses.replace(
        rollout,
        token_ids=[1] * tokens,
        logprobs=np.resize(rollout.logprobs, tokens),
        max_logprobs=np.resize(rollout.max_logprobs, tokens),
        kept=tokens,
    )


def test_only_a_length_limit_leaves_the_last_token_open() -> None:
    kinds = [EndReason.COMPLETED, EndReason.LENGTH, EndReason.EARLY_STOP]
    rollouts = [
        dataclasses.replace(rollout, end=end, audited=end is EndReason.EARLY_STOP)
        for rollout, end in zip(simulate(3, 0), kinds, strict=True)
    ]
    completed_at = KnownRollouts.of(rollouts, 0.1).recorded.completed_at
    assert completed_at is not None
    assert completed_at.tolist() == [LENGTH, 0, LENGTH]


def test_nothing_to_tell_apart_gives_no_estimator() -> None:
    same = [dataclasses.replace(rollout, correct=True) for rollout in simulate(5, 5)]
    for rollouts in (same, []):
        assert estimator.fit([KnownRollouts.of(rollouts, 1.0).examples()]) is None
    assert estimator.fit([]) is None
    unfitted = SuccessEstimator(weights=(0.0,) * len(FEATURES), bias=0.0)
    assert explained_variance(unfitted, same) is None
    assert explained_variance(unfitted, []) is None


def test_rounding_tells_nothing() -> None:
    """Of a policy that is sure of every token, only rounding differs from rollout to rollout."""
    rng = np.random.default_rng(0)
    logprobs = -1.19e-7 * rng.integers(0, 2, (64, 40)).astype(np.float64)
    of = Recorded(logprobs, np.zeros_like(logprobs), np.full(64, 9))
    fitted = estimator.fit([estimator.examples(of, rng.random(64) < 0.5, np.ones(64))])
    assert fitted is not None
    ordinary: Array = np.full((1, 40), -0.05)
    assert np.abs(estimated(fitted, Recorded(ordinary, ordinary, np.full(1, 9)))).max() < 3.0


def test_one_runaway_costs_little_memory() -> None:
    logprobs = np.full((128, 20_000), np.nan)
    logprobs[:, :100] = logprobs[0] = -0.1
    recorded = Recorded(logprobs, np.zeros_like(logprobs), np.full(128, 9))
    assert recorded.known.any()
    fitted = SuccessEstimator(weights=(0.1,) * len(FEATURES), bias=0.0)
    tracemalloc.start()
    estimated(fitted, recorded)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * logprobs.nbytes


def test_an_estimator_must_be_finite_and_whole() -> None:
    with pytest.raises(ValueError, match="entries"):
        SuccessEstimator(weights=(1.0,), bias=0.0)
    with pytest.raises(ValueError, match="finite"):
        SuccessEstimator(weights=(math.nan,) * len(FEATURES), bias=0.0)


@pytest.mark.parametrize("told", [(), (7.0,)])
def test_an_earlier_versions_estimator_reads_what_it_knew(told: tuple[float, ...]) -> None:
    weights = tuple(range(1, 13))
    sources: tuple[SourceName, ...] = ("history",) if told else ()
    estimate = SuccessEstimator((*weights, *([0.5] if told else [])), 2.0, sources)
    features = tuple(range(1, 1 + len(FEATURES)))
    known = sum(w * f for w, f in zip(weights, features, strict=False))
    assert estimate.logit(features, told) == 2.0 + known + sum(0.5 * number for number in told)
