"""Tasks: where problems come from, and in what order. Grading is in `graders.py`.

Whatever the kind, no problem kept for evaluation is ever trained on: tasks compare what is asked,
not where it came from.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from espo_rl.types import Problem

log = logging.getLogger(__name__)


class TaskError(ValueError):
    """The problems cannot be had; the message names the recipe's key at fault and what there is."""


class Task(Protocol):
    """A source of problems. The held-out ones never appear among the training ones."""

    def training(self, seed: int) -> Iterator[Problem]:
        """An endless stream of training problems, the same for the same seed."""

    def held_out(self, count: int) -> Sequence[Problem]:
        """The first `count` problems kept for evaluation, always the same ones."""


def fill_template(template: str, text: str) -> str:
    # Not str.format: problems are full of braces.
    return template.replace("{problem}", text)


def did_you_mean(wrong: str, names: Collection[str]) -> str:
    close = [] if wrong in names else difflib.get_close_matches(wrong, names, n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
