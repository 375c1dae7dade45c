"""Tasks: where problems come from, and in what order. Grading is in `rewards.py`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import ascii_lowercase
from typing import Protocol

from espo_rl.config import TaskSection
from espo_rl.types import Problem


class TaskError(ValueError):
    """The problems cannot be had: a missing or malformed file."""


class Task(Protocol):
    """A source of problems. The held-out ones never appear among the training ones."""

    def training(self, seed: int) -> Iterator[Problem]:
        """An endless stream of training problems, the same for the same seed."""

    def held_out(self, count: int) -> Sequence[Problem]:
        """The first `count` problems kept for evaluation, always the same ones."""


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

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem; the number of steps is uniform in [min_steps, max_steps]."""
        steps = rng.randint(self.min_steps, self.max_steps)
        prompt = f"{rng.randrange(1000):03d}{ascii_lowercase[steps - 1]}"
        return Problem(id=prompt, prompt=prompt, answer=self.solution(prompt).rpartition("#")[2])

    def solution(self, prompt: str, rng: random.Random | None = None, error: float = 0.0) -> str:
        """The written-out solution; each step's result is wrong with probability `error`.

        A wrong result is carried on, as a model would: what follows is consistent with it.
        """
        numbers, steps = [int(digit) for digit in prompt[:3]], []
        for label in reversed(ascii_lowercase[: ascii_lowercase.index(prompt[3]) + 1]):
            oldest, newest = numbers[-3], numbers[-1]
            result = (oldest + newest) % 10
            if rng is not None and rng.random() < error:
                result = (result + rng.randint(1, 9)) % 10
            steps.append(f"{label}{oldest}+{newest}={result}")
            numbers.append(result)
        return "".join(steps) + "#" + "".join(map(str, numbers[-3:]))

    def training(self, seed: int) -> Iterator[Problem]:
        rng = random.Random(seed)
        held_out = {problem.id for problem in self.held_out(1024)}
        while True:
            problem = self.problem(rng)
            if problem.id not in held_out:
                yield problem

    def held_out(self, count: int) -> Sequence[Problem]:
        rng = random.Random("held-out")
        return [self.problem(rng) for _ in range(count)]


@dataclass(frozen=True)
class JsonlTask:
    """Problems from JSONL files of `{"problem": str, "answer": str}` rows, shuffled every epoch."""

    train: Path
    eval: Path | None = None

    def training(self, seed: int) -> Iterator[Problem]:
        rows = list(_read_jsonl(self.train))
        if self.eval is None:
            rows = rows[len(self.held_out(len(rows))) :]
        rng = random.Random(seed)
        while True:
            yield from rng.sample(rows, len(rows))

    def held_out(self, count: int) -> Sequence[Problem]:
        """Of the evaluation file; without one, the first tenth of the training file at most."""
        if self.eval is not None:
            return list(islice(_read_jsonl(self.eval), count))
        rows = list(_read_jsonl(self.train))
        return rows[: min(count, len(rows) // 10)]


def _read_jsonl(path: Path) -> Iterator[Problem]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise TaskError(f"task file {path}: {error.strerror or error}") from error
    problems = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = row["problem"], row["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise TaskError(
                f'task file {path}, line {number}: need {{"problem": ..., "answer": ...}}, '
                f"got {error!r}"
            ) from error
        problems += 1
        yield Problem(id=f"{path.name}:{number}", prompt=str(prompt), answer=str(answer))
    if not problems:
        raise TaskError(f"task file {path} has no problems")


def make_task(config: TaskSection) -> Task:
    """The task a recipe names. Raises TaskError when its problems cannot be had."""
    if config.kind == "arithmetic":
        return Arithmetic(config.min_steps, config.max_steps)
    assert config.train is not None
    return JsonlTask(Path(config.train), Path(config.eval) if config.eval else None)
