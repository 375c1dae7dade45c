"""Evaluation through a real gateway: scores, refusals, kills and resumes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from espo_gateway.front.gateway import Gateway
from espo_gateway.testing import FakeServer, Script
from espo_rl.base_model.train import make_tokenizer
from espo_rl.config import RolloutSection
from espo_rl.evaluate.evaluator import evaluate
from espo_rl.evaluate.results import (
    EvaluationError,
    ProblemResult,
    Report,
    SampleResult,
    Sampling,
)
from espo_rl.evaluate.table import table
from espo_rl.record.intervals import Share
from espo_rl.rollouts.collector import Collector, Prompter
from espo_rl.tasks.grader_pool import Grade
from espo_rl.tasks.graders import exact_answer
from espo_rl.types import EndReason, Problem
from tests.helpers.evaluation import DOUBTFUL, PROBLEMS, Answers, answering, place, saying
from tests.helpers.gateway import (
    GATE,
    GOOD,
    gateway_for,
    get_text,
    until_asked,
    until_finished,
)

pytestmark = pytest.mark.usefixtures("retry_at_once")


class ByAnswer:
    """Grades as "exact" does; what says so cannot be graded."""

    async def grade(self, completions: Sequence[tuple[str, Problem]]) -> list[Grade]:
        return [
            Grade(None, "choked")
            if "choke" in text
            else Grade(float(exact_answer(text) == problem.answer))
            for text, problem in completions
        ]


@asynccontextmanager
async def collector_of(
    server: FakeServer, gate: bytes | None = None, **settings: Any
) -> AsyncIterator[Collector]:
    async with (
        gateway_for(server, gate=gate, attempts=1) as gateway,
        collector_at(gateway, **settings) as collector,
    ):
        yield collector


def collector_at(gateway: Gateway, **settings: Any) -> Collector:
    config = RolloutSection(max_tokens=20, retries=1, **settings)
    return Collector(gateway.url, "fake", Prompter(make_tokenizer()), config)


async def read(completion: str, problem: Problem) -> str | None:
    return exact_answer(completion) or None


async def evaluated(script: Any, sampling: Sampling, gate: bytes | None = None, **more: Any) -> Any:
    """The report, the problems as they were handed over, and the server that was asked."""
    handed: list[ProblemResult] = []
    async with FakeServer(script) as server, collector_of(server, gate) as collector:
        report = await evaluate(
            collector,
            ByAnswer(),
            PROBLEMS,
            sampling,
            read,
            on_problem=handed.append,
            **more,
        )
    return report, handed, server


# -- asking, grading, counting ---------------------------------------------------------------------


async def test_scores_of_known_answers() -> None:
    answers = [["0", "0", "7", "8"], ["1", "7", "7", "1"], ["7", "7", "8", "8"]]
    report, handed, _ = await evaluated(answering(answers), Sampling(k=4, temperature=0.6))
    scores = report.scores
    assert scores.average.value == pytest.approx((2 / 4 + 2 / 4 + 0) / 3)
    assert [mean.value for mean in scores.passes.values()] == pytest.approx(
        [1 / 3, 2 * (1 - 1 / 6) / 3, 2 / 3]
    )
    assert scores.majority.value == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    assert (report.problems, report.samples, report.errors) == (3, 12, [])
    assert report.tokens == 6.0
    assert report.truncated.value == 0.0
    assert not report.gated
    by_index = sorted(handed, key=lambda result: result.index)
    assert [[sample.answer for sample in result.samples] for result in by_index] == answers
    assert by_index[0].samples[2].text == "2+#1#7"
    assert [(r.id, r.problem, r.answer) for r in by_index] == [
        (problem.id, problem.prompt, problem.answer) for problem in PROBLEMS
    ]


async def test_every_sample_is_asked_once_as_told() -> None:
    sampling = Sampling(k=3, temperature=0.7, top_p=0.9, seed=5)
    _, _, server = await evaluated(Script([GOOD]), sampling)
    bodies = server.bodies
    assert len({body["seed"] for body in bodies}) == len(bodies) == 9
    for body in bodies:
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.9, 20)
    again = (await evaluated(Script([GOOD]), sampling))[2].bodies
    assert {b["seed"] for b in again} == {b["seed"] for b in bodies}
    other = (await evaluated(Script([GOOD]), Sampling(k=3, temperature=0.7, seed=6)))[2].bodies
    assert not {b["seed"] for b in other} & {b["seed"] for b in bodies}


async def test_a_sample_that_runs_into_the_limit_is_told_apart() -> None:
    answers: Answers = [["0", saying("#0" * 100)]] * 3
    report, handed, _ = await evaluated(answering(answers), Sampling(k=2, temperature=0.6))
    assert report.truncated.value == 0.5
    assert {sample.end for sample in handed[0].samples} == {EndReason.COMPLETED, EndReason.LENGTH}


async def test_what_fails_is_no_wrong_answer_and_is_asked_again() -> None:
    failing: Answers = [["0", Script([], status=400)], [saying("choke"), "1"], ["2", "2"]]
    sampling = Sampling(k=2, temperature=0.6)
    report, handed, _ = await evaluated(answering(failing), sampling)
    assert report.scores.average.value == 1.0
    assert (report.scores.passes[2].value, report.scores.passes[2].problems) == (1.0, 1)
    assert (report.samples, len(report.errors)) == (4, 2)
    assert "as scripted" in report.errors[0]
    assert report.errors[1] == "not graded: choked"

    done = {result.index: result for result in handed}
    right = answering([["0", "7"], ["7", "1"], ["2", "2"]])
    report, handed, server = await evaluated(right, sampling, done=done)
    assert sorted(map(place, server.bodies)) == [(0, 1), (1, 0)]
    assert sorted(result.index for result in handed) == [0, 1]
    assert [sample.answer for sample in handed[0].samples] in (["0", "7"], ["7", "1"])
    assert (report.samples, report.errors) == (6, [])
    assert report.scores.average.value == pytest.approx(2 / 3)


async def test_it_gives_up_when_everything_fails() -> None:
    with pytest.raises(EvaluationError, match=r"the last 4 samples all failed.*as scripted"):
        await evaluated(Script([], status=400), Sampling(k=2, temperature=0.6, concurrency=2))


async def test_no_more_samples_at_once_than_allowed() -> None:
    async with (
        FakeServer(Script([GOOD]), gated=True) as server,
        gateway_for(server, gate=None, attempts=1) as gateway,
        collector_at(gateway) as collector,
    ):
        sampling = Sampling(k=4, temperature=0.6, concurrency=3)
        asking = asyncio.create_task(evaluate(collector, ByAnswer(), PROBLEMS, sampling))
        for finished in range(12 - 3):
            await until_asked(server, finished + 3)
            # What was asked beyond would be there by now.
            await get_text(gateway.url + "/v1/models")
            assert len(server.bodies) == finished + 3
            server.release()
            await until_finished(server, finished + 1)
        server.release(3)
        assert (await asking).samples == 12


async def test_without_an_answer_reader_there_is_no_majority() -> None:
    async with FakeServer(saying("#0")) as server, collector_of(server) as collector:
        report = await evaluate(collector, ByAnswer(), PROBLEMS, Sampling(k=1, temperature=0.6))
    assert report.scores.majority is None
    assert report.scores.average.value == pytest.approx(1 / 3)


async def test_a_wrong_answer_that_cannot_be_read_has_no_vote(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of another kind than those that were foreseen; it is graded all the same."""

    async def read(completion: str, problem: Problem) -> str | None:
        raise ZeroDivisionError(completion)

    answers = [["0", "7", "7", "7"]] * 3
    async with FakeServer(answering(answers)) as server, collector_of(server) as collector:
        sampling = Sampling(k=4, temperature=0.6)
        report = await evaluate(collector, ByAnswer(), PROBLEMS, sampling, read)
    assert (report.samples, report.errors) == (12, [])
    assert report.scores.majority is not None
    assert report.scores.majority.value == pytest.approx(1 / 3)  # one right answer has the vote
    [told] = [record for record in caplog.records if "cannot be read" in record.message]
    assert "ZeroDivisionError" in told.message


# -- early stopping --------------------------------------------------------------------------------


#: Stopped by GATE at its eighth token, and right at its end, the twelfth.
async def test_the_rule_is_off_unless_asked_for() -> None:
    report, _, _ = await evaluated(DOUBTFUL, Sampling(k=2, temperature=0.6), GATE)
    assert report.scores.average.value == pytest.approx(1 / 3)
    assert report.tokens == 12.0


async def test_a_stopped_sample_is_wrong_whatever_it_would_have_become() -> None:
    answers: Answers = [[DOUBTFUL, "0"]] * 3
    sampling = Sampling(k=2, temperature=0.6, gated=True, audit=0.0)
    report, handed, _ = await evaluated(answering(answers), sampling, GATE)
    assert report.scores.average.value == pytest.approx(1 / 6)
    assert report.scores.majority.value == pytest.approx(1 / 3)  # the stopped ones do not vote
    assert report.stopped.value == 0.5
    assert math.isnan(report.false_positives.value)
    assert report.saved[0] != report.saved[0]  # unknown
    stopped = handed[0].samples[0]
    assert (stopped.end, stopped.tokens, stopped.answer) == (EndReason.EARLY_STOP, 8, None)


async def test_the_audit_tells_what_stopping_saves_and_costs() -> None:
    answers: Answers = [[DOUBTFUL, "0"]] * 3
    sampling = Sampling(k=2, temperature=0.6, gated=True, audit=1.0)
    report, _, server = await evaluated(answering(answers), sampling, GATE)
    assert server.aborted == 0
    assert report.scores.average.value == pytest.approx(1 / 6)
    # Of three stopped ones only the first problem's ends with its answer.
    assert report.false_positives.value == pytest.approx(1 / 3)
    assert report.saved == (pytest.approx(1 - (8 + 6) / (12 + 6)), 0.0)
    assert report.tokens == (8 + 6) / 2


def test_intervals_are_over_problems() -> None:
    """All samples of a problem end alike, so that many of them tell no more than one."""
    stopped = SampleResult(EndReason.EARLY_STOP, correct=False, tokens=8, generated=8)
    full = replace(stopped, correct_in_full=True), replace(stopped, correct_in_full=False)
    cut_off = SampleResult(EndReason.LENGTH, correct=False, tokens=20, generated=20)
    sampling = Sampling(k=32, temperature=0.6, gated=True, audit=1.0)
    results = [
        ProblemResult(index, f"p{index}", "", "", [sample] * 32)
        for index, sample in enumerate([*full, cut_off, cut_off] * 20)
    ]
    report = Report.of(results, sampling, votes=False)
    for share in (report.truncated, report.stopped):
        assert (share.value, share.problems) == (0.5, 80)
        assert share.interval == pytest.approx(Share(40, 80).interval, abs=0.01)
    share = report.false_positives
    assert (share.value, share.problems) == (0.5, 40)
    assert share.interval == pytest.approx(Share(20, 40).interval, abs=0.01)
    assert "over problems, of saved tokens over samples" in str(table("m", {"d": report}).title)


async def test_a_part_is_audited_always_the_same() -> None:
    sampling = Sampling(k=64, temperature=0.6, gated=True, audit=0.25)
    modes = [sampling.request(PROBLEMS[0], 0, number).mode for number in range(64)]
    assert modes == [sampling.request(PROBLEMS[0], 0, number).mode for number in range(64)]
    assert 6 <= modes.count("shadow") <= 26
    assert set(modes) == {"shadow", "enforce"}
