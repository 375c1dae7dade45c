"""The rollouts under way: never more than the engine likes, and none lost by what happens to it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from espo_gateway.stop.rules import Gate
from espo_rl.rollouts.batch import Batch
from espo_rl.rollouts.in_flight import InFlight
from espo_rl.rollouts.queue import BatchQueue
from espo_rl.types import EndReason, Problem, Request, Rollout


class Engine:
    """Answers when it is told to. asked: seeds, in order."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.more = asyncio.Condition()
        self.answers: dict[int, asyncio.Future[EndReason]] = {}

    async def __call__(self, request: Request) -> Rollout:
        self.answers[request.seed] = asyncio.get_running_loop().create_future()
        async with self.more:
            self.asked.append(request.seed)
            self.more.notify_all()
        try:
            end = await self.answers[request.seed]
        finally:
            del self.answers[request.seed]
        return Rollout(
            problem=request.problem,
            prompt_ids=[1],
            token_ids=[2],
            logprobs=np.zeros(1),
            max_logprobs=np.zeros(1),
            text="",
            end=end,
            kept=1,
            seed=request.seed,
        )

    async def begun(self, count: int) -> None:
        async with self.more:
            await self.more.wait_for(lambda: len(self.asked) >= count)


def queue_of(steps: int = 2) -> BatchQueue:
    """Batches of three rollouts, 10 11 12 and 20 21 22."""

    def draw(step: int) -> Batch:
        batch = Batch(step, first_seed=10 * step, gate=Gate())
        batch.ask([Problem("p", "", "")], 3, ["enforce"] * 3)
        return batch

    queue = BatchQueue(steps - 1, draw)
    queue.next(0, steps)
    return queue


async def test_a_slot_that_comes_free_is_filled_the_oldest_batch_first() -> None:
    engine, queue = Engine(), queue_of()
    async with InFlight(queue, engine, 4) as flight:
        with flight.filled():
            await engine.begun(4)
            assert engine.asked == [10, 11, 12, 20]
            engine.answers[11].set_result(EndReason.COMPLETED)
            await flight.until_changed()
            await engine.begun(5)
        assert engine.asked == [10, 11, 12, 20, 21]
        assert list(queue.batches[0].rollouts) == [11]


async def test_what_is_under_way_goes_on_when_nobody_waits_and_nothing_new_begins() -> None:
    engine, queue = Engine(), queue_of()
    async with InFlight(queue, engine, 2) as flight:
        with flight.filled():
            await engine.begun(2)
        for seed in (10, 11):
            engine.answers[seed].set_result(EndReason.COMPLETED)
            await flight.until_changed()
        assert sorted(queue.batches[0].rollouts) == [10, 11]
        assert engine.asked == [10, 11]
        with flight.filled():
            await engine.begun(4)
        assert engine.asked == [10, 11, 12, 20]


async def test_what_is_recalled_is_asked_again_and_so_is_what_failed() -> None:
    engine, queue = Engine(), queue_of()
    async with InFlight(queue, engine, 3) as flight:
        with flight.filled():
            await engine.begun(3)
            engine.answers[10].set_result(EndReason.COMPLETED)
            await flight.until_changed()
            engine.answers[11].set_result(EndReason.ERROR)
            await flight.until_changed()
            assert flight.failed is not None
            assert flight.failed.seed == 11
            await engine.begun(5)
        await flight.recall()
        assert flight.failed is None
        assert not engine.answers
        assert [request.seed for _, request in queue.wanted(())] == [12, 11, 20, 21, 22]
        with flight.filled():
            await engine.begun(8)
    assert set(engine.asked[5:]) == {11, 12, 20}
    assert not engine.answers  # nor is anything left at its end


async def test_an_error_that_is_none_of_a_rollout_reaches_who_waits() -> None:
    async def ask(request: Request) -> Rollout:
        raise RuntimeError("a fault of ours")

    async with InFlight(queue_of(), ask, 2) as flight:
        with flight.filled(), pytest.raises(RuntimeError, match="of ours"):
            await flight.until_changed()
