"""Graders: is a completion right? Those of `math` are in `test_math_grader.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from espo_rl.config import RecipeError, TaskSection
from espo_rl.tasks.graders import exact, make_answer_reader, make_grader, regex
from espo_rl.tasks.kinds import make_task
from espo_rl.tasks.math_grader import math
from espo_rl.types import Problem


def problem(answer: str = "18", **extra: Any) -> Problem:
    return Problem(id="1", prompt="?", answer=answer, extra=extra)


# -- exact and regex -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("the total is #42", "42", True),
        ("#41 no, #42", "42", True),
        ("42", "42", True),
        ("#42 or so", "42", False),
        ("", "42", False),
    ],
)
def test_exact(completion: str, answer: str, right: bool) -> None:
    assert exact(completion, answer) is right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("answer: 18", "18", True),
        ("answer: 17, no, answer: 18", "18", True),
        ("answer: 18, no, answer: 17", "18", False),
        ("answer: $1,234.00.", "1234", True),
        ("answer: 1234", "$1,234", True),
        ("answer: 12,34", "1234", False),
        ("answer:  New   York\n", "new york", True),
        ("answer: -5", "5", False),
        ("answer: 0.5", ".50", True),
        ("answer: −5", "-5", True),
        ("answer: -$5", "-5", True),
        (r"answer: -\$1,234.50", "-1234.5", True),
        ("answer: **5.**", "5", True),
        ("answer: 1 234", "1234", True),
        ("answer: 5%", "5", False),
        ("18", "18", False),
        ("answer: ", "18", False),
        ("", "18", False),
    ],
)
def test_regex(completion: str, answer: str, right: bool) -> None:
    assert regex(completion, answer, r"answer:([^:\n]*)(?:, no|$)") is right


def test_a_group_that_took_no_part_is_no_answer() -> None:
    assert regex("none", "18", "none|(18)") is False


# -- reasoning models ------------------------------------------------------------------------------

#: what a model writes around 5, its thought, and 6, its answer; None: it has given none
THOUGHTS = {
    "<think>5</think> The answer is 6": "6",
    "5</think>\n\nThe answer is 6": "6",  # the prompt has opened it
    "<think>\n\n</think>\n\nThe answer is 6": "6",
    "<think>5</think>No.<think>5</think>The answer is 6": "6",
    "<think>5</think><answer>6</answer>": "6",
    "<think><answer>5</answer></think><answer>5</answer><answer> 6 </answer> not 5": "6",
    "The answer is 6": "6",
    "<think>5": None,
    "The answer is 6 <think>The answer is 5": None,
    "<think>5</think>": None,
    "<think>5</think> <think>The answer is 5": None,
    "<THINK>5</Think> The answer is 6": "6",
    "<THINK>5": None,
    "<think>They want <think> tags.</think> The answer is 6": "6",
    "<think>a <think>5</think> b</think> The answer is 6": "6",
    # the prompt has opened it, and the model once more
    "<think>\n<think>\n5</think> The answer is 6": "6",
    "<think>5</think><ANSWER>6</Answer>": "6",
    " 6</answer> not 5": "6",  # the prompt has opened it
}


def in_words(grader: str, text: str) -> str:
    """The same, in the way in which a grader wants an answer."""
    answers = {"exact": "#{}", "math": r"\boxed{{{}}}", "regex": "answer: {}"}
    for number in "56":
        text = text.replace(number, answers[grader].format(number))
    return text.replace("The answer is ", "")


@pytest.mark.parametrize("grader", ["exact", "math", "regex"])
@pytest.mark.parametrize(("text", "given"), THOUGHTS.items())
@pytest.mark.parametrize("tags", [None, ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷")])
def test_thoughts_are_not_graded(
    grader: str, text: str, given: str | None, tags: tuple[str, str] | None
) -> None:
    task: dict[str, Any] = {"grader": grader, "pattern": r"answer: (\d)"}
    text = in_words(grader, text)
    if tags is not None:
        task["thought_tags"] = [tags]
        for usual, tag in zip(("<think>", "</think>"), tags, strict=True):
            text = text.replace(usual, tag)
            text = text.replace(usual.upper(), tag.upper()).replace(usual.title(), tag.title())
    grade = make_grader(TaskSection(**task))
    assert [grade(text, problem(answer)) for answer in "56"] == [given == "5", given == "6"]
    read = make_answer_reader(TaskSection(**task))
    assert read is not None
    assert read(text, problem("7")) == given


def test_thoughts_in_math() -> None:
    text = r"<think>\boxed{5}</think> The answer is 6"
    assert [math(text, answer) for answer in "56"] == [False, True]
    assert not math(r"<think>so it is \boxed{5}", "5")
    assert [math("<think>(A)</think>The answer is B", one) for one in "AB"] == [False, True]


def test_without_tags_all_of_a_text_counts() -> None:
    task = TaskSection(grader="math", thought_tags=[], answer_tags=[])
    assert make_grader(task)(r"<think>\boxed{5}", problem("5")) == 1.0


# -- a task's own ----------------------------------------------------------------------------------


def gym(name: str) -> TaskSection:
    return TaskSection(kind="reasoning-gym", name=name, grader="task")


@pytest.mark.parametrize(
    "name", ["chain_sum", "countdown", "sokoban", "rubiks_cube", "prime_factorization"]
)
def test_a_gyms_scorer(name: str) -> None:
    grade, asked = make_grader(gym(name)), make_task(gym(name)).held_out(3)
    for one in asked:
        row = one.extra
        answer = row["answer"] or row["metadata"].get("example_correct_answer")
        assert (
            grade(f"<think>perhaps <answer>x</answer></think>\n<answer> {answer}</answer>", one)
            == 1
        )
        assert grade(f"<think>perhaps x</think>{answer}\n", one) == 1
        # prime_factorization's raises on it
        assert grade("<answer>nonsense</answer>", one) < 1
        assert grade("", one) < 1


def test_a_gyms_partial_credit() -> None:
    grade = make_grader(gym("chain_sum"))
    (one,) = make_task(gym("chain_sum")).held_out(1)
    assert 0.0 < grade(f"<answer>it is {one.answer}</answer>", one) < 1.0
    assert grade(f"<answer>{one.answer}</answer> or <answer>{one.answer}9</answer>", one) < 1.0


# -- a user's own ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "scores"),
    [
        ("right", (1.0, 0.0)),
        ("right_later", (1.0, 0.0)),
        ("right_as_numpy", (1.0, 0.0)),
        ("half", (0.5, 0.5)),
        ("from_the_row", (0.25, 0.25)),
        # Full marks and a third, but for rounding: no wrong answer, no score out of range
        ("ten_tenths", (1.0, 0.0)),
        ("three_thirds", (1.0, 0.3)),
    ],
)
def test_a_users_function(function: str, scores: tuple[float, float]) -> None:
    grade = make_grader(TaskSection(grader=f"tests.helpers.user_graders:{function}"))
    given = problem("18", worth=0.25)
    assert (grade("18", given), grade("17", given)) == scores
    assert type(grade("18", given)) is float


def test_an_asynchronous_one_keeps_its_loop() -> None:
    """A client that it keeps from grade to grade belongs to the loop that it was first used on."""
    for function in ("with_a_client", "by_a_future"):
        grade = make_grader(TaskSection(grader=f"tests.helpers.user_graders:{function}"))
        given = [grade(text, problem("18")) for text in ("18", "17", "18", "18")]
        assert given == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("function", ["none", "two", "nan", "one_as_text", "one_as_bytes"])
def test_a_score_out_of_range_is_refused(function: str) -> None:
    with pytest.raises(ValueError, match=r"returned (None|2|nan|b?'1').*\[0, 1\]"):
        make_grader(TaskSection(grader=f"tests.helpers.user_graders:{function}"))("18", problem())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", r"task\.grader = 'maths'.*exact, math, regex, task.*package\.module:function"),
        ("no_such_module:right", r"task\.grader .*cannot be imported.*no_such_module"),
        ("tests.helpers.user_graders:rihgt", r"task\.grader .*cannot be imported.*rihgt"),
        (
            "tests.helpers.user_graders:one_argument",
            r"task\.grader .*completion: str, answer: str, extra",
        ),
        (
            "tests.helpers.user_graders:A_CONSTANT",
            r"task\.grader .*completion: str, answer: str, extra",
        ),
        ("builtins:max", r"task\.grader .*completion: str, answer: str, extra"),
    ],
)
def test_a_function_that_cannot_grade(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_grader(TaskSection(grader=name))


def test_a_module_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_grader.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"broken_grader:grade.*RuntimeError: no licence"):
        make_grader(TaskSection(grader="broken_grader:grade"))


def test_a_module_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the console script starts: its own folder is on the path, not this one."""
    (tmp_path / "my_grader.py").write_text("def grade(completion, answer, extra): return True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert make_grader(TaskSection(grader="my_grader:grade"))("", problem()) == 1.0
