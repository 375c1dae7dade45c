"""Graders: is a completion right? Pure functions; `grader_pool.py` runs them.

A grader gives a score in [0, 1]; True is 1 and False is 0. Only a full score counts as right; what
a score is worth stands in `reward.py`.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from decimal import Context, Decimal
from functools import partial
from typing import Any

from espo_rl.config import RecipeError, TaskSection
from espo_rl.tasks.answer_text import USUAL, final_text, plain_numbers
from espo_rl.tasks.gym import gym_dataset
from espo_rl.tasks.math_grader import math, math_answer
from espo_rl.types import Problem

#: completion and problem to a score in [0, 1]
Grader = Callable[[str, Problem], float]
#: completion and problem to the answer given, written alike when equal; None: none is given
AnswerReader = Callable[[str, Problem], str | None]


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

    Numbers are compared as numbers, all else without regard to case, white space, `$`, asterisks
    around it and a full stop at the end.

    >>> regex("The answer is $1,234.00.", "1234", r"answer is (.*)")
    True
    """
    return regex_answer(completion, pattern, tags) == _normal(answer)


def regex_answer(completion: str, pattern: str, tags: TaskSection = USUAL) -> str | None:
    """Group 1 of the pattern's last match, without what `regex` does not regard."""
    matches = list(re.finditer(pattern, final_text(completion, tags)))
    return _normal(matches[-1].group(1) or "") if matches else None


def _normal(text: str) -> str:
    text = re.sub(r"\\?\$(?=[\d.])", "", plain_numbers(" ".join(text.split()).casefold()))
    text = text.strip("*$ ").removesuffix(".").rstrip("*$ ")
    try:
        number = Decimal(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
        # With as many digits as there are: by itself it rounds to 28.
        return str(number.normalize(Context(prec=len(text)))) if number else "0"
    except ArithmeticError:  # no number, or an absurd one
        return text


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
        # float() would read a text's number, too. A sum of tenths is 1 but for its rounding.
        known = score is not None and not isinstance(score, str | bytes)
        rounded = round(float(score), 9) if known else float("nan")
        if not 0.0 <= rounded <= 1.0:
            raise ValueError(f"it returned {score!r}; a bool or a number in [0, 1] is wanted")
        return rounded

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
