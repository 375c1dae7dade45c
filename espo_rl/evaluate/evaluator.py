"""Samples k answers to each problem, grades them, and says what they come to.

    report = await evaluate(collector, grader, problems, Sampling(k=32, temperature=0.6))
    report.scores.average                # avg@32 with its interval

Owns no server and no file: the training loop runs it between two steps, `espo_rl.evaluate` as a
command. A sample that fails, or cannot be graded, is an error and never a wrong answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from espo_rl.evaluate.scores import Graded, Scores, score
from espo_rl.record.intervals import Share
from espo_rl.record.summary import Totals
from espo_rl.rollouts.collector import Mode, Sample
from espo_rl.tasks.grader_pool import Grade
from espo_rl.tasks.graders import AnswerReader
from espo_rl.types import EndReason, Problem, Rollout


class EvaluationError(RuntimeError):
    """The evaluation cannot go on; the message says what to change."""


class Grader(Protocol):
    """Grades completions; `espo_rl.grading.GraderPool` is one."""

    async def grade(self, completions: Sequence[tuple[str, Problem]]) -> Sequence[Grade]: ...


class Asker(Protocol):
    """Asks for samples; `espo_rl.rollouts.Collector` is one."""

    async def collect(
        self, samples: Sequence[Sample], *, temperature: float, top_p: float = 1.0
    ) -> list[Rollout]: ...


@dataclass(frozen=True)
class Sampling:
    """How problems are asked.

    k: samples of each problem. concurrency: samples under way at a time.
    gated: whether the gateway's rule may stop a sample. audit: share of samples that are generated
    to the end although stopped, which shows what stopping cost and saved; the stop counts.
    """

    k: int
    temperature: float
    top_p: float = 1.0
    seed: int = 0
    concurrency: int = 64
    gated: bool = False
    audit: float = 0.0

    def __post_init__(self) -> None:
        if self.k < 1 or self.concurrency < 1:
            raise ValueError(
                f"k = {self.k} and concurrency = {self.concurrency} must be at least 1"
            )
        if self.temperature < 0.0 or not 0.0 < self.top_p <= 1.0 or not 0.0 <= self.audit <= 1.0:
            raise ValueError(
                f"temperature = {self.temperature} must not be negative, top_p = {self.top_p} lie "
                f"in (0, 1], audit = {self.audit} in [0, 1]"
            )

    def sample(self, problem: Problem, index: int, number: int) -> Sample:
        """The `number`th sample of the problem at `index` of its data set: always the same one."""
        seed = (self.seed * 1_000_003 + index) * 65_536 + number
        mode: Mode = "off"
        if self.gated:
            mode = "shadow" if random.Random(seed).random() < self.audit else "enforce"
        return Sample(problem, seed=seed, mode=mode)


@dataclass(frozen=True)
class SampleResult:
    """One graded sample.

    correct: None after an error; False for a stopped one, whatever it would have become.
    answer: in the grader's normal form, None where there is none.
    tokens: to its end or its stop; generated: by the server, past the stop too.
    correct_in_full: of an audited sample, as it would have ended.
    error: why there is nothing to count.
    """

    end: EndReason
    correct: bool | None = None
    answer: str | None = None
    tokens: int = 0
    generated: int = 0
    overshoot: int = 0
    correct_in_full: bool | None = None
    error: str = ""
    text: str = ""


@dataclass(frozen=True)
class ProblemResult:
    """A problem at `index` of its data set with all its samples, failed ones too."""

    index: int
    id: str
    problem: str
    answer: str
    samples: list[SampleResult] = field(repr=False)

    def without_texts(self) -> ProblemResult:
        samples = [dataclasses.replace(sample, text="") for sample in self.samples]
        return dataclasses.replace(self, samples=samples)


@dataclass(frozen=True)
class Report:
    """What an evaluation came to."""

    scores: Scores
    problems: int
    samples: int  # usable ones
    tokens: float  # a sample's mean length, to its stop
    truncated: Share  # ran into max_tokens
    errors: list[str]  # of failed samples, which the scores leave out
    totals: Totals  # of stopping

    @classmethod
    def of(cls, results: Sequence[ProblemResult], sampling: Sampling, *, votes: bool) -> Report:
        """Count. votes: whether the answers are known, so that a majority can be taken."""
        every = [sample for result in results for sample in result.samples]
        usable = [sample for sample in every if not sample.error]
        graded = [
            [
                Graded(bool(sample.correct), sample.answer)
                for sample in result.samples
                if not sample.error
            ]
            for result in results
        ]
        lengths = sum(sample.end is EndReason.LENGTH for sample in usable)
        return cls(
            scores=score(graded, sampling.k, votes=votes),
            problems=len(results),
            samples=len(usable),
            tokens=sum(sample.tokens for sample in usable) / max(len(usable), 1),
            truncated=Share(lengths, len(usable)),
            errors=[sample.error for sample in every if sample.error],
            totals=_totals(usable, gated=sampling.gated),
        )

    @property
    def gated(self) -> bool:
        return self.totals.gated > 0

    @property
    def stopped(self) -> Share:
        return Share(self.totals.stopped, self.totals.gated)

    @property
    def false_positives(self) -> Share:
        """Of the audited stopped samples, those that would have been right."""
        return Share(self.totals.audited_correct, self.totals.audited)

    @property
    def saved(self) -> tuple[float, float]:
        """Share of tokens saved by stopping, audits not counted, and its 95 % half width."""
        without, half_width = self.totals.tokens_without_stopping()
        if not without:
            return 0.0, 0.0
        used = self.totals.tokens / without
        return 1.0 - used, used * half_width / without


def _totals(samples: Sequence[SampleResult], *, gated: bool) -> Totals:
    audited = [sample for sample in samples if sample.correct_in_full is not None]
    return Totals(
        rollouts=len(samples),
        gated=len(samples) if gated else 0,
        stopped=sum(sample.end is EndReason.EARLY_STOP for sample in samples),
        audited=len(audited),
        audited_correct=sum(bool(sample.correct_in_full) for sample in audited),
        # What stopping without audits samples: an audited one up to its stop.
        tokens=sum(sample.tokens + sample.overshoot for sample in samples),
        needed=sum(sample.generated - sample.overshoot for sample in samples),
        remaining=[sample.generated - sample.tokens for sample in audited],
    )


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
        self.reading = asyncio.Lock()

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
            [self.sampling.sample(problem, index, number)],
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
        (grade,) = await self.grader.grade([(rollout.text, problem)])
        if grade.score is None:
            return SampleResult(error=f"not graded: {grade.error}", **counts)
        if rollout.stopped:
            return SampleResult(correct=False, correct_in_full=grade.correct, **counts)
        if grade.correct or self.read_answer is None:
            # The grader finds all right ones equal to the reference, so they are one answer.
            answer = problem.answer if grade.correct else None
        else:
            # Not on the loop, as reading mathematics takes a while; one by one, as the parser
            # shares its tables. It ends, since the grader has read the text in its time.
            async with self.reading:
                answer = await asyncio.to_thread(self.read_answer, rollout.text, problem)
        return SampleResult(correct=grade.correct, answer=answer, **counts)
