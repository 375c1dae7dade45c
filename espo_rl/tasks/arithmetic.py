"""Written-out additive sequences: a task made so that failures show."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from espo_rl.tasks.task import TaskError, fill_template
from espo_rl.types import Problem

#: problems that are never trained on
HELD_OUT = 1024


@dataclass(frozen=True)
class Arithmetic:
    """Additive sequences modulo 10, every step written out: few steps are easy, many are hopeless.

    `358c`: start from 3, 5, 8; in each of the steps c, b, a add the last number and the third last;
    give the three that stand last. The answer is written `c3+8=1b5+1=6a8+6=4#164`. A step can be
    undone, so a wrong digit never leads back to the right three: a trajectory fails at a definite
    token, which is what early stopping is to find.
    """

    min_steps: int = 2
    max_steps: int = 24
    template: str = "{problem}"
    steps: Sequence[int] | None = None

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem; the number of steps is one of `steps`, or uniform in
        [min_steps, max_steps]."""
        steps = rng.choice(self.steps or range(self.min_steps, self.max_steps + 1))
        text = f"{rng.randrange(1000):03d}{ascii_lowercase[steps - 1]}"
        answer = self.solution(text).rpartition("#")[2]
        return Problem(id=text, prompt=fill_template(self.template, text), answer=answer)

    def solution(self, text: str, slip: Callable[[int, int], int] | None = None) -> str:
        """The written-out solution.

        Args:
            slip: by how much the sum of two digits is missed, 0 for not at all. A wrong result is
                carried on, as a model would: what follows is consistent with it.
        """
        numbers, steps = [int(digit) for digit in text[:3]], []
        for label in reversed(ascii_lowercase[: ascii_lowercase.index(text[3]) + 1]):
            oldest, newest = numbers[-3], numbers[-1]
            result = (oldest + newest) % 10
            if slip is not None:
                result = (result + slip(oldest, newest)) % 10
            steps.append(f"{label}{oldest}+{newest}={result}")
            numbers.append(result)
        return "".join(steps) + "#" + "".join(map(str, numbers[-3:]))

    def training(self, seed: int) -> Iterator[Problem]:
        rng = random.Random(seed)
        held_out = {problem.id for problem in self.held_out(HELD_OUT)}
        while True:
            problem = self.problem(rng)
            if problem.id not in held_out:
                yield problem

    def held_out(self, count: int) -> Sequence[Problem]:
        if count > HELD_OUT:
            raise TaskError(
                f"task.kind = 'arithmetic' holds out {HELD_OUT:,} problems, not {count:,}: lower "
                "evaluation.problems"
            )
        rng = random.Random("held-out")
        return [self.problem(rng) for _ in range(count)]
