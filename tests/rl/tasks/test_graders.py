"""Rewards: is a completion right, and what is that worth?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_rl.config import Recipe, RecipeError, TaskSection
from espo_rl.tasks.graders import exact, make_answer_reader, make_grader, regex
from espo_rl.tasks.kinds import make_task
from espo_rl.tasks.math_grader import math
from espo_rl.tasks.reward import reward
from espo_rl.types import AuditedRight, EndReason, Problem, Rollout


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


# -- math ------------------------------------------------------------------------------------------


def limit(box: str, answer: str, right: bool, reason: str) -> Any:
    """What math-verify gets wrong; shows up here should it learn."""
    return pytest.param(box, answer, right, marks=pytest.mark.xfail(strict=True, reason=reason))


@pytest.mark.parametrize(
    ("box", "answer", "right"),
    [
        # As in GSM8K
        ("18", "18", True),
        ("18.00", "18", True),
        ("$18", "18", True),
        (r"\$18.00", "18", True),
        ("18 dollars", "18", True),
        (r"18\text{ dollars}", "18", True),
        ("18 USD", "18", True),
        ("€18", "18", True),
        ("18.", "18", True),
        ("17", "18", False),
        ("180", "18", False),
        ("1,234", "1234", True),
        ("1234", "1,234", True),
        ("1{,}234", "1234", True),
        (r"1\,234", "1234", True),
        (r"12\!,\!345", "12345", True),
        (r"1\ 234\ 567.5", "1234567.5", True),
        ("1 000 000", "1000000", True),
        ("$1,234.50", "1234.5", True),
        (r"\$70{,}000", "70000", True),
        ("1.234", "1234", False),
        ("12", "1,2", False),
        ("18", "$18$", True),
        ("18", r"\boxed{18}", True),
        ("007", "7", True),
        # Fractions and decimals
        (r"\frac12", "1/2", True),
        (r"\dfrac{1}{2}", "0.5", True),
        ("1/2", r"\frac{1}{2}", True),
        (".5", r"\tfrac{1}{2}", True),
        (r"\frac{2}{4}", r"\frac12", True),
        (r"1\frac{1}{2}", r"\frac32", True),
        (r"-\frac12", r"\frac{-1}{2}", True),
        ("0.33", r"\frac{1}{3}", False),
        (r"\frac{1}{3}", r"\frac12", False),
        # Nested braces, roots and constants
        (r"\sqrt{\frac{1}{4}}", r"\frac12", True),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True),
        (r"\sqrt{12}", r"2\sqrt 3", True),
        (r"\frac{\pi}{2}", r"\pi/2", True),
        (r"\boxed{5}", "5", True),
        (r"\text{18}", "18", True),
        ("3.14", r"\pi", False),
        (r"\binom{5}{2}", "10", True),
        (r"1.5\times10^3", "1500", True),
        ("1e3", "1000", True),
        ("1.5e+3", "1500", True),
        ("-1.5E3", "-1500", True),
        ("1e-3", "0.001", True),
        ("10^{-5}", "1e-05", True),
        ("2e", "2e", True),
        ("2e + 3", "2e+3", True),
        ("6e", "2e3", False),
        ("1 1/2", "3/2", True),
        ("1 1/2", "1", False),
        (r"-1\ 1/2", "-1.5", True),
        ("1.5", "1 1/2", True),
        # Signs
        ("-5", "-5", True),
        ("−5", "-5", True),
        ("–5", "-5", True),
        ("−1,234", "-1234", True),
        ("–1 234", "-1,234", True),
        ("-5", "−5", True),
        ("3–5", "-5", False),
        ("5", "-5", False),
        ("-5", "5", False),
        # Intervals, sets, tuples
        ("[0, 1)", "[0,1)", True),
        ("[0,1]", "[0,1)", False),
        ("(0,1)", "[0,1)", False),
        (r"\left[0,\frac12\right)", r"[0,\frac{1}{2})", True),
        (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)", True),
        (r"x \in [0,1)", "[0,1)", True),
        limit("1<x<2", "(1,2)", True, "chained relations are not made intervals"),
        (r"\{1,2,3\}", r"\{3,2,1\}", True),
        ("3, 2, 1", r"\{1,2,3\}", True),
        (r"\{1,2\}", r"\{1,2,3\}", False),
        (r"x=2 \text{ or } x=-2", "2,-2", True),
        (r"\pm 2", "-2, 2", True),
        ("(1, 2)", r"\left(1,2\right)", True),
        ("(2,1)", "(1,2)", False),
        limit("1, 2", "(1,2)", False, "an unordered list passes for a tuple"),
        # Units, percent, degrees
        (r"5\text{ cm}", "5", True),
        ("5 cm", r"5\text{ cm}", True),
        (r"10\text{ cm}^2", "10", True),
        ("5 apples", "5", True),
        (r"50\%", "50", True),
        ("0.5", r"50\%", True),
        ("0.5", "50", False),
        (r"90^\circ", "90", True),
        ("90°", r"90^{\circ}", True),
        (r"90\text{ degrees}", "90", True),
        ("45°", "90", False),
        limit("10:30 AM", "10:30", True, "AM is no unit"),
        limit("10_2", "10", False, "the base of a number is dropped"),
        # Algebra
        ("x=5", "5", True),
        ("5", "x=5", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("x^2+1", "x^2+2x+1", False),
        ("2x", "2y", False),
        ("2<x", "x>2", True),
        ("x<2", "x>2", False),
        ("4i+3", "3+4i", True),
        ("3:4", "4:3", False),
        ("**5**", "5", True),
        (r"\approx 5", "5", True),
        (r"x \approx 5", "5", True),
        (r"{\bf 5}", "5", True),
        ("₹ 5", "5", True),
        # No value is a part of what stands there.
        (r"\ne 5", "5", False),
        (r"\le 5", "5", False),
        ("2023-01-05", "2023-01-05", True),
        ("2017", "2023-01-05", False),
        # Choices and words
        ("B", "B", True),
        ("b", "B", True),
        ("(B)", "B", True),
        ("B", "(B)", True),
        (r"\textbf{(B)}\ 12", "B", True),
        ("B) 12", r"\text{B}", True),
        ("A", "B", False),
        ("B + 1", "B", False),
        ("12", "B", False),
        (r"\text{Option B}", "B", True),
        (r"\textrm{B}", "B", True),
        (r"\textit{B}", "B", True),
        ("B = 12", "B", True),
        ("A = 12", "B", False),
        ("B", "(B) 12", True),
        ("B", "B: 12", True),
        ("B", "Option B", True),
        ("A", "(B) 12", False),
        ("b", "b", True),
        (r"\text{True}", "true", True),
        ("True", "true", True),
        ("FALSE.", r"\text{False}", True),
        (r"\textbf{Yes}", "yes", True),
        ("true", "false", False),
        (r"\text{East}", "east", True),
        (r"\text{west}", r"\text{east}", False),
        ("no", "yes", False),
        limit("seat", "east", False, "a word is a product of its letters"),
        limit(r"\text{the answer is }5", "5", True, "words in the box"),
        # Space, nothing
        (" \n18 ", "18\n", True),
        (r"\ 18\ ", " 18", True),
        ("", "18", False),
        ("?", "18", False),
    ],
)
def test_math_in_a_box(box: str, answer: str, right: bool) -> None:
    assert math(rf"7 + 11, so \boxed{{{box}}}", answer) is right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"\boxed{17}, no: \boxed{18}", "18", True),
        (r"\boxed{18}, no: \boxed{17}", "18", False),
        (r"\boxed{18} is right and 17 is not", "18", True),
        (r"18 first, but then \boxed{17}", "18", False),
        (r"\fbox{18}", "18", True),
        (r"\boxed {7}", "7", True),
        (r"\fbox {7}", "7", True),
        ("\\boxed\n{7}", "7", True),
        (r"\boxed{}. The answer is 5", "5", False),
        (r"\boxed{?} 5", "5", False),
        (r"\boxed{...} $5$", "5", False),
        ("The answer is −1,234", "-1234", True),
        ("The answer is 1.5e3", "1500", True),
        ("The answer is 1 1/2", "3/2", True),
        ("The answer is 1 1/2", "1", False),
        ("The answer is 2023-01-05", "2023-01-05", True),
        ("True", "true", True),
        ("The answer is **false**.", "false", True),
        ("5 is false, so the answer is true", "true", True),
        ("The answer is not true", "true", False),
        ("The answer is option B", "B", True),
        ("The correct option is B.", "B", True),
        ("The answer is B. Option A is wrong.", "B", True),
        (r"\(B\)", "B", True),
        ("Option B", "(B) 12", True),
        (r"\boxed 5", "5", True),
        (r"\boxed{18", "18", False),
        (r"\boxed", "18", False),
        ("#### 18", "18", True),
        ("The answer is 18", "18", True),
        ("The answer is $18.00", "18", True),
        ("Answer: $34$", "34", True),
        (r"The answer is $\frac{3}{4}$.", r"\frac{3}{4}", True),
        ("First 18. The final answer is $17$.", "18", False),
        ("I get 18, then 20. Answer: 20", "18", False),
        ("she makes $1,234 a day", "1234", True),
        ("The answer is B.", "B", True),
        ("The answer is **(B)**, not A", "B", True),
        ("The answer is A. No: the answer is B", "B", True),
        ("The answer is A.", "B", False),
        ("The answer is a Bear", "B", False),
        ("(B)", "B", True),
        ("A or B", "B", False),
        ("I do not know", "18", False),
        ("", "18", False),
    ],
)
def test_math_in_a_text(completion: str, answer: str, right: bool) -> None:
    assert math(completion, answer) is right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"\boxed{1} and \boxed{2}", "1,2", True),
        (r"$\boxed{2}$ and $\boxed{1}$", "1, 2", True),
        (r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$", r"\{1,2,3\}", True),
        (r"$x = \boxed{1}$ or $x = \boxed{2}$", "1,2", True),
        (r"\boxed{x=1} \text{ or } \boxed{x=2}", "1,2", True),
        ("\\[\\boxed{1}\\]\n\\[\\boxed{2}\\]", "1,2", True),
        (r"**\boxed{-1}** and **\boxed{1}**", r"\pm 1", True),
        (r"\boxed{\frac{1}{2}} and \boxed{\sqrt{2}}", r"\frac12,\sqrt2", True),
        (r"\boxed{(1,2)} and \boxed{(3,4)}", "(1,2),(3,4)", True),
        (r"The first is \boxed{1}. The second is \boxed{2}.", "1,2", True),
        (r"so \boxed{1}; in all \boxed{1,2}", "1,2", True),
        (r"\boxed{1} and \boxed{3}", "1,2", False),
        (r"The first is \boxed{1}. The second is \boxed{3}.", "1,2", False),
        (r"\boxed{1} and \boxed{2}", "1,2,3", False),
        # Two answers where there is one are no answer.
        (r"\boxed{1} and \boxed{2}", "2", False),
        (r"\boxed{5}, so \boxed{5}", "5", True),
        (r"\boxed{5} \boxed{5}", "5", True),
    ],
)
def test_math_in_several_boxes(completion: str, answer: str, right: bool) -> None:
    assert math(completion, answer) is right


def test_a_text_that_repeats_itself_is_read_in_its_time() -> None:
    assert math(r"\boxed{" * 3000 + r"\boxed{5}", "5")
    assert math(r"\boxed{4} and " * 3000 + r"so \boxed{5}", "5")
    assert not math(r"\boxed{5}" + " " * 5000 + r"\boxed{4}", "5")
    assert not math(rf"\boxed{{{'1' * 5000} 1/2}}", "5")


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
    "<think>a <think>b</think> still thinking 5": None,
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


def test_math_knows_gsm8ks_own_answers() -> None:
    rows = (Path(__file__).parents[2] / "data" / "gsm8k_excerpt.jsonl").read_text().splitlines()
    answers = [json.loads(row)["answer"] for row in rows]
    for answer in answers:
        given = rf"so it is \boxed{{{int(answer):,}}}"
        assert [math(given, other) for other in answers] == [other == answer for other in answers]


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


# -- rewards ---------------------------------------------------------------------------------------


def rollout(end: EndReason, tokens: int, **fields: Any) -> Rollout:
    none = np.zeros(tokens)
    return Rollout(problem(), [1], [1] * tokens, none, none, "", end, kept=tokens, **fields)


def recipe(**ppo: Any) -> Recipe:
    settings = {"model": {"path": "x"}, "rollout": {"max_tokens": 100}, "ppo": ppo}
    return Recipe.model_validate({**settings, "stopping": {"failure_reward": -3.0}})


@pytest.mark.parametrize(("score", "worth"), [(1.0, 2.0), (0.0, -1.0), (0.5, 0.5)])
@pytest.mark.parametrize("end", [EndReason.COMPLETED, EndReason.LENGTH])
def test_a_score_lies_between_wrong_and_right(end: EndReason, score: float, worth: float) -> None:
    assert reward(rollout(end, 100), score, recipe(right_reward=2.0, wrong_reward=-1.0)) == worth


@pytest.mark.parametrize("score", [None, 0.0, 0.9])
def test_a_stopped_rollout_has_failed(score: float | None) -> None:
    stopped = rollout(EndReason.EARLY_STOP, 99, audited=score is not None, correct=False)
    assert reward(stopped, score, recipe(overlong_buffer=20)) == -3.0


def test_one_that_an_audit_found_right_is_worth_what_it_is_worth() -> None:
    """Whole, so that it is what its reward is of: no -1 for what is known to be right."""
    stopped = rollout(EndReason.EARLY_STOP, 95, audited=True, correct=True)
    stopped.kept = 50
    whole = rollout(EndReason.COMPLETED, 95, correct=True)
    settings = recipe(overlong_buffer=20, right_reward=2.0)
    assert reward(stopped, 1.0, settings) == reward(whole, 1.0, settings) == 2.0 - 15 / 20


@pytest.mark.parametrize(
    ("audited_right", "worth", "trained"),
    [("whole", 1.0, 95), ("cut", 1.0, 50), ("failed", -3.0, 50)],
)
def test_what_an_audit_found_right_can_be_cut_or_a_failure(
    audited_right: AuditedRight, worth: float, trained: int
) -> None:
    stopped = rollout(EndReason.EARLY_STOP, 95, audited=True, correct=True)
    stopped.kept, stopped.audited_right = 50, audited_right
    assert reward(stopped, 1.0, recipe()) == worth
    assert stopped.trained == trained


@given(
    length=st.integers(1, 100),
    buffer=st.integers(0, 100),
    score=st.floats(0, 1),
)
def test_the_overlong_penalty_is_dapos(length: int, buffer: int, score: float) -> None:
    """Equation 13 of arXiv 2503.14476, case by case."""
    penalty = 0.0 if length <= 100 - buffer else ((100 - buffer) - length) / buffer
    plain = reward(rollout(EndReason.COMPLETED, length), score, recipe())
    settings = recipe(overlong_buffer=buffer)
    end = EndReason.LENGTH if length == 100 else EndReason.COMPLETED
    found = reward(rollout(end, length), score, settings)
    assert found == pytest.approx(plain + penalty)
    assert found >= plain - 1.0


def test_a_rollout_cut_by_length_pays_the_whole_penalty() -> None:
    settings = recipe(overlong_buffer=20)
    assert reward(rollout(EndReason.LENGTH, 100), 0.0, settings) == -2.0
    assert reward(rollout(EndReason.COMPLETED, 90), 1.0, settings) == 0.5
    assert reward(rollout(EndReason.COMPLETED, 80), 1.0, settings) == 1.0
