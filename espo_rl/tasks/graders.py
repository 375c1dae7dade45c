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
from collections.abc import Callable, Mapping
from decimal import Context, Decimal
from typing import Any

from espo_rl.config import RecipeError, TaskSection
from espo_rl.tasks.gym import gym_dataset
from espo_rl.types import Problem

#: completion and problem to a score in [0, 1]
Grader = Callable[[str, Problem], float]
#: completion and problem to the answer given, written alike when equal; None: none is given
AnswerReader = Callable[[str, Problem], str | None]


def exact(completion: str, answer: str) -> bool:
    """Whether what follows the last `#` (all of it when there is none) is the answer.

    >>> exact("c3+8=1#581", "581")
    True
    """
    return exact_answer(completion) == answer.strip()


def exact_answer(completion: str) -> str:
    """What follows the last `#`; all of it when there is none."""
    return completion.rpartition("#")[2].strip()


def regex(completion: str, answer: str, pattern: str) -> bool:
    """Whether group 1 of the pattern's last match is the answer.

    Numbers are compared as numbers, all else without regard to case, white space, `$` and a full
    stop at the end.

    >>> regex("The answer is $1,234.00.", "1234", r"answer is (.*)")
    True
    """
    return regex_answer(completion, pattern) == _normal(answer)


def regex_answer(completion: str, pattern: str) -> str | None:
    """Group 1 of the pattern's last match, without what `regex` does not regard."""
    matches = list(re.finditer(pattern, completion))
    return _normal(matches[-1].group(1) or "") if matches else None


def _normal(text: str) -> str:
    text = " ".join(text.split()).casefold().strip("$ ").removesuffix(".").rstrip("$ ")
    try:
        number = Decimal(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
        # With as many digits as there are: by itself it rounds to 28.
        return str(number.normalize(Context(prec=len(text)))) if number else "0"
    except ArithmeticError:  # no number, or an absurd one
        return text


def math(completion: str, answer: str) -> bool:
    """Whether math-verify finds the completion's answer equal to the reference's.

    The last `\\boxed{}` counts where there is one, as in the usual prompts for reasoning models. A
    reference that is one capital letter is a choice: `(B)`, `B) 12`, "the answer is B" are right.
    May take for ever on an absurd answer: for a process that can be killed.
    """
    from math_verify import verify

    if choice := _CHOICE.fullmatch(answer):
        return choice.group(1) == _chosen(completion)
    return bool(verify(_parsed(f"${answer}$"), _parsed(completion), timeout_seconds=None))


def math_answer(completion: str, answer: str) -> str | None:
    """What `math` compares with the reference: sympy's writing of it, or a choice's letter."""
    if _CHOICE.fullmatch(answer):
        return _chosen(completion)
    parsed = _parsed(completion)
    return str(parsed[0]) if parsed else None


def _parsed(completion: str) -> list[Any]:
    """The last box's value, or else the last there is; as sympy has it, then as it is written."""
    from math_verify import parse

    # It warns that its timeouts are off. They use SIGALRM, which is for main threads alone.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    boxes = list(_BOXED.finditer(completion))
    given = completion[boxes[-1].start() :] if boxes else completion
    return list(parse(_tidy(given), parsing_timeout=None))


_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
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

    As its own evaluation does: the last `<answer>...</answer>` counts, else all of the text; what
    stands before `</think>` does not. A scorer that chokes on an answer has found it wrong.
    """
    from reasoning_gym.utils import extract_answer

    text = completion.rpartition("</think>")[2]
    answer = extract_answer(text)
    try:
        return float(data.score_answer(text.strip() if answer is None else answer, row))
    except Exception:
        return 0.0


def make_grader(config: TaskSection) -> Grader:
    """The grader that a recipe names.

    Raises:
        RecipeError: `task.grader` is no built-in, cannot be imported, or does not take
            (completion, answer, extra).
    """
    match config.grader:
        case "exact":
            return lambda completion, problem: exact(completion, problem.answer)
        case "math":
            import math_verify  # noqa: F401 (takes a second, which is not the first answer's)

            return lambda completion, problem: math(completion, problem.answer)
        case "regex":
            pattern = config.pattern or ""
            return lambda completion, problem: regex(completion, problem.answer, pattern)
        case "task":
            data = gym_dataset(config)
            return lambda completion, problem: task_score(completion, problem.extra, data)
    function = _import(config.grader)

    def grade(completion: str, problem: Problem) -> float:
        score = function(completion, problem.answer, problem.extra)
        if inspect.iscoroutine(score):
            score = asyncio.run(score)
        if score is None or not 0.0 <= float(score) <= 1.0:
            raise ValueError(f"it returned {score!r}; a bool or a number in [0, 1] is wanted")
        return float(score)

    return grade


def make_answer_reader(config: TaskSection) -> AnswerReader | None:
    """How the recipe's grader reads an answer, for majority votes; None where only it knows."""
    match config.grader:
        case "exact":
            return lambda completion, problem: exact_answer(completion) or None
        case "math":
            return lambda completion, problem: math_answer(completion, problem.answer)
        case "regex":
            pattern = config.pattern or ""
            return lambda completion, problem: regex_answer(completion, pattern) or None
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
    except TypeError as error:
        raise RecipeError(
            f"task.grader = {name!r} must be a function of (completion: str, answer: str, extra: "
            f"Mapping): {error}"
        ) from error
    return function


BUILT_IN = ("exact", "math", "regex", "task")
