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
from espo_rl.loop import Interrupted, Loop
from espo_rl.rollouts.collector import TIMED_OUT
from espo_rl.rollouts.in_flight import InFlight
from espo_rl.servers.sampler import Sampler
from espo_rl.servers.server import ServerError, ServerFellError
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

    async def watched(self, doing: Awaitable[Any]) -> Any:
        return await doing

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


async def test_an_evaluation_goes_on_when_a_server_hung(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: Any = loop.served
    loop.collector = servers
    asked = 0

    async def hangs_once(*arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise ServerFellError("the policy server gave no sign of life")
        return Report.of([], arguments[3], votes=False)

    monkeypatch.setattr(looping, "evaluate", hangs_once)
    await loop.evaluate()
    assert (asked, servers.healed) == (2, ["the policy server gave no sign of life"])


class Steps:
    """The loop's own order, of steps in which nothing happens; every second one is evaluated."""

    def __init__(self, loop: Loop, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
        self.loop = loop
        self.done: list[str] = []
        sections = {
            "run": loop.recipe.run.model_copy(update={"steps": steps}),
            "evaluation": loop.recipe.evaluation.model_copy(update={"every": 2}),
            "checkpoints": loop.recipe.checkpoints.model_copy(update={"every": 2, "keep": 9}),
        }
        loop.recipe = loop.recipe.model_copy(update=sections)
        for name in ("start", "prove_sampling", "evaluate_policy"):
            monkeypatch.setattr(loop, name, self.nothing)
        monkeypatch.setattr(loop, "train_step", self.train)
        monkeypatch.setattr(loop, "evaluate", self.evaluate)
        monkeypatch.setattr(loop.trainer, "save", self.save)
        monkeypatch.setattr(loop.trainer, "save_models", lambda folder: None)

    async def nothing(self, *_: Any) -> None:
        pass

    async def train(self) -> None:
        self.loop.step += 1
        self.done.append(f"step {self.loop.step}")

    async def evaluate(self) -> None:
        self.done.append(f"evaluation {self.loop.step}")
        self.loop.log.write(self.loop.step, evaluation={"avg@1": 0.5})

    def save(self, folder: Path) -> None:
        self.done.append(f"save {self.loop.step}")


@pytest.fixture
def steps(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(loop, monkeypatch, 5)


async def test_a_step_is_saved_before_its_evaluation(steps: Steps) -> None:
    await steps.loop.run()
    assert steps.done == [
        *("step 1", "step 2", "save 2", "evaluation 2"),
        *("step 3", "step 4", "save 4", "evaluation 4", "step 5", "save 5"),
    ]


async def test_a_resumed_run_evaluates_what_no_run_has(steps: Steps) -> None:
    steps.loop.step = 4
    await steps.loop.run()
    assert steps.done == ["evaluation 4", "step 5", "save 5"]
    steps.loop.step = steps.loop.log.start = 4
    steps.done.clear()
    await steps.loop.run()
    assert steps.done == ["step 5", "save 5"]


async def test_an_interrupted_evaluation_is_given_up_and_the_step_is_there(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = asyncio.Event()

    async def long() -> None:
        steps.loop.interrupted.set()
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    monkeypatch.setattr(steps.loop, "evaluate", long)
    with pytest.raises(Interrupted):
        await steps.loop.run()
    assert given_up.is_set()
    assert steps.done == ["step 1", "step 2", "save 2"]


async def test_servers_that_fail_for_good_cost_no_step(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []

    async def fails(*_: Any) -> None:
        raise ServerError("fell 4 times in a row")

    monkeypatch.setattr(loop, "collect", fails)
    monkeypatch.setattr(loop.trainer, "save", lambda folder: saved.append(loop.step))
    loop.step = 3
    with pytest.raises(ServerError, match="4 times"):
        await loop.train_step()
    assert saved == [3]
    newest = loop.checkpoints.newest()
    assert newest is not None
    (batch, _) = loop.checkpoints.read(newest)["batches"]
    assert (batch.step, len(batch.waiting)) == (4, 4)


async def test_what_took_too_long_is_warned_of(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    servers: Any = loop.served
    batch = loop.queue.next(0, 1)
    late = dict.fromkeys([*batch.waiting][:2], f"{TIMED_OUT} = 600 s")
    put = batch.put

    def put_late(rollout: Rollout) -> None:
        if error := late.pop(rollout.seed, None):
            rollout.end, rollout.error = EndReason.ERROR, error
        put(rollout)

    monkeypatch.setattr(batch, "put", put_late)
    for _ in range(6):
        servers.let.release()
    await loop.collect(batch)
    assert "warning: 2 rollouts took longer than rollout.timeout = 600 s" in capsys.readouterr().out
    assert (len(batch.usable), batch.resampled) == (4, 2)


async def test_what_is_taken_back_while_it_is_graded_is_not_scored(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: Any = loop.served
    batch = loop.queue.next(0, 1)
    rounds: list[int] = []

    async def falls(rollouts: list[Rollout], *_: Any) -> None:
        rounds.append(len(rollouts))
        if len(rounds) == 1:  # the grader fails for one, and a server falls
            rollouts[0].end = EndReason.ERROR
            batch.recall_failed()

    monkeypatch.setattr(looping, "score", falls)
    for _ in range(5):
        servers.let.release()
    await loop.collect(batch)
    assert rounds == [4, 1]
    assert batch.scored == set(batch.rollouts)


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
