"""Graders: is a completion right? Pure functions; `grader_pool.py` runs them.

A grader gives a score in [0, 1]; True is 1 and False is 0. Only a full score counts as right; what
a score is worth stands in `reward.py`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Context, Decimal
from functools import partial
from typing import Any, NamedTuple

from espo_rl.config import RecipeError, TaskSection
from espo_rl.tags import read_tags
from espo_rl.tasks.gym import gym_dataset
from espo_rl.types import Problem

#: completion and problem to a score in [0, 1]
Grader = Callable[[str, Problem], float]
#: completion and problem to the answer given, written alike when equal; None: none is given
AnswerReader = Callable[[str, Problem], str | None]


#: the usual tags of thoughts and answers
USUAL = TaskSection()


def final_text(completion: str, tags: TaskSection = USUAL) -> str:
    """The part of a completion that answers, as reasoning models write it.

    What follows the last thought, nothing where one is still open; of that what stands in the last
    answer tags, where there are any. A prompt may have opened either.

    >>> final_text("<think>5?</think> No: <answer>6</answer>")
    '6'
    """
    opened, text = read_tags(completion, tags.thought_tags)
    if opened:
        return ""
    for opening, close in tags.answer_tags:
        *closed, _ = re.split(re.escape(close), text, flags=re.IGNORECASE)
        if closed:
            text = re.split(re.escape(opening), closed[-1], flags=re.IGNORECASE)[-1]
    return text


def exact(completion: str, answer: str, tags: TaskSection = USUAL) -> bool:
    """Whether what follows the last `#` (all of it when there is none) is the answer.

    >>> exact("c3+8=1#581", "581")
    True
    """
    return exact_answer(completion, tags) == answer.strip()


def exact_answer(completion: str, tags: TaskSection = USUAL) -> str:
    """What follows the last `#`; all of it when there is none."""
    return final_text(completion, tags).rpartition("#")[2].strip()


def regex(completion: str, answer: str, pattern: str, tags: TaskSection = USUAL) -> bool:
    """Whether group 1 of the pattern's last match is the answer.

    Numbers are compared as numbers, all else without regard to case, white space, `$` and a full
    stop at the end.

    >>> regex("The answer is $1,234.00.", "1234", r"answer is (.*)")
    True
    """
    return regex_answer(completion, pattern, tags) == _normal(answer)


def regex_answer(completion: str, pattern: str, tags: TaskSection = USUAL) -> str | None:
    """Group 1 of the pattern's last match, without what `regex` does not regard."""
    matches = list(re.finditer(pattern, final_text(completion, tags)))
    return _normal(matches[-1].group(1) or "") if matches else None


def _normal(text: str) -> str:
    text = " ".join(text.split()).casefold().strip("$ ").removesuffix(".").rstrip("$ ")
    try:
        number = Decimal(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
        # With as many digits as there are: by itself it rounds to 28.
        return str(number.normalize(Context(prec=len(text)))) if number else "0"
    except ArithmeticError:  # no number, or an absurd one
        return text


def math(completion: str, answer: str, tags: TaskSection = USUAL) -> bool:
    """Whether math-verify finds the completion's answer equal to the reference's.

    The last `\\boxed{}` counts where there is one, as in the usual prompts for reasoning models. A
    reference that is one capital letter is a choice: `(B)`, `B) 12`, "the answer is B" are right.
    May take for ever on an absurd answer: for a process that can be killed.
    """
    from math_verify import verify

    text = final_text(completion, tags)
    if choice := _CHOICE.fullmatch(answer):
        return choice.group(1) == _chosen(text)
    reference = _parsed(f"${answer}$")
    if verify(reference, _parsed(_given(text)), timeout_seconds=None):
        return True
    # A reference of several values may be answered in as many boxes, with words between them.
    parts = len(getattr(reference[0], "args", ())) if _is_list(reference) else 0
    boxes = list(dict.fromkeys(box.text for box in _boxes(text)))[-parts:]
    given = _parsed(_one_box(boxes)) if 1 < parts == len(boxes) else []
    return bool(verify(reference, given, timeout_seconds=None))


def math_answer(completion: str, answer: str, tags: TaskSection = USUAL) -> str | None:
    """What `math` compares with the reference: sympy's writing of it, or a choice's letter."""
    text = final_text(completion, tags)
    if _CHOICE.fullmatch(answer):
        return _chosen(text)
    parsed = _parsed(_given(text))
    return str(parsed[0]) if parsed else None


def _parsed(text: str) -> list[Any]:
    """The value that math-verify finds in a text; as sympy has it, then as it is written."""
    from math_verify import parse

    # It warns that its timeouts are off. They use SIGALRM, which is for main threads alone.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return list(parse(_tidy(text), parsing_timeout=None))


def _is_list(parsed: list[Any]) -> bool:
    return bool(parsed) and type(parsed[0]).__name__ == "FiniteSet"


def _given(text: str) -> str:
    """The last box, or the last several where only a comma or an "and" parts them; else all."""
    boxes = _boxes(text)
    if not boxes:
        return text
    start = len(boxes) - 1
    while start and _BETWEEN.fullmatch(text[boxes[start - 1].end : boxes[start].start][:40]):
        start -= 1
    together = list(dict.fromkeys(box.text for box in boxes[start:]))
    return text[boxes[-1].start :] if len(together) == 1 else _one_box(together)


def _one_box(values: Sequence[str]) -> str:
    return r"$\boxed{" + ", ".join(values) + "}$"


class Box(NamedTuple):
    """A `\\boxed{}` in a text: from where to where, and what is in it."""

    start: int
    end: int
    text: str


def _boxes(text: str) -> list[Box]:
    """The last boxes of a text, those inside of others left out."""
    boxes: list[Box] = []
    for match in list(_BOXED.finditer(text))[-MOST_BOXES:]:
        if boxes and match.start() < boxes[-1].end:
            continue
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += 0 if text[end - 1] == "\\" else {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:  # never closed
            end = match.end()
        boxes.append(Box(match.start(), end, text[match.end() : end - 1].strip()))
    return boxes


#: as many answers as anyone gives; a text that repeats itself has thousands
MOST_BOXES = 64
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN = re.compile(
    r"[\s$*,;&()\\]*(?:\\?text\s*\{)?\s*(?:,|;|and|or)?\s*\}?[\s$*,;&()\\]*(?:[A-Za-z]\w?\s*=\s*)?"
)
_WRAP = r"[\s$(*]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{[\s(]*)?"
_CHOICE = re.compile(_WRAP + r"([A-Z])[\s$).*}]*")
_BOXED_CHOICE = re.compile(_BOXED.pattern + _WRAP + r"([A-Za-z])\s*[).:}$]")
_STATED_CHOICE = re.compile(r"(?i:answer(?:\s+is)?)\s*:?" + _WRAP + r"([A-Z])(?![\w'])")


def _chosen(completion: str) -> str | None:
    boxes = list(_BOXED.finditer(completion))
    if boxes:
        match = _BOXED_CHOICE.match(completion, boxes[-1].start())
        return match and match.group(1).upper()
    matches = list(_STATED_CHOICE.finditer(completion))
    match = matches[-1] if matches else _CHOICE.fullmatch(completion)
    return match and match.group(1)


def _tidy(text: str) -> str:
    """Spellings that math-verify does not know, in those that it does."""
    text = text.replace(r"\fbox", r"\boxed").replace("°", r"^\circ ")
    text = re.sub(r"[€£¥](?=\s*\d)|(?<=\d)\s*(?:dollars|euros|pounds|USD|EUR|GBP)\b", "", text)
    text = _SPACED_NUMBER.sub(lambda number: re.sub(r"\D", "", number.group()), text)
    return re.sub(r"(?<=\d)\.(?=\s*\})", "", text)


# Thousands apart by a space, of TeX or Unicode: 1\,000\,000
_SPACED_NUMBER = re.compile(
    r"(?<![\d.])[1-9]\d{0,2}(?:(?:\\[,!: ]|[~ \u00a0\u2009\u202f])\d{3})+(?!\d)"
)


def task_score(completion: str, row: Mapping[str, Any], data: Any) -> float:
    """What a reasoning-gym data set's own scorer gives; in [0, 1], partial credit included.

    A scorer that chokes on an answer has found it wrong.
    """
    try:
        score = float(data.score_answer(completion.strip(), row))
    except Exception:
        return 0.0
    return score if 0.0 <= score <= 1.0 else 0.0


def make_grader(config: TaskSection) -> Grader:
    """The grader that a recipe names.

    Raises:
        RecipeError: `task.grader` is no built-in, cannot be imported, or does not take
            (completion, answer, extra).
    """
    grade: Callable[..., bool]
    match config.grader:
        case "exact":
            grade = partial(exact, tags=config)
        case "math":
            import math_verify  # noqa: F401 (takes a second, which is not the first answer's)

            grade = partial(math, tags=config)
        case "regex":
            grade = partial(regex, pattern=config.pattern or "", tags=config)
        case "task":
            data = gym_dataset(config)
            return lambda completion, problem: task_score(
                final_text(completion, config), problem.extra, data
            )
        case _:
            return _users(config.grader)
    return lambda completion, problem: grade(completion, problem.answer)


def _users(name: str) -> Grader:
    """A function of the user's, asynchronous or not."""
    function = _import(name)
    # What it keeps from one grade to the next, such as a client, belongs to this one's loop.
    runner = asyncio.Runner()

    def grade(completion: str, problem: Problem) -> float:
        score = function(completion, problem.answer, problem.extra)
        if inspect.isawaitable(score):
            score = runner.run(_awaited(score))
        # float() would read a text's number, too.
        if score is None or isinstance(score, str | bytes) or not 0.0 <= float(score) <= 1.0:
            raise ValueError(f"it returned {score!r}; a bool or a number in [0, 1] is wanted")
        return float(score)

    return grade


async def _awaited(score: Awaitable[Any]) -> Any:
    return await score


def make_answer_reader(config: TaskSection) -> AnswerReader | None:
    """How the recipe's grader reads an answer, for majority votes; None where only it knows."""
    match config.grader:
        case "exact":
            return lambda completion, _: exact_answer(completion, config) or None
        case "math":
            return lambda completion, problem: math_answer(completion, problem.answer, config)
        case "regex":
            pattern = config.pattern or ""
            return lambda completion, _: regex_answer(completion, pattern, config) or None
    return None


def _import(name: str) -> Callable[..., Any]:
    if ":" not in name:
        raise RecipeError(
            f"task.grader = {name!r}: give one of {', '.join(BUILT_IN)}, or a function of yours as "
            '"package.module:function"'
        )
    # The console script, unlike python -m, does not look in the working folder.
    if (here := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:  # whatever importing a user's module may raise
        raise RecipeError(
            f"task.grader = {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    try:
        inspect.signature(function).bind("completion", "answer", {})
    except (TypeError, ValueError) as error:  # ValueError: nobody knows what a built-in takes
        raise RecipeError(
            f"task.grader = {name!r} must be a function of (completion: str, answer: str, extra: "
            f"Mapping): {error}"
        ) from error
    return function


BUILT_IN = ("exact", "math", "regex", "task")
