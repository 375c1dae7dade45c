"""Tasks: where problems come from. A problem is a prompt text and the answer a reward compares with.

Owns the order of the training problems, nothing else; grading lives in `rewards.py`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """One problem of a task."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Arithmetic:
    """Running totals modulo 100 with every step written out: few steps are easy, many are hard.

    `07+58-12` is answered by `07+58=65;65-12=53;#53`. One wrong digit carries through to the
    answer, so a trajectory fails at a definite token: what early stopping is to find.
    """

    min_steps: int = 2
    max_steps: int = 16

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem; the number of steps is uniform in [min_steps, max_steps]."""
        steps = rng.randint(self.min_steps, self.max_steps)
        numbers = [rng.randrange(100) for _ in range(steps + 1)]
        signs = [rng.choice("+-") for _ in range(steps)]
        prompt = f"{numbers[0]:02d}" + "".join(
            f"{sign}{number:02d}" for sign, number in zip(signs, numbers[1:], strict=True)
        )
        return Problem(id=prompt, prompt=prompt, answer=self.solution(prompt).rsplit("#", 1)[1])

    def solution(self, prompt: str, rng: random.Random | None = None, error: float = 0.0) -> str:
        """The written-out solution; with `error`, each step's result is wrong with that probability.

        A wrong result is carried on, as a model would: what follows it is consistent with it.
        """
        total, lines = int(prompt[:2]), []
        for at in range(2, len(prompt), 3):
            sign, number = prompt[at], int(prompt[at + 1 : at + 3])
            result = (total + number if sign == "+" else total - number) % 100
            if rng is not None and rng.random() < error:
                # One wrong digit, like a slip of the pen; shifting it never gives the right one.
                place = rng.choice((1, 10))
                digit = result // place % 10
                result += ((digit + rng.randint(1, 9)) % 10 - digit) * place
            lines.append(f"{total:02d}{sign}{number:02d}={result:02d};")
            total = result
        return "".join(lines) + f"#{total:02d}"

    def problems(self, seed: int) -> Iterator[Problem]:
        """An endless stream of problems, the same for the same seed."""
        rng = random.Random(seed)
        while True:
            yield self.problem(rng)
