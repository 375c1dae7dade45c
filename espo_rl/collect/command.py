"""The work of `espo_rl.collect`: an evaluation whose rollouts are kept."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from espo_gateway.files import written_whole
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import Schedule
from espo_rl.evaluate.command import Command
from espo_rl.evaluate.evaluator import evaluate
from espo_rl.evaluate.results import EvaluationError, ProblemResult, Report, SampleResult
from espo_rl.record.progress import progress_bar
from espo_rl.record.rollout_files import read_rollouts, rollouts_table
from espo_rl.rollouts.collector import Collector
from espo_rl.tasks.grader_pool import GraderPool
from espo_rl.types import Problem, Request, Rollout


class Keeper:
    """A collector that keeps what it collected until it is written; seeds name rollouts."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._kept: dict[int, Rollout] = {}

    async def collect(
        self,
        requests: Sequence[Request],
        *,
        temperature: float,
        top_p: float = 1.0,
        on_done: Callable[[Rollout], None] = lambda rollout: None,
    ) -> list[Rollout]:
        """As `Collector.collect`."""
        rollouts = await self._collector.collect(
            requests, temperature=temperature, top_p=top_p, on_done=on_done
        )
        self._kept.update({rollout.seed: rollout for rollout in rollouts})
        return rollouts

    def take(self, seed: int) -> Rollout:
        return self._kept.pop(seed)


class CollectCommand(Command):
    """The command: an evaluation whose rollouts are kept.

    Raises:
        EvaluationError: as `Command`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        try:
            schedule = Schedule(every=options.probe_every, growth=0.0)
        except ValueError as error:
            raise EvaluationError(f"--probe-{error}; 0 asks never") from error
        super().__init__(options)
        if options.probe_every:
            self.gate = Gate(schedule=schedule)
            # Nothing is stopped, but what is not monitored is not asked about either.
            self.sampling = dataclasses.replace(self.sampling, gated=True)

    def settings(self) -> dict[str, Any]:
        settings = {**super().settings(), "gate": None, "audit": None, "collected": True}
        probes = {"probe_every": self.options.probe_every} if self.options.probe_every else {}
        return settings | probes

    @property
    def probes(self) -> bool:
        return bool(self.options.probe_every)

    async def evaluate(
        self, name: str, problems: Sequence[Problem], collector: Collector, grader: GraderPool
    ) -> Report:
        """Collect what no file is there of."""
        done = {
            index: result
            for index, problem in enumerate(problems)
            if (result := self.there(name, index, problem)) is not None
        }
        keeper = Keeper(collector)
        with progress_bar() as bar:
            total, there = (len(some) * self.sampling.k for some in (problems, done))
            line = bar.add_task(name, total=total, completed=there)

            def write(result: ProblemResult) -> None:
                problem = problems[result.index]
                requests = [
                    self.sampling.request(problem, result.index, number)
                    for number in range(self.sampling.k)
                ]
                rollouts = [keeper.take(request.seed) for request in requests]
                self.write(self.file(name, result.index), rollouts, result)

            return await evaluate(
                keeper,
                grader,
                problems,
                self.sampling,
                done=done,
                on_sample=lambda _: bar.advance(line),
                on_problem=write,
            )

    def there(self, name: str, index: int, problem: Problem) -> ProblemResult | None:
        """What an earlier command wrote of a problem."""
        file = self.file(name, index)
        if not file.exists():
            return None
        try:
            rollouts, _ = read_rollouts(file)
        except ValueError as error:
            raise EvaluationError(f"{error}; remove it, and the same command asks again") from error
        if rollouts[0].problem != problem:
            raise EvaluationError(
                f"{file} is of another problem than the data now has at {index}; the data has "
                "changed: choose another --out"
            )
        samples = [
            SampleResult(rollout.end, correct=rollout.correct, tokens=rollout.kept)
            for rollout in rollouts
        ]
        return ProblemResult(index, problem.id, problem.prompt, problem.answer, samples)

    def file(self, name: str, index: int) -> Path:
        """Where a problem's rollouts lie."""
        return self.folder.path / "rollouts" / f"{name}-{index:08d}.parquet"

    def write(self, final: Path, rollouts: Sequence[Rollout], result: ProblemResult) -> None:
        """Write a problem whole or not at all; one with a failed sample is asked again."""
        if any(sample.error for sample in result.samples):
            return
        for rollout, sample in zip(rollouts, result.samples, strict=True):
            rollout.correct, rollout.reward = sample.correct, float(bool(sample.correct))
        final.parent.mkdir(exist_ok=True)
        with written_whole(final) as scratch:
            pq.write_table(rollouts_table(0, rollouts, Gate(), {}), scratch, compression="zstd")

    def finish(self, reports: dict[str, Report], seconds: float) -> bool:
        """Say what was collected; whether nothing failed."""
        errors = [error for report in reports.values() for error in report.errors]
        samples = sum(report.samples for report in reports.values())
        self.say(f"{samples:,} rollouts: {self.folder.path / 'rollouts'}, after {seconds:,.0f} s")
        if errors:
            self.say(
                f"{len(errors)} samples failed, and their problems are not written; the same "
                f"command asks them again. The first: {errors[0]}"
            )
        else:
            self.say(f"next: python -m espo_rl.replay {self.folder.path}")
        return not errors
