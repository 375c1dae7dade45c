"""How an evaluation samples, and what comes of it: by sample, by problem, by data set."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from espo_gateway.stop.gate_json import Mode
from espo_rl.config import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from espo_rl.evaluate.scores import Graded, Scores, score
from espo_rl.record.intervals import ProblemMean
from espo_rl.record.totals import Totals
from espo_rl.types import EndReason, Problem, Request, first_seed


class EvaluationError(RuntimeError):
    """The evaluation cannot go on; the message says what to change."""


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
        low, high = LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE
        for name, holds, what in (
            ("k", 1 <= self.k <= 65_536, "lie in 1 to 65,536"),
            ("concurrency", 1 <= self.concurrency <= 65_536, "lie in 1 to 65,536"),
            (
                "temperature",
                self.temperature == 0.0 or low <= self.temperature <= high,
                f"be 0, which is greedy, or lie in {low} to {high}",
            ),
            ("top_p", 0.0 < self.top_p <= 1.0, "lie in (0, 1]"),
            ("seed", 0 <= self.seed < 2**63, "lie in 0 to 2^63 - 1"),
            ("audit", 0.0 <= self.audit <= 1.0, "lie in [0, 1]"),
        ):
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)} must {what}")

    def request(self, problem: Problem, index: int, number: int) -> Request:
        """The `number`th request for the problem at `index` of its data set, always the same."""
        seed = first_seed(self.seed, index) + number
        mode: Mode = "off"
        if self.gated:
            mode = "shadow" if random.Random(seed).random() < self.audit else "enforce"
        return Request(problem, seed=seed, mode=mode)


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
    truncated: ProblemMean  # share of samples that ran into max_tokens
    stopped: ProblemMean  # share of samples that were
    false_positives: ProblemMean  # of the audited stopped ones, those that would have been right
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
        return cls(
            scores=score(graded, sampling.k, votes=votes),
            problems=len(results),
            samples=len(usable),
            tokens=sum(sample.tokens for sample in usable) / max(len(usable), 1),
            truncated=_share(results, lambda sample: sample.end is EndReason.LENGTH),
            stopped=_share(results, lambda sample: sample.end is EndReason.EARLY_STOP),
            false_positives=_share(results, lambda sample: sample.correct_in_full),
            errors=[sample.error for sample in every if sample.error],
            totals=_totals(usable, gated=sampling.gated),
        )

    @property
    def gated(self) -> bool:
        return self.totals.gated > 0

    @property
    def saved(self) -> tuple[float, float]:
        """Share of tokens saved by stopping, audits not counted, and its 95 % half width: over
        samples, not problems."""
        without, half_width = self.totals.tokens_without_stopping()
        if not without:
            return 0.0, 0.0
        used = (self.totals.tokens - sum(self.totals.remaining)) / without
        return 1.0 - used, used * half_width / without


def _share(
    results: Sequence[ProblemResult], holds: Callable[[SampleResult], bool | None]
) -> ProblemMean:
    """Of the usable samples, those of which something holds; None: one that does not count."""
    told = [
        [
            said
            for sample in result.samples
            if not sample.error and (said := holds(sample)) is not None
        ]
        for result in results
    ]
    known = [said for said in told if said]
    return ProblemMean.of([sum(said) / len(said) for said in known], [*map(len, known)])


def _totals(samples: Sequence[SampleResult], *, gated: bool) -> Totals:
    audited = [sample for sample in samples if sample.correct_in_full is not None]
    return Totals(
        rollouts=len(samples),
        gated=len(samples) if gated else 0,
        stopped=sum(sample.end is EndReason.EARLY_STOP for sample in samples),
        audited=len(audited),
        audited_correct=sum(bool(sample.correct_in_full) for sample in audited),
        tokens=sum(sample.generated for sample in samples),
        needed=sum(sample.generated - sample.overshoot for sample in samples),
        remaining=[sample.generated - sample.tokens for sample in audited],
    )
