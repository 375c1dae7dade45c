"""avg@k, pass@k, maj@k and their intervals, against enumeration and simulation."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_rl.evaluate.scores import Graded, majority, pass_at, powers_of_two, score
from espo_rl.record.intervals import ProblemMean, Share, wilson

# -- pass@k ----------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(
    correct: list[bool], data: st.DataObject
) -> None:
    draws = data.draw(st.integers(1, len(correct)))
    subsets = list(combinations(correct, draws))
    expected = sum(map(any, subsets)) / len(subsets)
    assert pass_at(draws, len(correct), sum(correct)) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_exact_for_many_samples() -> None:
    # The product form of the paper's code: 1 - Π (1 - k/i) over i = n-c+1 .. n.
    n, c, k = 1024, 3, 512
    expected = 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))
    assert pass_at(k, n, c) == pytest.approx(expected, rel=1e-12)
    assert (pass_at(k, n, 0), pass_at(k, n, n), pass_at(n, n, 1)) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize(("draws", "samples", "correct"), [(0, 4, 1), (5, 4, 1), (2, 4, 5)])
def test_pass_at_k_of_what_cannot_be(draws: int, samples: int, correct: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at(draws, samples, correct)


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (32, [1, 2, 4, 8, 16, 32])],
)
def test_powers_of_two_end_with_k(k: int, expected: list[int]) -> None:
    assert powers_of_two(k) == expected


# -- maj@k -----------------------------------------------------------------------------------------

RIGHT = "r"
votes = st.lists(st.sampled_from([RIGHT, "x", "y", None]), min_size=1, max_size=7)


def graded(answers: list[str | None]) -> list[Graded]:
    return [Graded(answer == RIGHT, answer) for answer in answers]


@given(votes)
def test_majority_is_the_mean_over_all_orders_of_the_first_to_lead(
    answers: list[str | None],
) -> None:
    """Counter takes the first seen of those that tie; over all orders each comes first as often."""
    taken = []
    for order in permutations([answer for answer in answers if answer is not None]):
        taken.append(bool(order) and Counter(order).most_common(1)[0][0] == RIGHT)
    assert majority(graded(answers)) == pytest.approx(np.mean(taken), abs=1e-12)


def test_a_sample_without_an_answer_does_not_vote() -> None:
    assert majority(graded([None, None, RIGHT])) == 1.0
    assert majority(graded([None, None])) == 0.0


def test_a_tie_is_worth_the_share_of_its_right_answers() -> None:
    assert majority(graded([RIGHT, "x"])) == 0.5
    assert majority(graded([RIGHT, RIGHT, "x", "x", "y"])) == 0.5
    assert majority(graded([RIGHT, "x", "y"])) == pytest.approx(1 / 3)


def test_an_answer_that_the_grader_found_right_once_and_wrong_once_is_half_right() -> None:
    assert majority([Graded(True, "x"), Graded(False, "x"), Graded(False, "y")]) == 0.5


# -- scores of a data set --------------------------------------------------------------------------


def test_scores_are_means_over_problems() -> None:
    scores = score([graded([RIGHT, RIGHT, "x", None]), graded(["x", "x", "y", RIGHT])], k=4)
    assert scores.average.value == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert list(scores.passes) == [1, 2, 4]
    assert scores.passes[1].value == pytest.approx(scores.average.value)
    assert scores.passes[2].value == pytest.approx((1 - 1 / 6 + 1 - 3 / 6) / 2)
    assert scores.passes[4].value == 1.0
    assert scores.majority is not None
    assert scores.majority.value == 0.5
    assert scores.average.problems == 2


def test_what_failed_is_not_counted_as_wrong() -> None:
    scores = score([graded([RIGHT, RIGHT]), graded([RIGHT]), []], k=2)
    assert (scores.average.value, scores.average.problems) == (1.0, 2)
    assert (scores.passes[2].value, scores.passes[2].problems) == (1.0, 1)


def test_no_majority_without_votes() -> None:
    assert score([[Graded(True)]], k=1, votes=False).majority is None


def test_no_problem_at_all_is_unknown() -> None:
    scores = score([[], []], k=2)
    assert math.isnan(scores.average.value)
    assert "unknown" in str(scores.average)


# -- intervals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 32])
@pytest.mark.parametrize(("right", "wrong"), [(2.0, 2.0), (0.3, 0.7), (0.1, 1.9), (1.0, 0.05)])
def test_the_interval_holds_the_accuracy_of_all_problems(
    k: int, right: float, wrong: float
) -> None:
    """Problems of Beta-distributed difficulty: 95 % intervals hold in 95 % of the evaluations."""
    rng = np.random.default_rng(7)
    problems, trials = 100, 1000
    truth, held = right / (right + wrong), 0
    for _ in range(trials):
        values = rng.binomial(k, rng.beta(right, wrong, problems)) / k
        low, high = ProblemMean.of(values.tolist()).interval
        held += low <= truth <= high
    assert 0.92 <= held / trials <= 0.985


def test_samples_of_one_problem_are_not_counted_as_independent() -> None:
    """All samples of a problem agree, so 32 of them tell no more than one."""
    values = [1.0] * 20 + [0.0] * 20
    low, high = ProblemMean.of(values).interval
    plain = Share(20 * 32, 40 * 32).interval
    assert high - low > 4 * (plain[1] - plain[0])
    assert (low, high) == pytest.approx(Share(20, 40).interval, abs=0.01)


def test_weighted_by_their_samples_problems_give_the_share_of_all_samples() -> None:
    shares, samples = [1.0, 0.5, 0.0], [1, 4, 5]
    mean = ProblemMean.of(shares, samples)
    assert mean.value == pytest.approx(3 / 10)
    even = ProblemMean.of(shares, [7] * 3)
    assert even.interval == pytest.approx(ProblemMean.of(shares).interval)
    # Where one has nearly all samples, little is known of others.
    for shares in ([0.0] * 30, [0.2] + [0.0, 1.0] * 7):
        low, high = ProblemMean.of(shares, [1000] + [1] * (len(shares) - 1)).interval
        assert high - low > 0.9


def test_the_interval_of_weighted_shares_holds_that_of_all() -> None:
    """As of audited stops: few of a problem, fewer the easier it is."""
    rng = np.random.default_rng(7)
    problems, trials, held = 100, 1000, 0
    difficulty = rng.beta(0.7, 0.7, 200_000)
    stops, right = 1 + 8 * difficulty, 0.3 * (1 - difficulty)
    truth = float(np.average(right, weights=stops))
    for _ in range(trials):
        drawn = rng.integers(len(difficulty), size=problems)
        counts = rng.poisson(stops[drawn])
        hits = rng.binomial(counts, right[drawn])
        some = counts > 0
        shares = hits[some] / counts[some]
        low, high = ProblemMean.of(shares.tolist(), counts[some].tolist()).interval
        held += low <= truth <= high
    assert 0.92 <= held / trials <= 0.985


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_interval_of_all_or_nothing_has_a_width(value: float) -> None:
    mean = ProblemMean.of([value] * 30)
    low, high = mean.interval
    assert low <= value <= high
    assert 0.05 < high - low < 0.2


def test_equal_values_between_are_no_certainty() -> None:
    low, high = ProblemMean.of([0.1 + 0.2] * 30).interval  # not quite 0.3
    assert (low, high) == pytest.approx(wilson(0.3, 30, 2.045), abs=1e-3)


def test_one_problem_tells_nothing_of_others() -> None:
    assert ProblemMean.of([0.5]).interval == (0.0, 1.0)


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=20))
def test_the_interval_lies_around_the_mean_within_bounds(values: list[float]) -> None:
    mean = ProblemMean.of(values)
    low, high = mean.interval
    assert 0.0 <= low <= mean.value + 1e-9
    assert mean.value - 1e-9 <= high <= 1.0


def test_a_mean_says_what_it_is_of() -> None:
    text = str(ProblemMean.of([0.0, 1.0, 1.0, 1.0]))
    assert text.startswith("75.0% (95 % interval ")
    assert text.endswith("4 problems)")
