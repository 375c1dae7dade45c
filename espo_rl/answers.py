"""The answer that a completion gives, in a normal form in which equal answers look the same.

For majority votes; whether an answer is right is the graders' business, and these read a completion
as the graders of the same name do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from espo_rl.config import TaskSection

#: None: the completion gives no answer.
AnswerOf = Callable[[str], str | None]


def answer_reader(config: TaskSection) -> AnswerOf | None:
    """How the task's grader reads an answer; None where only the grader knows."""
    if config.grader == "regex":
        assert config.pattern is not None
        return partial(after_pattern, re.compile(config.pattern))
    return {"exact": after_hash, "math": mathematical}.get(config.grader)


def after_hash(completion: str) -> str | None:
    """What follows the last `#`; all of it when there is none.

    >>> after_hash("c3+8=1#581")
    '581'
    """
    return completion.rpartition("#")[2].strip() or None


def after_pattern(pattern: re.Pattern[str], completion: str) -> str | None:
    """Group 1 of the pattern's last match."""
    matches = list(pattern.finditer(completion))
    return (matches[-1].group(1) or "").strip() or None if matches else None


_BOXED = re.compile(r"\\boxed\s*\{")


def mathematical(completion: str) -> str | None:
    """What math-verify makes of the completion, written out by sympy.

    >>> mathematical(r"\\boxed{\\frac{2}{4}}") == mathematical(r"\\boxed{0.5}")
    True
    """
    from math_verify import parse

    boxes = list(_BOXED.finditer(completion))
    parsed = parse(completion[boxes[-1].start() :] if boxes else completion, parsing_timeout=None)
    return str(parsed[0]).strip() or None if parsed else None
