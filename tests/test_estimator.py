"""The success estimator on simulated streams whose true success probability is known."""

import dataclasses
import math
import random

import numpy as np
import pytest

from espo_gateway.monitor import pad
from espo_gateway.replay import first_stops, recorded_regrets
from espo_gateway.rules import Gate
from espo_gateway.values import SuccessEstimator, sigmoid
from espo_rl import estimator
from espo_rl.config import Stopping
from espo_rl.stopping import StopController
from espo_rl.types import EndReason, Problem, Rollout

LENGTH, SLIP = 40, 0.03


def simulate(count, seed):
    """Streams that fail when they slip: a slip shows as a regret of about 5, then all is calm.

    At token t the true P(success) is 0 after a slip, else (1 - SLIP) to the tokens left.
    """
    rng = np.random.default_rng(seed)
    rollouts = []
    for _ in range(count):
        slips = rng.random(LENGTH) < SLIP
        logprobs = np.where(slips, -5.0, -0.05) - rng.exponential(0.1, LENGTH)
        rollouts.append(
            Rollout(
                problem=Problem("p", "p", "a"),
                prompt_ids=[1] * 5,
                token_ids=[1] * LENGTH,
                logprobs=logprobs,
                max_logprobs=np.full(LENGTH, -0.05),
                text="",
                end=EndReason.COMPLETED,
                kept=LENGTH,
                correct=not slips.any(),
            )
        )
    return rollouts


def true_probabilities(rollouts):
    slipped = np.array([np.maximum.accumulate(rollout.logprobs < -4) for rollout in rollouts])
    left = LENGTH - 1 - np.arange(LENGTH)
    return np.where(slipped, 0.0, (1 - SLIP) ** left)


def censored(rollouts, gate, audit_share, seed):
    """What training sees of them: stopped ones without an outcome, but for the audited share."""
    rng = random.Random(seed)
    arrays = [pad([getattr(r, name) for r in rollouts]) for name in ("logprobs", "max_logprobs")]
    cuts = first_stops(gate, *arrays, np.full(len(rollouts), 5.0))
    seen = []
    for rollout, cut in zip(rollouts, cuts, strict=True):
        if not cut:
            seen.append(rollout)
        elif rng.random() < audit_share:
            seen.append(
                dataclasses.replace(rollout, end=EndReason.EARLY_STOP, kept=int(cut), audited=True)
            )
        else:
            short = {
                "token_ids": rollout.token_ids[:cut],
                "logprobs": rollout.logprobs[:cut],
                "max_logprobs": rollout.max_logprobs[:cut],
            }
            seen.append(
                dataclasses.replace(
                    rollout, end=EndReason.EARLY_STOP, kept=int(cut), correct=None, **short
                )
            )
    return seen


def calibration_error(fitted, rollouts):
    """Mean |P - truth| over tokens."""
    features, real = estimator.features(rollouts)
    probabilities = np.vectorize(sigmoid)(fitted.logits(features))
    return np.abs(probabilities - true_probabilities(rollouts))[real].mean()


def test_the_estimate_is_the_true_probability():
    fitted = estimator.fit(simulate(1500, 0), audit_share=1.0)
    held_out = simulate(500, 1)
    assert calibration_error(fitted, held_out) < 0.06

    outcomes = np.array([[float(rollout.correct)] for rollout in held_out])
    best = 1 - np.var(outcomes - true_probabilities(held_out)) / np.var(outcomes * np.ones(LENGTH))
    assert estimator.explained_variance(fitted, held_out, 1.0) == pytest.approx(best, abs=0.05)


def test_audits_undo_the_censoring_by_stops():
    full = simulate(3000, 2)
    first = estimator.fit(full[:800], audit_share=1.0)
    # A careless bound stops many that would have been right, so censoring truly distorts.
    gate = Gate(rule="success-probability", p_star=0.4, estimator=first)
    seen = censored(full, gate, audit_share=0.2, seed=3)
    weighted = estimator.fit(seen, audit_share=0.2)
    unweighted = estimator.fit(seen, audit_share=1.0)
    held_out = simulate(500, 4)
    assert calibration_error(weighted, held_out) < 0.08
    assert calibration_error(weighted, held_out) < calibration_error(unweighted, held_out)

    reference = estimator.explained_variance(weighted, full, 1.0)
    assert estimator.explained_variance(weighted, seen, 0.2) == pytest.approx(reference, abs=0.1)


def test_nothing_to_tell_apart_gives_no_estimator():
    same = [dataclasses.replace(rollout, correct=True) for rollout in simulate(5, 5)]
    assert estimator.fit(same, 1.0) is None
    assert estimator.fit([], 1.0) is None


def test_an_estimator_must_be_finite_and_whole():
    with pytest.raises(ValueError, match="entries"):
        SuccessEstimator(weights=(1.0,), bias=0.0)
    with pytest.raises(ValueError, match="finite"):
        SuccessEstimator(weights=(math.nan,) * 12, bias=0.0)


def controller(steps=100, **settings):
    return StopController(Stopping(**settings), steps, random.Random(0))


def test_stopping_is_off_during_the_warm_up_and_on_after_it():
    stopping = controller(warmup_batches=2)
    for batch in range(2):
        assert stopping.gate("w").rule == "none"
        stopping.observe(simulate(60, batch), critic_loss=0.5)
    gate = stopping.gate("w")
    assert (gate.rule, gate.version, gate.weights_version) == ("success-probability", 2, "w")
    assert gate.estimator is not None


def test_the_papers_warm_up_goes_on_by_the_critics_loss_and_says_why():
    stopping = controller(warmup="critic-loss", rule="regret-only", audit_share=0.0, steps=1000)
    reasons = []
    for loss in (3.0, 2.0, 1.5, 1.45):
        stopping.observe(simulate(40, 0), critic_loss=loss)
        reasons.append(stopping.gate("w").rule)
    assert reasons == ["none", "none", "none", "regret-only"]
    assert "moved less" in stopping.warmup.reason
    # Forced on after a share of all steps.
    forced = controller(warmup="critic-loss", rule="regret-only", audit_share=0.0, steps=20)
    for loss in (9.0, 7.0):
        forced.observe(simulate(40, 0), critic_loss=loss)
    assert forced.gate("w").rule == "regret-only"
    assert "forced" in forced.warmup.reason


def test_beta_is_calibrated_once_then_controlled():
    stopping = controller(
        rule="regret-only", warmup_batches=1, target_share=0.3, audit_share=0.0, beta_min=0.01
    )
    full = simulate(200, 6)
    stopping.observe(full, critic_loss=None)
    gate = stopping.gate("w")
    arrays = [pad([getattr(r, name) for r in full]) for name in ("logprobs", "max_logprobs")]
    stopped = (first_stops(gate, *arrays, np.full(200, 5.0)) > 0).mean()
    assert stopped == pytest.approx(0.3, abs=0.02)

    calibrated = stopping.beta
    stopping.observe(full, critic_loss=None)  # none of them stopped, so the share is 0
    assert stopping.beta == pytest.approx(calibrated + 0.1 * (0.0 - 0.3))


def test_audits_are_drawn_at_the_wished_share_before_sampling():
    drawn = controller(audit_share=0.25).draw_audits(4000)
    assert sum(drawn) / 4000 == pytest.approx(0.25, abs=0.03)


def test_statistics_are_of_all_tokens_of_the_batch():
    stopping = controller()
    batch = simulate(30, 7)
    stopping.observe(batch, critic_loss=None)
    regrets = recorded_regrets(
        pad([r.logprobs for r in batch]), pad([r.max_logprobs for r in batch])
    )
    assert stopping.statistics.mean == pytest.approx(np.nanmean(regrets))
    assert stopping.statistics.variance == pytest.approx(np.nanvar(regrets))
