"""The audit, from end to end: what is known of all that a gate has stopped."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from espo_gateway.stop.rules import Gate, RuleName, threshold_of
from espo_gateway.stop.threshold_control import AuditThreshold, Outcomes
from espo_rl.gate.batch_gates import StopController
from tests.helpers.control import AUDIT, bound_of, controller, play
from tests.helpers.simulated import censored, cuts, simulate


def realised(stopping: StopController, batches: int, **settings: Any) -> tuple[float, float]:
    """False positives among all stops, and the share stopped, in gated batches."""
    false = stops = gated = 0
    for batch in range(batches):
        gate = stopping.gate("w")
        full = simulate(200, 77_000 + batch, **settings)
        found = [bool(r.correct) for r, cut in zip(full, cuts(full, gate), strict=True) if cut]
        false, stops = false + sum(found), stops + len(found)
        gated += stopping.on
        stopping.observe(censored(full, gate, stopping.config.audit_share, batch), None)
    return false / max(stops, 1), stops / (gated or 1) / 200


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["success-probability", "value-gated", "regret-only"])
def test_the_audit_stops_nearly_all_that_is_lost_and_hardly_more(rule: RuleName) -> None:
    """70 % of these rollouts slip, visibly: half of them early enough to be worth a stop."""
    stopping = controller(rule=rule, audit_share=0.1, beta_min=0.1, false_positives=0.05)
    false, stopped = realised(stopping, 30)
    assert false < 0.05
    assert stopped > 0.5
    assert bound_of(stopping) <= 0.05
    assert stopping.known_outcomes is not None
    assert stopping.known_outcomes > 45
    assert "false positives with 90% confidence" in stopping.reason


@pytest.mark.slow
def test_the_audit_ends_a_rule_that_cannot_tell() -> None:
    """Half of what looks like a slip is none: no threshold is safe, and a fixed one is not."""
    settings = {"rule": "regret-only", "beta": 0.4, "beta_min": 0.1, "audit_share": 0.1}
    settings["false_positives"] = 0.05
    careless, _ = realised(controller(threshold="fixed", **settings), 10, harmless=0.5)
    assert careless > 0.15
    stopping = controller(**settings)
    gates, _ = play(stopping, 20, harmless=0.5)
    assert [gate.rule for gate in gates].count("none") >= 15
    if not stopping.on:
        assert "no threshold keeps false positives under 5%" in stopping.reason


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["success-probability", "value-gated", "regret-only"])
def test_the_audit_loses_few_of_the_right_ones(rule: RuleName) -> None:
    """The default bound, with a tenth audited."""
    stopping = controller(rule=rule, audit_share=0.1, beta_min=0.1)
    lost = right = stops = 0
    for batch in range(30):
        gate = stopping.gate("w")
        full = simulate(200, 88_000 + batch)
        found = np.array(cuts(full, gate)) > 0
        correct = np.array([bool(rollout.correct) for rollout in full])
        lost, right, stops = (
            lost + (found & correct).sum(),
            right + correct.sum(),
            stops + found.sum(),
        )
        stopping.observe(censored(full, gate, 0.1, batch), None)
    assert lost < 0.05 * right
    assert stops > 0.4 * 200 * 30 * 0.7  # 70 % slip
    assert "right rollouts lost with 90% confidence" in stopping.reason


def test_scores_are_made_before_the_estimator_has_seen_the_batch() -> None:
    stopping = controller(warmup_batches=1)
    stopping.observe(simulate(100, 0), None)
    assert stopping.estimator is not None
    assert stopping.known_outcomes == 0  # nothing could be said of the first batch
    assert stopping.explained_variance is None
    stopping.observe(simulate(100, 1), None)
    assert stopping.known_outcomes > 0
    assert stopping.explained_variance is not None


def test_an_audited_rollout_is_evidence_for_all_that_were_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopping = controller(rule="regret-only", audit_share=AUDIT, evidence=1, beta_min=0.01)
    stopping.observe(simulate(200, 0), None)
    gate = Gate(rule="regret-only", beta=0.3, statistics=stopping.statistics)
    seen = censored(simulate(400, 1), gate, AUDIT, 1)
    audited = sum(rollout.audited for rollout in seen)
    others = sum(not rollout.stopped for rollout in seen)
    assert audited > 50
    told: list[Outcomes] = []
    take = AuditThreshold.update

    def listening(self: AuditThreshold, outcomes: Outcomes, *more: Any, **options: Any) -> None:
        told.append(outcomes)
        take(self, outcomes, *more, **options)

    monkeypatch.setattr(AuditThreshold, "update", listening)
    stopping.observe(seen, None)
    evidence = told[-1]
    assert evidence.weights.sum() == audited / AUDIT + others
    assert evidence.weights[evidence.levels < threshold_of("regret-only").level(0.3)].tolist() == (
        [1 / AUDIT] * audited
    )


def test_what_a_checkpoint_keeps_does_not_grow_with_the_run() -> None:
    stopping = controller(evidence=3, window=2, warmup_batches=1)
    sizes = []
    for batch in range(8):
        stopping.observe(simulate(100, batch), 0.1)
        sizes.append(len(pickle.dumps(stopping)))
    assert max(sizes[4:]) < 1.05 * sizes[3]
