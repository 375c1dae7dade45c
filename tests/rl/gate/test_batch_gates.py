"""The stop controller: every rule, threshold and warm-up is a setting of one code path."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import random
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import ValidationError

from espo_gateway.stop import fit as estimator
from espo_gateway.stop.estimate import SuccessEstimator
from espo_gateway.stop.gate_json import gate_from_json, gate_to_json
from espo_gateway.stop.regret import RegretStatistics, smoothed_regret
from espo_gateway.stop.rules import Gate, RuleName, threshold_of
from espo_rl.config import Stopping
from espo_rl.gate.batch_gates import StopController
from espo_rl.gate.outcomes import recorded_of
from espo_rl.types import EndReason
from tests.helpers.control import AUDIT, bound_of, controller, play
from tests.helpers.simulated import censored, cuts, judged, simulate


def limit_of(stopping: StopController) -> float:
    assert stopping.threshold is not None
    return stopping.threshold


def test_auc_within_prompts_is_of_pairs_of_one_prompt() -> None:
    """Prompts of their own would look told apart by a gate that knows only which is hard."""
    stopping = controller(rule="regret-only", warmup_batches=1)
    rollouts = simulate(40, 1)
    for number, rollout in enumerate(rollouts):
        rollout.group = number % 4
        rollout.correct = number % 4 == 0
    stopping.observe(rollouts, None)
    assert stopping.auc_within is None
    assert np.isnan(stopping.metrics()["auc_within_prompts"])
    for number, rollout in enumerate(rollouts):
        rollout.correct = number >= 4
        loud = 0.1 if rollout.correct else 5.0
        rollout.logprobs = rollout.max_logprobs - loud
    stopping.observe(rollouts, None)
    assert stopping.metrics()["auc_within_prompts"] == 1.0


# -- all settings ----------------------------------------------------------------------------------

SOURCES = ("constant", "stream", "critic")
ALL = [
    (rule, value, threshold, warmup)
    for rule, value, threshold, warmup in itertools.product(
        sorted({*get_args(RuleName)} - {"confidence"}),  # the recipe refuses it
        SOURCES,
        ("audit", "share", "quantile", "fixed"),
        ("none", "batches", "critic-loss", "explained-variance"),
    )
    if value == "stream" or rule in ("value-gated", "value-only")
]


@pytest.mark.parametrize(("rule", "value", "threshold", "warmup"), ALL)
def test_every_combination_makes_gates_that_hold(
    rule: RuleName, value: str, threshold: str, warmup: str
) -> None:
    """A shaky rule may stay off under "audit", but it says why, and each gate is a valid one."""
    settings = {"warmup_batches": 2, "audit_share": AUDIT, "warmup_explained": 0.1}
    stopping = controller(
        rule=rule, value=value, threshold=threshold, warmup=warmup, beta_min=0.01, **settings
    )
    for batch in range(5):
        gate = stopping.gate(f"step-{batch}")
        assert gate_from_json(gate_to_json(gate), has_critic=True) == gate
        assert (gate.rule == rule) == (stopping.on or rule == "none")
        assert (gate.version, gate.weights_version) == (batch, f"step-{batch}")
        if stopping.on:
            threshold_in_force = threshold_of(rule).of(gate)
            assert threshold_in_force == stopping.threshold
        assert stopping.reason
        seen = censored(simulate(120, batch), gate, AUDIT, batch)
        before, was_on = stopping.threshold, stopping.on
        stopping.observe(judged(seen) if stopping.needs_values else seen, 0.4, 0.5)
        stopping = pickle.loads(pickle.dumps(stopping))  # as a checkpoint does
        if not was_on or before is None or stopping.threshold is None:
            continue
        looser = threshold_of(rule).level(stopping.threshold) - threshold_of(rule).level(before)
        share = sum(rollout.stopped for rollout in seen) / 120
        if threshold == "share" or rule == "random":
            assert looser * (share - 0.25) <= 1e-12
        elif threshold in ("quantile", "fixed"):
            assert looser == 0.0
    if rule == "none":
        assert not stopping.on
        assert stopping.reason == "no stop rule"
    elif threshold != "audit":
        assert stopping.on, stopping.reason
        assert stopping.reason.startswith(("β = ", "p* = ", "hazard = "))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "value", "threshold"),
    [
        *(("regret-only", "constant", threshold) for threshold in ("share", "quantile")),
        *(("value-gated", "stream", threshold) for threshold in ("share", "quantile")),
        *(("success-probability", "stream", threshold) for threshold in ("share", "quantile")),
        *(("random", "constant", threshold) for threshold in ("audit", "share", "fixed")),
    ],
)
def test_a_wished_share_is_met_from_the_first_gated_batch(
    rule: RuleName, value: str, threshold: str
) -> None:
    shares = []
    for seed in range(3):  # as what it is calibrated on is an estimate of four batches
        stopping = controller(
            rule=rule,
            value=value,
            threshold=threshold,
            target_share=0.3,
            beta_min=0.01,
            p_star_max=0.99,
        )
        # Half of the slips are harmless, so that no rollout is quite lost, and levels spread out.
        gates, stopped = play(stopping, 10, rollouts=250, harmless=0.5, seed=seed)
        assert [gate.rule for gate in gates] == ["none"] * 4 + [rule] * 6
        shares += stopped[4:]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.08)


def test_random_stops_follow_rollouts_that_become_shorter() -> None:
    stopping = controller(rule="random", target_share=0.3, audit_share=0.0)
    shares = []
    for batch in range(30):
        gate = stopping.gate("w")
        full = simulate(300, batch)
        if batch >= 10:
            for rollout in full:
                rollout.token_ids = rollout.token_ids[:15]
                rollout.logprobs = rollout.logprobs[:15]
                rollout.max_logprobs = rollout.max_logprobs[:15]
        seen = censored(full, gate, 0.0, batch)
        stopping.observe(seen, None)
        shares.append(sum(rollout.stopped for rollout in seen) / 300)
    assert shares[10] < 0.2
    assert np.mean(shares[15:]) == pytest.approx(0.3, abs=0.03)


# -- the rest --------------------------------------------------------------------------------------


def test_beta_starts_where_it_is_given_or_where_the_warm_up_puts_it() -> None:
    settings = {"rule": "regret-only", "threshold": "share", "warmup_batches": 1, "beta_min": 0.01}
    full = simulate(200, 6)
    calibrated = controller(target_share=0.3, **settings)
    calibrated.observe(full, None)
    stopped = np.array(cuts(full, calibrated.gate("w"))) > 0
    assert stopped.mean() == pytest.approx(0.3, abs=0.02)
    before = limit_of(calibrated)
    calibrated.observe(full, None)  # none of them is told to be stopped, so the share is 0
    assert calibrated.threshold == pytest.approx(before + 0.1 * (0.0 - 0.3))

    given = controller(beta=4.0, **settings)
    given.observe(full, None)
    assert given.threshold == 4.0


@pytest.mark.parametrize("rule", ["value-gated", "value-only"])
def test_a_critics_threshold_starts_where_its_values_put_it(rule: RuleName) -> None:
    """V = ε instead would stop far fewer than wished."""
    stopping = controller(
        rule=rule, value="critic", threshold="share", target_share=0.3, warmup_batches=1
    )
    assert stopping.needs_values
    full = simulate(400, 6)
    stopping.observe(judged(full), None)
    gate = stopping.gate("w")
    assert gate.rule == rule
    assert np.mean(np.array(cuts(full, gate)) > 0) == pytest.approx(0.3, abs=0.03)
    assert not stopping.needs_values  # from here on the share alone moves it


def test_what_no_critic_said_calibrates_nothing() -> None:
    stopping = controller(rule="value-gated", value="critic", threshold="share", warmup_batches=1)
    stopping.observe(simulate(100, 0), None)
    assert not stopping.on
    assert "no full rollout has been judged" in stopping.reason


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["value-gated", "value-only"])
def test_audits_bound_a_critics_rule(rule: RuleName) -> None:
    settings = {"rule": rule, "value": "critic", "audit_share": AUDIT, "beta_min": 0.01}
    settings["false_positives"] = 0.05
    stopping = controller(
        rule=rule, value="critic", audit_share=AUDIT, beta_min=0.01, false_positives=0.05
    )
    _, shares = play(stopping, 12)
    assert stopping.needs_values
    assert bound_of(stopping) <= 0.05
    failing = 1.0 - 0.97**40
    assert np.mean(shares[6:]) == pytest.approx(failing, abs=0.12)
    # A critic that takes too much for fatal is not believed.
    deceived = controller(
        rule=rule, value="critic", audit_share=AUDIT, beta_min=0.01, false_positives=0.05
    )
    _, shares = play(deceived, 12, harmless=0.5)
    assert bound_of(deceived) > 0.05
    assert np.mean(shares) < 0.05


def test_what_gated_a_batch_is_told_not_guessed() -> None:
    """A batch that was sampled ahead, before stopping began, is no sign that too few stop."""
    stopping = controller(rule="regret-only", threshold="share", warmup_batches=1)
    stopping.observe(simulate(200, 0), None, gated=False)
    before = limit_of(stopping)
    stopping.observe(simulate(200, 1), None, gated=False)
    assert stopping.threshold == before
    stopping.observe(simulate(200, 2), None, gated=True)
    assert limit_of(stopping) < before


def test_only_a_rule_that_asks_a_critic_needs_its_values() -> None:
    for settings in ({}, {"rule": "none"}, {"rule": "value-gated"}, {"rule": "regret-only"}):
        assert not controller(**settings).needs_values


def test_audits_are_drawn_at_the_wished_share_before_sampling() -> None:
    drawn = controller(audit_share=0.25).draw_audits(4000)
    assert sum(drawn) / 4000 == pytest.approx(0.25, abs=0.03)


def test_statistics_are_of_all_tokens_of_the_batch() -> None:
    stopping = controller()
    batch = simulate(30, 7)
    stopping.observe(batch, critic_loss=None)
    regrets = recorded_of(batch).regrets
    assert stopping.statistics.mean == pytest.approx(np.nanmean(regrets))
    assert stopping.statistics.variance == pytest.approx(np.nanvar(regrets))
    # Those of the second batch do not judge it.
    before = stopping.statistics
    other = simulate(30, 8)
    stopping.observe(other, critic_loss=None)
    regrets = recorded_of(other).regrets
    z = smoothed_regret(regrets, before, stopping.gate("w").monitor)
    assert isinstance(before, RegretStatistics)
    assert stopping.z_quantiles == pytest.approx(tuple(np.quantile(z, (0.5, 0.9, 0.99))))


def test_a_batch_of_errors_teaches_nothing() -> None:
    stopping = controller(warmup="none", threshold="fixed", rule="regret-only")
    failed = simulate(3, 0)
    for rollout in failed:
        rollout.end = EndReason.ERROR
    stopping.observe(failed, 0.1)
    assert stopping.gate("w") == controller(
        warmup="none", threshold="fixed", rule="regret-only"
    ).gate("w")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"audit_share": 0.0}, "an estimator"),
        ({"audit_share": 0.0, "rule": "value-only", "threshold": "share"}, "an estimator"),
        ({"audit_share": 0.0, "rule": "regret-only"}, 'threshold = "audit"'),
        (
            {
                "audit_share": 0.0,
                "rule": "regret-only",
                "threshold": "share",
                "warmup": "explained-variance",
            },
            'warmup = "explained-variance"',
        ),
        ({"beta_min": 3.0, "beta_max": 2.0}, "beta_min = 3.0 must be below"),
    ],
)
def test_settings_that_cannot_work_say_what_to_change(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Stopping(**settings)


def test_a_critic_is_read_in_the_unit_of_its_returns() -> None:
    config = Stopping(rule="value-gated", value="critic", warmup="none")
    gate = StopController(config, 10, random.Random(0), worth=(-1.0, 2.0)).gate("step-0")
    assert [gate.success(said) for said in (-1.0, 0.5, 2.0)] == [0.0, 0.5, 1.0]
    assert gate_from_json(gate_to_json(gate), has_critic=True) == gate


def test_random_and_fixed_rules_need_no_audits() -> None:
    for settings in ({"rule": "random"}, {"rule": "regret-only", "threshold": "fixed"}):
        assert Stopping.model_validate({"audit_share": 0.0, **settings}).audit_share == 0.0
    assert Gate.beta == 7.0  # the paper's β₀


def test_the_next_gate_is_rehearsed_on_the_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refit that makes every rollout hopeless from its start must not stop the next batch."""
    stopping = controller(warmup_batches=2)
    for batch in range(4):
        stopping.observe(simulate(200, batch), None)
    assert stopping.gate("").rule == "success-probability"
    fit = estimator.fit

    def pessimistic(batches: Sequence[estimator.Examples]) -> SuccessEstimator:
        fitted = fit(batches)
        assert fitted is not None
        return dataclasses.replace(fitted, bias=fitted.bias - 8.0)

    monkeypatch.setattr(estimator, "fit", pessimistic)
    last = simulate(200, 4)
    stopping.observe(last, None)
    gate = stopping.gate("")
    if gate.rule != "none":
        right = [
            bool(rollout.correct)
            for rollout, cut in zip(last, cuts(last, gate), strict=True)
            if cut
        ]
        assert sum(right) <= 0.05 * len(right)
