"""The answers that vote: what is read from a sample, and when two are the same."""

from __future__ import annotations

from typing import Any

import pytest

from espo_rl.config import TaskSection
from espo_rl.tasks.graders import make_answer_reader
from espo_rl.tasks.math_grader import math_answer
from espo_rl.types import Problem


def read(text: str, reference: str = "1", **task: Any) -> str | None:
    reader = make_answer_reader(TaskSection(**task))
    assert reader is not None
    return reader(text, Problem(id="", prompt="", answer=reference))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"so \boxed{\frac{2}{4}}", r"\boxed{0.5}"),
        (r"\boxed{x+1}", r"\boxed{1 + x}"),
        (r"\boxed{1,000}", "the answer is 1000."),
        (r"\boxed{3} no, \boxed{4}", r"\fbox{4}"),
    ],
)
def test_equal_answers_are_written_alike(one: str, other: str) -> None:
    assert math_answer(one, "1") == math_answer(other, "1") is not None


def test_unequal_answers_are_not() -> None:
    assert math_answer(r"\boxed{4}", "1") != math_answer(r"\boxed{5}", "1")


def test_of_a_choice_the_letter_votes() -> None:
    assert read(r"3 of 4, so \boxed{(b)}", "A", grader="math") == "B"
    assert read("3 of 4, so the answer is C", "A", grader="math") == "C"
    assert read(r"\boxed{\text{Option C}}", "(A) 12", grader="math") == "C"


def test_of_a_truth_the_word_votes() -> None:
    for text in (r"\boxed{\text{True}}", "TRUE", "So the answer is **true**."):
        assert read(text, "false", grader="math") == "true"


def test_no_answer() -> None:
    assert read("nothing here", grader="math") is None
    assert read("nothing here", "A", grader="math") is None
    assert read("1+2#", grader="exact") is None
    assert read("it is not", grader="regex", pattern=r"is (\d+)") is None


def test_a_pattern_reads_the_last_match_and_numbers_as_numbers() -> None:
    task = {"grader": "regex", "pattern": r"is (\S+)"}
    assert read("it is 3, no, it is 1,000.50", **task) == read("is $1000.5", **task) == "1000.5"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0", "-0.00", True),
        ("1e3", "1000", True),
        ("1" * 40, "1" * 39 + "2", False),
        ("1e999999999", "1E999999999", True),
        ("1e999999999", "1e999999998", False),
        ("snan", "7", False),
    ],
)
def test_numbers_are_compared_to_their_last_digit(one: str, other: str, same: bool) -> None:
    task = {"grader": "regex", "pattern": r"is (\S+)"}
    assert (read(f"is {one}", **task) == read(f"is {other}", **task)) is same


def test_of_a_grader_of_ones_own_nothing_is_known() -> None:
    assert make_answer_reader(TaskSection(grader="some.module:function")) is None
