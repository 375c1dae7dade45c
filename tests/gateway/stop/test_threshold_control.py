"""Controllers of the threshold: row 6 as written, and bounds that hold."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import beta as beta_distribution

from espo_gateway.stop.rules import RuleName, threshold_of
from espo_gateway.stop.threshold_control import (
    AuditThreshold,
    Bound,
    Outcomes,
    ShareThreshold,
    correlation,
    independent,
    tail_correlation,
    upper_bound,
)
from espo_rl.gate.audits import Audits
from simulate_bound import N, play
from tests.helpers.thresholds import HIGH, LOW, audit, outcomes


def level_in_force(controller: ShareThreshold | AuditThreshold) -> float:
    assert controller.level is not None
    return controller.level


def clustered(prompts: int, rollouts: int, right: float, alike: float, seed: int) -> Outcomes:
    """Levels that tell nothing; alike: of their variance, what goes with the prompt."""
    rng = np.random.default_rng(seed)
    solved = rng.beta(2.0 * right, 2.0 * (1.0 - right), (prompts, 1))
    correct = (rng.random((prompts, rollouts)) < solved).ravel()
    of_prompt, own = np.repeat(rng.normal(size=prompts), rollouts), rng.normal(size=correct.size)
    made = outcomes(np.sqrt(alike) * of_prompt + np.sqrt(1.0 - alike) * own, correct)
    which = np.repeat(np.arange(prompts), rollouts)
    return dataclasses.replace(made, prompts=which)


# -- a share ---------------------------------------------------------------------------------------


@given(st.floats(1, 15), st.lists(st.floats(0, 1), max_size=20))
def test_the_controller_is_row_6(beta: float, shares: list[float]) -> None:
    low, high = threshold_of("value-gated").level(9.0), threshold_of("value-gated").level(2.0)
    start = threshold_of("value-gated").level(beta)
    controller = ShareThreshold(target=0.25, step=0.1, low=low, high=high, start=start)
    beta = min(max(beta, 2.0), 9.0)
    for share in shares:
        controller.update(None, share, ready=True)
        beta = min(max(beta + 0.1 * (share - 0.25), 2.0), 9.0)
        assert threshold_of("value-gated").at(level_in_force(controller)) == pytest.approx(beta)


@pytest.mark.parametrize("rule", ["value-gated", "value-only", "random"])
def test_more_stops_than_wished_make_every_rule_stricter(rule: RuleName) -> None:
    start = threshold_of(rule).level(0.4)
    for share, stricter in ((0.9, True), (0.0, False)):
        controller = ShareThreshold(target=0.25, step=0.1, low=-9.0, high=9.0, start=start)
        controller.update(None, share, ready=True)
        moved = threshold_of(rule).at(level_in_force(controller))
        assert (moved > 0.4) == (stricter if rule == "value-gated" else not stricter)


def test_nothing_moves_while_stopping_was_off_or_without_a_step() -> None:
    for step, share in ((0.1, None), (0.0, 0.9)):
        controller = ShareThreshold(target=0.25, step=step, low=-9, high=9, start=1.0)
        controller.update(outcomes([0.0], [True]), share, ready=True)
        assert controller.level == 1.0


@given(st.integers(20, 200), st.floats(0.1, 0.9), st.integers(0, 2**32 - 1))
def test_a_calibrated_threshold_stops_the_wished_share(
    count: int, target: float, seed: int
) -> None:
    levels = np.random.default_rng(seed).normal(3, 1, count).astype(np.float32)
    controller = ShareThreshold(target=target, step=0.0, low=-99, high=99, start=None)
    controller.update(outcomes(levels[:9], levels[:9] > 3), None, ready=False)
    assert controller.level is None
    controller.update(outcomes(levels[9:], levels[9:] > 3), None, ready=True)
    assert abs((levels < level_in_force(controller)).mean() - target) <= 1.5 / count


def test_calibration_waits_for_rollouts_that_could_be_judged() -> None:
    controller = ShareThreshold(target=0.5, step=0.1, low=-9, high=9, start=None)
    controller.update(None, None, ready=True)
    assert controller.level is None
    assert "no full rollout" in controller.reason
    # What no threshold stops has the level +inf.
    controller.update(outcomes([1.0, math.inf, math.inf], [False, True, True]), None, ready=True)
    assert controller.level == 9.0


@pytest.mark.parametrize(
    "settings", [{"target": 1.5, "low": 0, "high": 1}, {"target": 0.5, "low": 1, "high": 1}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|need"):
        ShareThreshold(step=0.1, start=None, **settings)


# -- a bound on false positives --------------------------------------------------------------------


@given(st.integers(0, 30), st.integers(1, 300), st.floats(0.5, 0.99))
def test_the_bound_is_clopper_and_pearsons(false: int, right: int, confidence: float) -> None:
    bound = upper_bound(np.array([float(false)]), np.array([float(false + right)]), confidence)
    assert bound[0] == pytest.approx(beta_distribution.ppf(confidence, false + 1, right))


def test_where_all_were_right_the_bound_is_1() -> None:
    assert upper_bound(np.array([0.0, 7.0]), np.array([0.0, 7.0]), 0.9).tolist() == [1.0, 1.0]


@given(st.integers(0, 2**32 - 1), st.integers(50, 400))
def test_the_loosest_candidate_that_holds_is_taken(seed: int, count: int) -> None:
    """Against counting by hand, with all weights alike."""
    rng = np.random.default_rng(seed)
    levels = rng.normal(-3, 2, count).astype(np.float32)
    correct = rng.random(count) < 1 / (1 + np.exp(-2 * levels - 4))
    controller = audit()
    controller.update(outcomes(levels, correct), None, ready=True)

    def bound(level: float) -> float:
        stopped = levels < level
        false, known = correct[stopped].sum(), stopped.sum()
        return beta_distribution.ppf(0.9, false + 1, known - false) if known > false else 1.0

    if controller.level is None:
        assert bound(HIGH) > 0.05
        assert "no threshold keeps false positives under 5%" in controller.reason
        return
    assert controller.upper is not None
    assert controller.known is not None
    assert bound(controller.level) == pytest.approx(controller.upper)
    assert controller.upper <= 0.05
    assert (levels < controller.level).sum() == pytest.approx(controller.known)
    # A candidate stops 1.1 times what the one before it does: the next did not hold.
    looser = np.sort(levels[levels < HIGH])[math.ceil(1.2 * controller.known + 1) :]
    assert controller.level == HIGH or not looser.size or bound(looser[0]) > 0.04


def test_too_few_outcomes_hold_nothing() -> None:
    # 0 of 44 is bounded by 5.1 % with 90 % confidence, 0 of 45 by 4.99 %.
    for count, holds in ((44, False), (46, True)):
        controller = audit()
        controller.update(outcomes(np.linspace(-5, -4, count), [False] * count), None, ready=True)
        assert (controller.level is not None) == holds
    assert f"{controller.known:.0f} known outcomes" in controller.reason


def test_no_threshold_is_looser_or_stricter_than_its_range() -> None:
    wrong = outcomes(np.linspace(-13, 3, 500), [False] * 500)
    for low, high in ((-14.0, -1.0), (-4.0, -1.0), (-14.0, -10.0)):
        controller = audit(low=low, high=high)
        controller.update(wrong, None, ready=True)
        assert controller.level == high


def test_a_strict_threshold_that_holds_does_not_excuse_the_strictest_allowed() -> None:
    strict, false = np.linspace(-9, -5, 100), np.linspace(-4.9, -4.1, 100)
    told = outcomes(np.concatenate([strict, false]), [False] * 100 + [True] * 100)
    for low, holds in ((-14.0, True), (-4.0, False)):
        controller = audit(low=low)
        controller.update(told, None, ready=True)
        assert (controller.level is not None) == holds


def test_an_audited_rollout_stands_for_all_that_were_stopped() -> None:
    """Half of the stopped would have been right; few of them are audited, the rest is known."""
    stopped = outcomes(np.full(20, -5.0), [True, False] * 10, np.full(20, 10.0))
    rest = outcomes(np.full(180, -1.0), [False] * 180)
    batch = Outcomes(
        *(
            np.concatenate([getattr(part, name) for part in (stopped, rest)])
            for name in ("levels", "correct", "weights")
        )
    )
    controller = audit(limit=0.2)
    for _ in range(10):
        controller.update(batch, None, ready=True)
    # 200 of the 380 that a loose threshold stops come from the stopped, so 26 % are false.
    assert controller.level is None
    unweighted = audit(limit=0.2)
    for _ in range(10):
        unweighted.update(outcomes(batch.levels, batch.correct), None, ready=True)
    assert unweighted.level is not None


def test_a_few_audits_do_not_outweigh_what_full_rollouts_have_shown() -> None:
    controller = audit()
    controller.update(outcomes(np.linspace(-9, -2, 200), [False] * 200), None, ready=True)
    assert (before := controller.known) is not None
    audited = outcomes(np.linspace(-9, -2, 3), [False] * 3, np.full(3, 10.0))
    controller.update(audited, None, ready=True)
    assert controller.known == pytest.approx(before + 3)


def test_evidence_is_forgotten_after_its_window() -> None:
    controller = audit(window=2)
    for levels in ([-5.0] * 60, [-5.0] * 10, [-5.0] * 10):
        controller.update(outcomes(levels, [False] * len(levels)), None, ready=True)
    assert controller.level is None
    assert controller.known == 20
    # A batch whose levels are not known takes its place in the window, too.
    controller.update(None, None, ready=True)
    assert controller.known == 10


def test_what_a_checkpoint_keeps_is_bounded() -> None:
    controller = audit(window=5)
    sizes = []
    for _ in range(20):
        controller.update(outcomes(np.zeros(1000), np.zeros(1000)), None, ready=True)
        sizes.append(len(pickle.dumps(controller)))
    assert sizes[-1] <= sizes[5] < 5 * 1000 * 12
    calibrating = ShareThreshold(target=0.5, step=0.1, low=-9, high=9, start=None, window=5)
    for _ in range(20):
        calibrating.update(outcomes(np.zeros(1000), np.zeros(1000)), None, ready=False)
    assert len(pickle.dumps(calibrating)) < 5 * 1000 * 5


# -- a bound on right rollouts lost ----------------------------------------------------------------


def keeper(limit: float = 0.05, confidence: float = 0.9, window: int = 20) -> AuditThreshold:
    return AuditThreshold(Bound("right-lost", limit, confidence), window=window, low=LOW, high=HIGH)


@given(st.integers(0, 2**32 - 1), st.integers(50, 600))
def test_the_loosest_candidate_that_spares_the_right_ones_is_taken(seed: int, count: int) -> None:
    """Against counting by hand, with all weights alike."""
    rng = np.random.default_rng(seed)
    levels = rng.normal(-3, 2, count).astype(np.float32)
    correct = rng.random(count) < 1 / (1 + np.exp(-2 * levels - 4))
    controller = keeper()
    controller.update(outcomes(levels, correct), None, ready=True)

    def bound(level: float) -> float:
        lost, right = (correct & (levels < level)).sum(), correct.sum()
        return beta_distribution.ppf(0.9, lost + 1, right - lost) if right > lost else 1.0

    if controller.level is None:
        assert bound(levels.min()) > 0.05
        return
    assert controller.upper == pytest.approx(bound(controller.level))
    assert bound(controller.level) <= 0.05
    looser = np.sort(levels[levels < HIGH])[
        math.ceil(1.2 * (levels < controller.level).sum() + 1) :
    ]
    assert controller.level == HIGH or not looser.size or bound(looser[0]) > 0.04


@pytest.mark.parametrize(("right", "holds"), [(44, False), (46, True)])
def test_with_too_few_right_ones_nothing_is_stopped(right: int, holds: bool) -> None:
    """However many wrong ones are known."""
    controller = keeper()
    levels = np.concatenate([np.linspace(-9, -4, 5000), np.linspace(-1, 0, right)])
    controller.update(outcomes(levels, levels > -2), None, ready=True)
    assert (controller.level is not None) == holds
    assert holds or "at least 1 more right ones are needed" in controller.reason


def test_a_lost_one_counts_among_those_that_audits_would_show() -> None:
    """Ten are stopped for each that is audited: so for each that shows, ten finished ones count."""
    controller = keeper(window=1)
    levels, right = np.linspace(-9.0, 0.0, 400), np.ones(400, bool)
    weights = np.where(levels < -8.9, 10.0, 1.0)  # five of them, audited
    batch = outcomes(levels, right, weights)
    controller.update(dataclasses.replace(batch, known_share=0.1), 0.1, ready=True)
    assert controller.known == pytest.approx(0.1 * (395 + 5 * 10))


def test_audits_that_show_right_ones_lost_end_what_was_known() -> None:
    controller = keeper()
    levels = np.concatenate([np.linspace(-9, -4, 300), np.linspace(-1, 0, 300)])
    controller.update(outcomes(levels, levels > -2), None, ready=True)
    assert controller.level is not None
    lost = outcomes([-9.0] * 6 + [-1.0] * 100, [True] * 106, [10.0] * 6 + [1.0] * 100)
    lost = dataclasses.replace(lost, known_share=0.1)
    controller.update(lost, 0.3, ready=True, audits=(6, 6))
    assert controller.level is None
    assert "6 right rollouts were lost of 16 that audits would show" in controller.reason


def test_one_right_one_lost_of_a_handful_is_no_rehearsal_that_failed() -> None:
    levels = np.concatenate([np.linspace(-9, -4, 300), np.linspace(-1, 0, 300)])
    for lost, holds in ((1, True), (8, False)):
        controller = keeper()
        rehearsal = outcomes([-9.0] * lost + [-1.0] * (8 - lost), [True] * 8)
        controller.update(outcomes(levels, levels > -2), None, ready=True, rehearsal=rehearsal)
        assert (controller.level is not None) == holds


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [0.02, 0.12, 0.5])
@pytest.mark.parametrize("area", [0.7, 0.95])
def test_however_few_are_right_few_of_them_are_lost(accuracy: float, area: float) -> None:
    """What a bound on false positives gives away: with 2 % right nearly all of them."""
    audits = Audits.of(0.1, N)
    played = [play(Bound(), accuracy, area, audits, seed=seed) for seed in range(3)]
    assert not any(one.bare for one in played)
    assert np.mean([one.lost for one in played]) < 0.05
    # Of 2 % a window's are hardly as many as are needed.
    assert accuracy < 0.1 or np.mean([one.caught for one in played]) > 0.01
    if accuracy == 0.02:
        careless = play(Bound("false-positives"), accuracy, area, Audits(0.1), seed=0)
        assert careless.lost > 0.5
        assert careless.bare > 0.0


def test_audits_that_were_false_are_told() -> None:
    controller = audit()
    controller.update(outcomes(np.linspace(-9, -2, 200), [False] * 200), None, ready=True)
    stopped = outcomes([-9.0] * 6, [True] * 3 + [False] * 3, [10.0] * 6)
    controller.update(stopped, 0.3, ready=True, audits=(6, 3))
    assert controller.level is None
    assert "3 of the last 6 audits were false" in controller.reason
    assert controller.known is not None
    assert controller.known <= 6


def test_audits_are_forgotten_after_the_window() -> None:
    controller = audit(window=2)
    for audits in ((9, 1), (0, 0), (1, 1)):
        controller.update(None, None, ready=True, audits=audits)
    assert "1 of the last 1 audits were false" in controller.reason


def test_of_rollouts_that_tie_a_rounding_stops_none() -> None:
    """Whatever the level, a gate made from it stops none of those who have it."""
    for share in np.random.default_rng(0).uniform(0.1, 0.9, 200):
        tied = threshold_of("value-only").level(share)
        known = outcomes([tied] * 200 + [-6.0] * 200, [True] * 200 + [False] * 200)
        controller = audit(high=threshold_of("value-only").level(0.95))
        controller.update(known, None, ready=True)
        assert share >= threshold_of("value-only").at(level_in_force(controller))


def test_what_the_next_gate_would_have_done_to_the_last_batch_is_rehearsed() -> None:
    """An estimator to come calls every rollout hopeless from its start, as no earlier one did."""
    correct = np.arange(400) < 200
    known = outcomes(np.where(correct, 3.0, -4.0) + np.linspace(0.0, 1.0, 400), correct)
    pessimist = outcomes(np.where(correct, -1.5, -4.0) + np.linspace(0.0, 1.0, 400), correct)
    trusting, cautious = audit(), audit()
    trusting.update(known, None, ready=True)
    cautious.update(known, None, ready=True, rehearsal=pessimist)
    assert trusting.level == HIGH
    assert cautious.level is not None
    # Most failures are still stopped, and of the right ones no more than the limit allows.
    stopped = pessimist.levels < cautious.level
    assert stopped[~correct].mean() > 0.85
    assert stopped[correct].sum() <= 0.05 * stopped.sum()
    hopeless = audit()
    hopeless.update(known, None, ready=True, rehearsal=outcomes(np.full(400, -14.0), correct))
    assert hopeless.level is None
    assert "the estimate to come speaks against all of them" in hopeless.reason


# -- rollouts of one prompt ------------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "rollouts", "right"), [(50, 8, 0.15), (50, 32, 0.15)])
@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9])
def test_the_confidence_holds_where_rollouts_of_a_prompt_are_lost_together(
    prompts: int, rollouts: int, right: float, alike: float
) -> None:
    broken, looks = 0, 200
    for seed in range(looks):
        controller = AuditThreshold(Bound(), window=1, low=-20.0, high=20.0)
        controller.update(clustered(prompts, rollouts, right, alike, seed), None, ready=True)
        broken += controller.level is not None and bool(ndtr(controller.level) > 0.05)
    assert broken <= 0.1 * looks + 2 * math.sqrt(0.09 * looks)


def test_rollouts_count_singly_where_levels_do_not_go_with_the_prompt() -> None:
    alone, alike = (clustered(400, 8, 0.5, share, 0) for share in (0.0, 0.99))
    both = independent([alone, alone], 0.05)
    assert both.sum() == pytest.approx(2 * alone.right.sum(), rel=0.1)
    assert alike.prompts is not None
    prompts = len(np.unique(alike.prompts[alike.correct]))
    assert independent([alike], 0.05).sum() == pytest.approx(prompts, rel=0.2)
    # Without being told, each is a prompt of its own.
    untold = dataclasses.replace(alike, prompts=None)
    assert independent([untold], 0.05).tolist() == untold.right.tolist()


@pytest.mark.parametrize(
    ("levels", "prompts", "expected"),
    [
        ([], [], 0.0),
        ([1.0, 2.0, 3.0], [0, 1, 2], 0.0),
        ([1.0, 2.0], [0, 0], 1.0),
        ([5.0, 5.0, 5.0], [0, 0, 1], 1.0),
        ([1.0, 1.0, 2.0, 2.0], [0, 0, 1, 1], 1.0),
        ([1.0, 4.0, 2.0, 3.0], [0, 0, 1, 1], 0.0),
    ],
)
def test_the_correlation_within_prompts(
    levels: list[float], prompts: list[int], expected: float
) -> None:
    assert correlation(np.array(levels), np.array(prompts, np.int64)) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_levels_that_are_alike_are_less_so_in_the_tail(share: float) -> None:
    assert tail_correlation(0.0, share) == 0.0
    assert tail_correlation(1.0, share) == 1.0
    alike = [tail_correlation(rho, share) for rho in (0.1, 0.5, 0.9, 0.999)]
    assert alike == sorted(alike)
    assert alike[1] < 0.5 < alike[-1]
    # Against a simulation of pairs.
    rng = np.random.default_rng(0)
    own, of_prompt = rng.normal(size=(2, 400_000)), rng.normal(size=400_000)
    low = np.sqrt(0.5) * own + np.sqrt(0.5) * of_prompt < ndtri(share)
    assert np.corrcoef(*low)[0, 1] == pytest.approx(alike[1], abs=0.02)
