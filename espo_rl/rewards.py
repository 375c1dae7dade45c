"""Rewards: is a completion right? A grader is a pure function of the text and the answer."""

from __future__ import annotations

import re
from collections.abc import Callable

Grader = Callable[[str, str], bool]

_BOXED = re.compile(r"\\boxed\s*\{")


def exact(completion: str, answer: str) -> bool:
    """Whether what follows the last `#` (all of it when there is none) is the answer.

    >>> exact("c3+8=1#581", "581")
    True
    """
    return completion.rpartition("#")[2].strip() == answer.strip()


def math(completion: str, answer: str) -> bool:
    """Whether math-verify finds the completion's answer equal to the reference's.

    The last `\\boxed{}` counts where there is one, as in the usual prompts for reasoning models.
    """
    from math_verify import parse, verify

    boxes = list(_BOXED.finditer(completion))
    given = completion[boxes[-1].start() :] if boxes else completion
    # math-verify's own timeouts use SIGALRM, which would break into the event loop.
    gold = parse(f"${answer}$", parsing_timeout=None)
    return bool(verify(gold, parse(given, parsing_timeout=None), timeout_seconds=None))


GRADERS: dict[str, Grader] = {"exact": exact, "math": math}
