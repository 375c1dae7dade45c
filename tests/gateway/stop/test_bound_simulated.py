"""The bound on false positives over whole trainings, simulated: it holds, and is not timid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from espo_gateway.stop.regret import Array
from espo_gateway.stop.rules import threshold_of
from espo_gateway.stop.threshold_control import (
    AuditThreshold,
)
from tests.helpers.thresholds import HIGH, LOW, audit, outcomes


class Policy:
    """Rollouts with a level and an outcome: both normal in the level, overlapping by `gap`.

    An estimator is calibrated when P(right | level) is the level's own probability; `scale` and
    `shift` make it one that is too sure of itself.
    """

    def __init__(
        self,
        *,
        gap: float = 4.0,
        fail: float = 0.4,
        spread: float = 2.0,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        self.gap, self.fail, self.spread, self.scale, self.shift = gap, fail, spread, scale, shift

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Array, NDArray[np.bool_]]:
        failed = rng.random(count) < self.fail
        evidence = rng.normal(np.where(failed, -self.gap / 2, self.gap / 2), self.spread**0.5)
        # Log odds of the outcome given the evidence.
        odds = self.gap / self.spread * evidence + math.log((1 - self.fail) / self.fail)
        return self.scale * odds + self.shift, ~failed

    def false_share(self, level: float | Array) -> Any:
        """Of the stopped at this level, and the share of all that are stopped."""
        odds = (level - self.shift) / self.scale - math.log((1 - self.fail) / self.fail)
        evidence = odds * self.spread / self.gap
        right = (1 - self.fail) * norm.cdf((evidence - self.gap / 2) / self.spread**0.5)
        wrong = self.fail * norm.cdf((evidence + self.gap / 2) / self.spread**0.5)
        return right / (right + wrong), right + wrong

    def oracle_share(self, limit: float = 0.05) -> float:
        """Share of rollouts that the loosest threshold within the limit stops."""
        levels = np.linspace(LOW, HIGH, 3000)
        false, stopped = self.false_share(levels)
        return stopped[false <= limit].max(initial=0.0)


def run(
    policies: Callable[[int], Policy],
    controller: AuditThreshold,
    *,
    seed: int,
    batches: int,
    rollouts: int = 256,
    audit_share: float = 0.1,
    warmup: int = 3,
    hears: bool = True,
) -> NDArray[np.int64]:
    """Realised (stopped, false positives) in each gated batch, as [batches, 2].

    hears: whether the controller is told how the audits of its stops came out.
    """
    rng, told = np.random.default_rng(seed), []
    for batch in range(batches):
        levels, correct = policies(batch).draw(rollouts, rng)
        stopped = np.zeros(rollouts, bool)
        if batch >= warmup and controller.level is not None:
            stopped = levels < controller.level
        known = ~stopped | (rng.random(rollouts) < audit_share)
        weights = np.where(stopped, 1 / audit_share, 1.0)[known]
        audited = stopped & known
        controller.update(
            outcomes(levels[known], correct[known], weights),
            None,
            ready=True,
            audits=(audited.sum(), (audited & correct).sum()) if hears else (0, 0),
        )
        if batch >= warmup:
            told.append((stopped.sum(), (stopped & correct).sum()))
    return np.array(told)


CALIBRATED = Policy()
OVERCONFIDENT = Policy(gap=2.7, scale=2.0, shift=-2.0)


def test_the_overconfident_policy_breaks_an_assumed_p_star() -> None:
    """As measured in training: 17 to 20 % false positives under p* = 0.1."""
    assert 0.15 < OVERCONFIDENT.false_share(threshold_of("value-only").level(0.1))[0] < 0.25
    assert CALIBRATED.false_share(threshold_of("value-only").level(0.1))[0] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("policy", [CALIBRATED, OVERCONFIDENT], ids=["calibrated", "overconfident"])
def test_realised_false_positives_stay_under_the_limit(policy: Policy) -> None:
    stopped, false = sum(
        run(lambda _: policy, audit(), seed=seed, batches=60).sum(axis=0) for seed in range(6)
    )
    assert 0 < false / stopped < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "share"), [(CALIBRATED, 0.8), (OVERCONFIDENT, 0.5)])
def test_it_stops_most_of_what_an_oracle_would(policy: Policy, share: float) -> None:
    told = np.mean([run(lambda _: policy, audit(), seed=s, batches=60) for s in range(6)], axis=0)
    assert told[:, 0].mean() / 256 > share * policy.oracle_share()


@pytest.mark.slow
def test_the_confidence_holds_for_the_threshold_that_is_chosen() -> None:
    """Chosen among many candidates, on full rollouts; violations come from luck alone."""
    violations = 0
    for seed in range(400):
        rng, controller = np.random.default_rng(seed), audit()
        policy = (CALIBRATED, OVERCONFIDENT, Policy(fail=0.15), Policy(gap=2.0))[seed % 4]
        controller.update(outcomes(*policy.draw(600, rng)), None, ready=True)
        if controller.level is not None:
            violations += policy.false_share(controller.level)[0] > 0.05
    assert violations <= 400 * 0.1


@pytest.mark.slow
def test_a_rosy_warm_up_is_corrected_by_audits() -> None:
    """From batch 20 on the estimator is far too sure; before it was not."""
    worse = Policy(gap=2.5, scale=2.0, shift=-2.0)

    def policies(batch: int) -> Policy:
        return CALIBRATED if batch < 20 else worse

    told = np.sum([run(policies, audit(), seed=s, batches=80) for s in range(6)], axis=0)
    before, jump, after = told[:17], told[17:20], told[37:]
    assert before[:, 1].sum() / before[:, 0].sum() < 0.05
    assert jump[:, 1].sum() / jump[:, 0].sum() > 0.1  # nobody can know yet
    assert after[:, 1].sum() / after[:, 0].sum() < 0.06


@pytest.mark.slow
def test_audits_that_speak_against_the_bound_end_what_was_known() -> None:
    """From batch 20 on levels hardly tell right from wrong; evidence of before says they do."""
    broken = Policy(gap=1.0, scale=3.0, shift=-3.0)

    def policies(batch: int) -> Policy:
        return CALIBRATED if batch < 20 else broken

    def false_after_the_first_such_batch(*, hears: bool) -> int:
        runs = [run(policies, audit(), seed=s, batches=40, hears=hears) for s in range(8)]
        return np.sum(runs, axis=0)[18:, 1].sum()

    deaf = false_after_the_first_such_batch(hears=False)
    assert false_after_the_first_such_batch(hears=True) < 0.6 * deaf


def test_without_audits_of_the_stopped_nothing_is_learned_of_them() -> None:
    """The evidence of a rule that stops is its audits: with none it ends, and says why."""
    controller = audit(window=3)
    told = run(lambda _: CALIBRATED, controller, seed=0, batches=30, audit_share=1e-9)
    off = told[:, 0] == 0
    assert 0 < off.mean() < 1
