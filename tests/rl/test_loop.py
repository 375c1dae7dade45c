"""The loop's side of sampling: what it keeps under way meanwhile, and what a fall costs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from espo_gateway.stop.rules import Gate
from espo_rl import loop as looping
from espo_rl.config import load_recipe
from espo_rl.evaluate.results import EvaluationError, Report
from espo_rl.loop import Loop
from espo_rl.rollouts.in_flight import InFlight
from espo_rl.servers.sampler import Sampler
from espo_rl.servers.server import ServerError
from espo_rl.tasks.grader_pool import GraderPool
from espo_rl.types import EndReason, Request, Rollout
from tests.helpers.models import random_checkpoint

ROOM = 6


class Servers:
    """What stands for fleet and served models. A rollout comes when `let` allows one more."""

    version = "step-0"

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.gates: list[Gate] = []
        self.healed: list[str] = []
        self.fall: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.let = asyncio.Semaphore(0)
        self.moved = asyncio.Condition()

    async def ask(self, request: Request) -> Rollout:
        async with self.moved:
            self.asked.append(request.seed)
            self.moved.notify_all()
        await self.let.acquire()
        return Rollout(
            problem=request.problem,
            prompt_ids=[1],
            token_ids=[2],
            logprobs=np.zeros(1),
            max_logprobs=np.zeros(1),
            text="",
            end=EndReason.COMPLETED,
            kept=1,
            group=request.group,
            seed=request.seed,
        )

    async def until_asked(self, count: int) -> None:
        async with self.moved:
            await self.moved.wait_for(lambda: len(self.asked) >= count)

    # As of a fleet and of served models
    async def failure(self) -> str:
        return await asyncio.shield(self.fall)

    async def push_gate(self, gate: Gate) -> None:
        self.gates.append(gate)

    async def down(self) -> list[Any]:
        return []

    async def new_tokens(self) -> int | None:
        return None

    async def catch_up(self) -> None:
        pass

    async def attempt(self, action: Callable[[], Awaitable[Any]]) -> Any:
        return await action()

    async def heal(self, fault: str) -> bool:
        self.healed.append(fault)
        self.fall = asyncio.get_running_loop().create_future()
        return True


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("base") / "base", 0)


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest_asyncio.fixture
async def loop(base: Path, tmp_path: Path, opened: ExitStack) -> AsyncIterator[Loop]:
    """Batches of four; room for one and a half of them."""
    settings = [
        *(f"model.path={base}", f"run.output={tmp_path}", "logs.tensorboard=false"),
        *("rollout.prompts_per_step=2", "rollout.n=2", "rollout.schedule=refill"),
    ]
    loop = Loop(load_recipe("arithmetic", settings))
    opened.enter_context(loop.log)
    servers: Any = Servers()
    loop.served = loop.fleet = servers
    async with (
        InFlight(loop.queue, servers.ask, ROOM) as flight,
        GraderPool(loop.recipe.task) as loop.grader,
    ):
        loop.sampler = Sampler(loop.queue, flight, servers, servers)
        yield loop


async def test_the_next_step_fills_the_slots_of_this_one(loop: Loop) -> None:
    servers: Any = loop.served
    first = loop.queue.next(0, 9)
    collected = asyncio.create_task(loop.collect(first))
    await servers.until_asked(6)
    assert servers.asked[:4] == list(first.waiting)
    second = loop.queue.batches[1]
    assert servers.asked[4:] == list(second.waiting)[:2]
    # The gateway has the gates of both, the one that is due first.
    assert [gate.version for gate in servers.gates] == [first.gate.version, second.gate.version]
    for _ in range(4):
        servers.let.release()
    await collected
    assert len(first.usable) == len(first.scored) == 4
    assert not loop.stopping.version  # nothing is learnt yet

    loop.queue.batches.popleft()
    async with loop.sampler.meanwhile():
        await servers.until_asked(8)
        servers.let.release()
        while not second.rollouts:  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(0)
    # Nothing new begins, but what is under way goes on.
    loop.queue.next(1, 9)
    servers.let.release()
    while len(second.rollouts) < 2:  # noqa: ASYNC110 (nothing tells)
        await asyncio.sleep(0)
    assert len(servers.asked) == 8


async def test_what_a_fall_costs_is_asked_again_and_nothing_else(loop: Loop) -> None:
    servers: Any = loop.served
    first = loop.queue.next(0, 9)
    collected = asyncio.create_task(loop.collect(first))
    await servers.until_asked(6)
    servers.let.release()
    await servers.until_asked(7)  # one has come
    servers.fall.set_result("the policy server died")
    await servers.until_asked(13)
    assert [fault.splitlines()[0] for fault in servers.healed] == ["the policy server died"]
    there = set(first.rollouts)
    assert len(there) == 1
    assert servers.asked[7:10] == [seed for seed in servers.asked[:4] if seed not in there]
    for _ in range(9):
        servers.let.release()
    await collected
    assert len(first.usable) == 4
    assert first.resampled == 0


async def test_tokens_are_counted_once_where_a_server_did_not_say(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: Any = loop.served
    said = iter([None, 9, 9])

    async def new_tokens() -> int | None:
        return next(said)

    monkeypatch.setattr(servers, "new_tokens", new_tokens)
    loop.queue.ahead = 0
    batch = loop.queue.next(0, 1)
    for _ in batch.waiting:
        servers.let.release()
    await loop.collect(batch)
    assert await loop.count_tokens(batch) == 4  # what came: the nine are of it and of others


async def test_an_evaluation_goes_on_when_the_servers_are_well_again_by_themselves(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: Any = loop.served
    loop.collector = servers
    asked = 0

    async def fails_once(*arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise EvaluationError("everything failed")
        return Report.of([], arguments[3], votes=False)

    async def down() -> list[Any]:
        return ["the server that was slow to answer"]

    async def heal(fault: str) -> bool:
        return False

    monkeypatch.setattr(looping, "evaluate", fails_once)
    monkeypatch.setattr(servers, "down", down)
    monkeypatch.setattr(servers, "heal", heal)
    report = await loop.evaluate()
    assert (asked, report.errors) == (2, [])


async def test_the_gateway_is_told_of_new_weights_by_the_newest_gate(loop: Loop) -> None:
    servers: Any = loop.served
    await loop.announce("step-1")  # nothing is under way that it would concern
    assert servers.gates == []
    loop.queue.next(0, 9)
    await loop.announce("step-1")
    [gate] = servers.gates
    assert gate.weights_version == "step-1"
    assert gate.version == loop.queue.batches[-1].gate.version


async def test_models_are_saved_before_an_evaluation_that_may_fail(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without checkpoints nothing else is left of the run."""

    async def nothing(*_: Any) -> None:
        pass

    async def evaluate(when: str) -> None:
        if when == "after":
            raise ServerError("the policy server is gone")

    loop.step = loop.recipe.run.steps
    monkeypatch.setattr(loop, "start", nothing)
    monkeypatch.setattr(loop, "prove_sampling", nothing)
    monkeypatch.setattr(loop, "evaluate_policy", evaluate)
    with pytest.raises(ServerError, match="is gone"):
        await loop.run()
    assert (loop.recipe.run.output / "actor" / "model.safetensors").exists()
    assert (loop.recipe.run.output / "actor" / "tokenizer.json").exists()


async def test_a_server_that_has_just_started_gets_the_weights_before_they_are_proven(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    async def catch_up() -> None:
        done.append("weights")

    async def prove(*_: Any) -> None:
        done.append("proof")

    monkeypatch.setattr(loop.served, "catch_up", catch_up)
    monkeypatch.setattr(loop.served, "prove_sampling", prove, raising=False)
    monkeypatch.setattr(loop, "prompter", None, raising=False)
    await loop.prove_sampling()
    assert done == ["weights", "proof"]
