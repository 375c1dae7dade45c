"""What recorded rollouts say of a rule: areas, curves, and how sure they are of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.traces.detection import Judged, area, area_within, curve, difficulty


def judged(correct: list[int], prompts: list[int], weights: list[float] | None = None) -> Judged:
    count = len(correct)
    return Judged(
        prompts=np.array(prompts),
        lengths=np.full(count, 10),
        prompt_tokens=np.full(count, 3.0),
        correct=np.array(correct, bool),
        weights=np.array(weights or [1.0] * count),
    )


def test_a_curve_counts_what_a_threshold_does() -> None:
    found = curve(
        judged([0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 3]),
        np.array([[4, 2], [0, 5], [0, 0], [0, 9]], np.int32),
        draws=50,
    )
    assert found.stopped[:, 0] == pytest.approx([1 / 6, 5 / 6])
    assert found.saved[:, 0] == pytest.approx([6 / 60, (8 + 5 + 3) / 60])
    assert found.false[:, 0] == pytest.approx([0, 3 / 5])
    assert found.false_positive_rate[:, 0] == pytest.approx([0, 3 / 4])
    assert found.recall[:, 0] == pytest.approx([1 / 2, 1])
    assert found.position[:, 0] == pytest.approx([0.4, (0.2 + 0.5 + 3 * 0.9) / 5])
    assert found.before_end[:, 0] == pytest.approx([6, 16 / 5])


def test_questions_are_taken_off_what_is_saved_and_not_off_where_stops_come() -> None:
    cuts = np.array([[4], [0], [0], [0]], np.int32)
    found = curve(judged([0, 0, 1, 1], [0, 0, 1, 1]), cuts, np.full((4, 1), 1.0), draws=5)
    assert found.saved[0, 0] == pytest.approx((6 - 4) / 40)
    assert found.before_end[0, 0] == 6


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    rollouts = judged([0, 0, 1, 1], [0, 1, 2, 3])
    assert area(rollouts, np.array([1.0, 3.0, 2.0, np.inf]), draws=5).value == 0.75
    assert area(rollouts, np.zeros(4), draws=5).value == 0.5
    assert math.isnan(area(judged([1, 1], [0, 1]), np.zeros(2), draws=5).value)


def test_rollouts_that_nothing_stops_are_alike() -> None:
    """Their levels are all +inf: a draw, whatever their order."""
    rollouts = judged([1, 0, 0, 1], [0, 0, 0, 0])
    for found in (area, area_within):
        assert found(rollouts, np.full(4, np.inf), draws=5).value == 0.5
        levels = np.array([np.inf, np.inf, 1.0, np.inf])
        assert found(rollouts, levels, draws=5).value == 0.75


def test_rollouts_of_one_prompt_count_as_one_draw() -> None:
    rng = np.random.default_rng(1)
    correct = np.repeat(rng.random(40) < 0.5, 8)
    levels = np.repeat(rng.normal(size=40), 8) + correct
    alone = area(judged([*correct], [*range(320)]), levels, draws=200)
    together = area(judged([*correct], [*np.repeat(np.arange(40), 8)]), levels, draws=200)
    assert alone.value == together.value
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_difficulty_is_the_prompts_own_success() -> None:
    bins = difficulty(judged([0, 0, 1, 0, 1, 1], [0, 0, 1, 1, 2, 2]))
    assert [(name, rows.sum()) for name, rows in bins] == [
        ("never right", 2),
        ("1/3 to 2/3", 2),
        ("always right", 2),
    ]
    assert "prompt up to" in difficulty(judged([0, 1], [0, 1]))[0][0]


def test_none_seen_is_not_none_there() -> None:
    found = curve(judged([0] * 20, [*range(20)]), np.full((20, 1), 5, np.int32), draws=50)
    assert found.false[0] == pytest.approx([0.0, 0.0, 1.0 - 0.025 ** (1 / 20)])


def test_none_lost_is_not_none_that_could_be() -> None:
    correct = [1, 0] * 10
    cuts = np.where(np.array(correct) == 0, 5, 0).astype(np.int32)[:, None]
    found = curve(judged(correct, [*range(20)]), cuts, draws=50)
    assert found.false_positive_rate[0] == pytest.approx([0.0, 0.0, 1.0 - 0.025 ** (1 / 10)])


@given(
    st.lists(
        st.tuples(
            st.booleans(), st.integers(0, 3), st.integers(0, 4), st.sampled_from([1.0, 10.0])
        ),
        min_size=1,
        max_size=30,
    )
)
def test_the_area_within_prompts_is_the_share_of_their_own_pairs_in_order(
    rows: list[tuple[bool, int, int, float]],
) -> None:
    """Against counting by hand, with ties and weights."""
    correct, prompts, levels, weights = (list(column) for column in zip(*rows, strict=True))
    won = pairs = 0.0
    for right in (k for k, answer in enumerate(correct) if answer):
        for wrong in (k for k, answer in enumerate(correct) if not answer):
            if prompts[right] == prompts[wrong]:
                pair = weights[right] * weights[wrong]
                pairs += pair
                won += pair * (
                    (levels[right] > levels[wrong]) + (levels[right] == levels[wrong]) / 2
                )
    numbers = np.unique(prompts, return_inverse=True)[1].tolist()
    all_of = judged([int(answer) for answer in correct], numbers, weights)
    found = area_within(all_of, np.array(levels, float), draws=5)
    assert found.value == pytest.approx(won / pairs if pairs else math.nan, nan_ok=True)


def test_a_rule_that_only_knows_the_problem_tells_nothing_within_prompts() -> None:
    """One prompt is nearly always right, the other nearly never: the level is the prompt's."""
    correct, prompts = [1] * 9 + [0] + [0] * 9 + [1], [0] * 10 + [1] * 10
    levels = np.array([1.0] * 10 + [0.0] * 10)
    all_of = judged(correct, prompts)
    assert area(all_of, levels, draws=5).value > 0.85
    assert area_within(all_of, levels, draws=5).value == 0.5


def test_what_is_saved_is_told_at_the_right_ones_lost() -> None:
    """Ten rollouts of ten tokens; the looser threshold saves twice as much and loses 1 of 5."""
    correct = [1] * 5 + [0] * 5
    strict = np.array([0] * 5 + [5] * 2 + [0] * 3)
    loose = np.array([5] + [0] * 4 + [5] * 3 + [0] * 2)
    cuts = np.stack([strict, loose], 1).astype(np.int32)
    found = curve(judged(correct * 10, [*range(100)]), np.tile(cuts, (10, 1)), draws=50)
    assert found.saved_at["0.05"].value == found.saved_at["0.10"].value == found.saved[0, 0]
    assert found.saved[1, 0] == 2 * found.saved[0, 0]
    # A tenth of that has too few right ones for either share: five.
    found = curve(judged(correct, [*range(10)]), cuts, draws=50)
    assert all(math.isnan(saved.value) for saved in found.saved_at.values())


@pytest.mark.parametrize(("prompts", "area_low", "within_low"), [(1, None, None), (3, 0.025, 0.29)])
def test_a_few_prompts_are_not_sure_of_anything(
    prompts: int, area_low: float | None, within_low: float | None
) -> None:
    """All told apart: every resampling says so, too."""
    all_of = judged([1, 0] * 2 * prompts, [*np.repeat(np.arange(prompts), 4)])
    levels = all_of.correct.astype(float)
    for found, low in ((area, area_low), (area_within, within_low)):
        estimate = found(all_of, levels, draws=50)
        assert estimate.value == 1.0
        assert estimate.low == pytest.approx(low or math.nan, abs=0.01, nan_ok=True)
    if prompts == 1:
        cuts = np.where(all_of.correct, 0, 5).astype(np.int32)[:, None]
        assert np.isnan(curve(all_of, cuts, draws=50).saved[0, 1:]).all()
