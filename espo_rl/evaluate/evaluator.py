"""Samples k answers to each problem, grades them, and says what they come to.

    report = await evaluate(collector, grader, problems, Sampling(k=32, temperature=0.6))
    report.scores.average                # avg@32 with its interval

Owns no server and no file: the training loop runs it between two steps, `espo_rl.evaluate` as a
command. A sample that fails, or cannot be graded, is an error and never a wrong answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from espo_rl.evaluate.results import EvaluationError, ProblemResult, Report, SampleResult, Sampling
from espo_rl.tasks.grader_pool import Grade
from espo_rl.types import EndReason, Problem, Request, Rollout

log = logging.getLogger(__name__)


class Grader(Protocol):
    """Grades completions; `tasks.grader_pool.GraderPool` is one."""

    async def grade(self, completions: Sequence[tuple[str, Problem]]) -> Sequence[Grade]: ...


#: what the answer in a completion is; None: none can be told
AnswerReader = Callable[[str, Problem], Awaitable[str | None]]


class Asker(Protocol):
    """Asks for samples; `rollouts.collector.Collector` is one."""

    async def collect(
        self, requests: Sequence[Request], *, temperature: float, top_p: float = 1.0
    ) -> list[Rollout]: ...


async def evaluate(
    collector: Asker,
    grader: Grader,
    problems: Sequence[Problem],
    sampling: Sampling,
    read_answer: AnswerReader | None = None,
    *,
    done: Mapping[int, ProblemResult] | None = None,
    on_sample: Callable[[SampleResult], None] = lambda sample: None,
    on_problem: Callable[[ProblemResult], None] = lambda result: None,
) -> Report:
    """Ask what is not done yet, and report on all of it.

    Args:
        read_answer: how answers are read that are to vote; None: no majority.
        done: results of an earlier evaluation by index; what failed in them is asked again.
        on_sample: for progress bars.
        on_problem: is given each problem's result, texts included, once all its samples ended.

    Raises:
        EvaluationError: sample upon sample fails, so going on would only fail the others.
    """
    work = _Work(collector, grader, problems, sampling, read_answer, on_sample, on_problem)
    results = await work.run(done or {})
    return Report.of(results, sampling, votes=read_answer is not None)


class _Work:
    """One evaluation under way: a fixed number of workers that draw from one queue."""

    def __init__(
        self,
        collector: Asker,
        grader: Grader,
        problems: Sequence[Problem],
        sampling: Sampling,
        read_answer: AnswerReader | None,
        on_sample: Callable[[SampleResult], None],
        on_problem: Callable[[ProblemResult], None],
    ) -> None:
        self.collector, self.grader, self.problems = collector, grader, problems
        self.sampling, self.read_answer = sampling, read_answer
        self.on_sample, self.on_problem = on_sample, on_problem
        self.results: dict[int, ProblemResult] = {}
        self.left: dict[int, int] = {}  # samples that a problem still waits for
        self.failed_in_a_row = 0
        self.unread = False  # whether any answer could not be read

    async def run(self, done: Mapping[int, ProblemResult]) -> list[ProblemResult]:
        queue = self.queue(done)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.sampling.concurrency):
                    group.create_task(self.worker(queue))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [self.results[index] for index in range(len(self.problems))]

    def queue(self, done: Mapping[int, ProblemResult]) -> Iterator[tuple[int, int]]:
        """(index, number) of every sample that is to be asked."""
        missing = SampleResult(EndReason.ERROR, error="not asked yet")
        for index, problem in enumerate(self.problems):
            samples = [*done[index].samples] if index in done else [missing] * self.sampling.k
            self.results[index] = ProblemResult(
                index, problem.id, problem.prompt, problem.answer, samples
            )
            numbers = [number for number, sample in enumerate(samples) if sample.error]
            self.left[index] = len(numbers)
            for number in numbers:
                yield index, number

    async def worker(self, queue: Iterator[tuple[int, int]]) -> None:
        for index, number in queue:
            sample = await self.sample(index, number)
            result = self.results[index]
            result.samples[number] = sample
            self.on_sample(sample)
            self.left[index] -= 1
            if not self.left[index]:
                self.on_problem(result)
                # Texts are many, and nothing here reads them again.
                self.results[index] = result.without_texts()
            self.watch(sample)

    def watch(self, sample: SampleResult) -> None:
        """Give up when more fail in a row than one bad problem, or what was under way, explains."""
        self.failed_in_a_row = self.failed_in_a_row + 1 if sample.error else 0
        if self.failed_in_a_row >= 2 * max(self.sampling.k, self.sampling.concurrency):
            raise EvaluationError(
                f"the last {self.failed_in_a_row} samples all failed; the last one: {sample.error}"
            )

    async def sample(self, index: int, number: int) -> SampleResult:
        problem = self.problems[index]
        (rollout,) = await self.collector.collect(
            [self.sampling.request(problem, index, number)],
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
        )
        if rollout.end is EndReason.ERROR:
            return SampleResult(rollout.end, error=rollout.error or "no answer")
        counts: dict[str, Any] = {
            "end": rollout.end,
            "tokens": rollout.kept,
            "generated": rollout.generated,
            "overshoot": rollout.overshoot,
            "text": rollout.text,
        }
        if rollout.stopped and not rollout.audited:
            return SampleResult(correct=False, **counts)
        return await self.graded(rollout, counts)

    async def graded(self, rollout: Rollout, counts: dict[str, Any]) -> SampleResult:
        problem = rollout.problem
        (grade,) = await self.grader.grade([(rollout.answer, problem)])
        if grade.score is None:
            return SampleResult(error=f"not graded: {grade.error}", **counts)
        if rollout.stopped:
            return SampleResult(correct=False, correct_in_full=grade.correct, **counts)
        if grade.correct or grade.error or self.read_answer is None:
            # The grader finds all right ones equal to the reference, so they are one answer.
            answer = problem.answer if grade.correct else None
        else:
            answer = await self.read(rollout.answer, problem)
        return SampleResult(correct=grade.correct, answer=answer, **counts)

    async def read(self, completion: str, problem: Problem) -> str | None:
        """A wrong answer; None where it cannot be read, as it is graded already."""
        assert self.read_answer is not None
        try:
            return await self.read_answer(completion, problem)
        except Exception as error:
            if not self.unread:  # one tells of all of its kind
                log.warning(
                    "an answer to problem %s cannot be read, so it has no vote: %r",
                    problem.id,
                    error,
                )
            self.unread = True
            return None
