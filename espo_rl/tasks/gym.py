"""Problems that reasoning-gym makes, and its data sets as the recipe names them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from espo_rl.config import TaskSection
from espo_rl.tasks.task import TaskError, did_you_mean, fill_template
from espo_rl.types import Problem

#: graders that know nothing but the reference answer
COMPARING = ("exact", "math", "regex")


class GymTask:
    """Problems that reasoning-gym makes: endless, graded by its own scorer with `grader = "task"`.

    A question is held out if its hash says so, whatever seed it comes from: reasoning-gym seeds
    item i with seed + i, so streams of different seeds may well meet.

    Raises:
        TaskError: reasoning-gym is not installed, has no such data set, or refuses its options; the
            recipe's grader compares with answers that are not there.
    """

    CHUNK = 1000
    PATIENCE = 1000  # draws without anything new

    def __init__(self, config: TaskSection) -> None:
        self._config = config
        self._answer(gym_dataset(config)[0])
        self._kept: dict[str, Problem] = {}
        self._keeping = self._stream("held-out", held_out=True)

    def training(self, seed: int) -> Iterator[Problem]:
        yield from self._stream(f"training {seed}", held_out=False)
        raise TaskError(
            f"task.name = {self._config.name!r}: hardly a question that is not held out"
        )

    def held_out(self, count: int) -> Sequence[Problem]:
        seen = 0
        while len(self._kept) < count and seen < self.PATIENCE:
            problem = next(self._keeping, None)
            if problem is None:
                break
            seen = seen + 1 if problem.id in self._kept else 0
            self._kept.setdefault(problem.id, problem)
        return list(self._kept.values())[:count]

    def _stream(self, seed: str, *, held_out: bool) -> Iterator[Problem]:
        """Questions of one side; ends when none has come for long."""
        rng, missed = random.Random(seed), 0
        while True:
            data = gym_dataset(self._config, seed=rng.getrandbits(31), size=self.CHUNK)
            for row in map(data.__getitem__, range(self.CHUNK)):
                digest = hashlib.sha256(row["question"].encode()).digest()
                if (digest[0] % 4 == 0) is not held_out:
                    missed += 1
                    if missed == self.PATIENCE:
                        return
                    continue
                missed = 0
                yield Problem(
                    id=f"{self._config.name}:{digest.hex()[:16]}",
                    prompt=fill_template(self._config.template, row["question"]),
                    answer=self._answer(row),
                    extra=row,
                )

    def _answer(self, row: Mapping[str, Any]) -> str:
        """The reference answer; some questions have none, only a scorer."""
        config = self._config
        if row["answer"] is None and config.grader in COMPARING:
            raise TaskError(
                f"task.grader = {config.grader!r} needs a reference answer, and {config.name} has "
                'questions without one: set task.grader = "task", its own scorer'
            )
        return str(row["answer"] or "")


def gym_dataset(config: TaskSection, *, seed: int = 0, size: int = 1) -> Any:
    """A reasoning-gym data set with the recipe's name and options; raises TaskError."""
    try:
        from reasoning_gym import composite, factory
    except ImportError as error:
        raise TaskError(
            "task.kind = 'reasoning-gym' needs, in the repository: pip install '.[gym]'"
        ) from error
    name, options = config.name or "", dict(config.options)
    if name not in factory.DATASETS:
        names = sorted(factory.DATASETS)
        raise TaskError(
            f"task.name = {name!r}: no such data set{did_you_mean(name, names)}; there are "
            + ", ".join(names)
        )
    known = {field.name for field in fields(factory.DATASETS[name][1])} - {"seed", "size"}
    if wrong := options.keys() - known:
        raise TaskError(
            f"task.options: {name} has no {', '.join(sorted(wrong))}"
            f"{did_you_mean(min(wrong), known)}; it has {', '.join(sorted(known))}"
        )
    try:
        if name == "composite":  # a mixture: [{name = ..., weight = ..., config = {...}}, ...]
            options["datasets"] = [composite.DatasetSpec(**spec) for spec in options["datasets"]]
        return factory.create_dataset(name, seed=seed, size=size, **options)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise TaskError(f"task.options: {name} refuses them: {error}") from error
