"""Nothing is stopped before something is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from espo_rl.config import Stopping
from espo_rl.gate.warm_up import WarmUp
from tests.helpers.control import controller
from tests.helpers.simulated import simulate


def test_stopping_is_off_during_the_warm_up_and_on_after_it() -> None:
    stopping = controller(warmup_batches=2)
    for batch in range(2):
        assert stopping.gate("w").rule == "none"
        assert stopping.reason.startswith(("warm-up", f"{batch} of 2"))
        stopping.observe(simulate(200, batch), critic_loss=0.5)
    gate = stopping.gate("w")
    assert (gate.rule, gate.version, gate.weights_version) == ("success-probability", 2, "w")
    assert gate.estimator is not None


def test_without_a_warm_up_the_papers_beta_gates_the_first_batch() -> None:
    stopping = controller(rule="regret-only", threshold="share", warmup="none", audit_share=0.0)
    gate = stopping.gate("w")
    assert (gate.rule, gate.beta) == ("regret-only", 7.0)
    given = controller(rule="regret-only", threshold="share", warmup="none", beta=3.0)
    assert given.gate("w").beta == 3.0


def test_without_a_warm_up_an_estimator_rule_starts_with_its_estimator() -> None:
    stopping = controller(threshold="fixed", p_star=0.1, warmup="none")
    assert stopping.gate("w").rule == "none"
    assert "no estimator yet" in stopping.reason
    stopping.observe(simulate(100, 0), None)
    gate = stopping.gate("w")
    assert gate.rule == "success-probability"
    assert gate.p_star == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ((3.0, 2.0, 1.5, 1.45), "moved less"),
        ((9.0, 0.4, 0.2, 0.45), "below 0.5 three times"),
        ((9.0, 8.0, 7.0, 6.0), "forced on after 4 steps"),
        ((None, None, None, None), "forced on after 4 steps"),
        ((0.1, math.nan, 0.3, math.nan), "forced on after 4 steps"),
    ],
)
def test_the_papers_warm_up_is_row_8(losses: Sequence[float | None], reason: str) -> None:
    warmup = WarmUp(Stopping(warmup="critic-loss"), 40)
    for loss in losses:
        assert not warmup.done
        assert warmup.reason.startswith("warm-up")
        warmup.update(loss, 0.9)
    assert warmup.done
    assert reason in warmup.reason


def test_a_warm_up_by_explained_variance_is_never_forced() -> None:
    warmup = WarmUp(Stopping(warmup="explained-variance", warmup_explained=0.2), 10)
    for explained in (None, 0.1, -3.0, 0.2, *[0.0] * 20):
        warmup.update(0.01, explained)
        assert not warmup.done
        assert "never forced" in warmup.reason
    warmup.update(0.01, 0.21)
    assert warmup.done
    assert warmup.reason == "explained variance 0.21, more than 0.2 wanted"


@pytest.mark.parametrize(("value", "starts"), [("stream", False), ("critic", True)])
def test_the_explained_variance_is_that_of_the_v_that_gates(value: str, starts: bool) -> None:
    stopping = controller(
        rule="value-gated", value=value, warmup="explained-variance", warmup_explained=0.8
    )
    stopping.observe(simulate(100, 0), None, critic_explained_variance=0.81)
    stopping.observe(simulate(100, 1), None, critic_explained_variance=0.81)
    assert stopping.warmup.done == starts
    assert (stopping.explained_variance == 0.81) == starts
