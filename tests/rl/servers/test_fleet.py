"""The servers of a run: what falls is noticed, named, and brought back."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import torch
from aiohttp import web

from espo_gateway.stop.rules import Gate
from espo_gateway.supervisor import PortInUseError, ServerProcess, ServerStartError, free_port
from espo_gateway.testing import FakeServer, Script
from espo_gateway.vllm_plugin.head_file import fingerprint
from espo_rl.config import Recipe, load_recipe
from espo_rl.servers import server as watched
from espo_rl.servers.fleet import Fleet, make_fleet, seats, served_model
from espo_rl.servers.server import Server, ServerError, ServerFellError
from tests.helpers.gateway import GOOD
from tests.helpers.models import headed, random_model

FAKE = str(Path(__file__).parents[2] / "helpers" / "fake_engine.py")


def server(folder: Path, name: str, *flags: str, samples: bool = False) -> Server:
    port = free_port()
    return Server(
        name,
        f"http://127.0.0.1:{port}",
        [sys.executable, FAKE, str(port), *flags],
        log_path=folder / f"{name}.log",
        samples=samples,
        start_timeout=30.0,
    )


def recipe(**settings: object) -> Recipe:
    overrides = [f"servers.{key}={value}" for key, value in settings.items()]
    return load_recipe("arithmetic", ["model.path=none", *overrides])


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ([], 64),
        (["stopping.sources=['probe']"], 128),
        # The rule reads none.
        (["stopping.sources=['probe']", "stopping.rule=none"], 64),
        (["rollout.schedule=refill"], 65),
        (["rollout.concurrency=5000"], 2048),
    ],
)
def test_what_asks_about_rollouts_has_seats_beside_them(settings: list[str], wanted: int) -> None:
    asked = ["model.path=none", "rollout.concurrency=64", *settings]
    recipe = load_recipe("arithmetic", asked)
    assert seats(recipe) == wanted
    assert seats(recipe, probes=True) >= min(wanted, 128)


class Said(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def said() -> Said:
    return Said()


async def test_a_server_by_url_must_tell_v_by_the_recipes_head(tmp_path: Path) -> None:
    class Headed(FakeServer):
        async def _engine(self, request: web.Request) -> web.Response:
            return web.json_response({"decides": True, "values": True, "head": self.head})

        head: str | None = None

    folder = tmp_path / "head"
    headed(random_model(0)).save_pretrained(folder)
    settings = ["model.path=none", "stopping.sources=['critic']", f"stopping.value_head={folder}"]
    async with Headed(Script([GOOD])) as policy, FakeServer(Script([GOOD])) as unaware:
        for server in (policy, unaware):
            loaded = load_recipe("arithmetic", [*settings, f"servers.policy_urls=['{server.url}']"])
            fleet = make_fleet(loaded, "none", tmp_path, None)
            with pytest.raises(ServerError, match=f"{server.url}.*--value-head.*value_head"):
                await fleet.start(lambda _: None)
        policy.head = fingerprint(folder)
        loaded = load_recipe("arithmetic", [*settings, f"servers.policy_urls=['{policy.url}']"])
        fleet = make_fleet(loaded, "none", tmp_path, None)
        try:
            await fleet.start(lambda _: None)
        finally:
            await fleet.gateway.stop()


Make = Callable[..., Fleet]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[Fleet] = []

    def servers(*flags: str, **settings: object) -> Fleet:
        policy = server(tmp_path, "policy server", *flags, samples=True)
        made.append(Fleet([policy], None, server(tmp_path, "gateway"), recipe(**settings)))
        return made[-1]

    yield servers
    for one in made:
        await asyncio.gather(*(server.stop() for server in one.all))


def child(server: Server) -> psutil.Process:
    """The command itself; `process` is its guard."""
    assert server.process is not None
    return psutil.Process(server.process.pid).children()[0]


async def test_a_server_that_dies_is_named_with_the_end_of_its_log(make: Make, said: Said) -> None:
    servers = make()
    await servers.start(said)
    assert servers.model == "fake"
    failure = asyncio.ensure_future(servers.failure())
    child(servers.policies[0]).kill()
    assert "the policy server died; its log" in await failure
    assert await servers.down() == servers.policies


async def test_a_server_that_makes_no_token_though_it_has_work_hangs(
    make: Make, said: Said
) -> None:
    servers = make("--stuck", hang_timeout=0.2)
    await servers.start(said)
    assert "the policy server gave no sign of life for 0.2 s" in await servers.failure()
    # It still answered, and is ended so that it can be started anew.
    assert await servers.down() == servers.policies


async def test_a_server_that_says_nothing_of_tokens_is_judged_by_its_health(
    make: Make, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, looks = make("--mute", hang_timeout=0.2), 0
    await servers.start(said)

    async def healthy(url: str) -> bool:
        nonlocal looks
        if url.startswith(servers.policies[0].url):
            looks += 1
            if looks == 12:  # four are the time after which silence is a fault
                child(servers.policies[0]).kill()
        return True

    monkeypatch.setattr(watched, "answers", healthy)
    assert "the policy server died" in await servers.failure()


async def test_what_is_watched_is_given_up_when_a_server_falls(make: Make, said: Said) -> None:
    servers = make("--stuck", hang_timeout=0.2)
    await servers.start(said)
    assert await servers.watched(asyncio.sleep(0, "done")) == "done"
    given_up = asyncio.Event()

    async def long() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    with pytest.raises(ServerFellError, match="no sign of life"):
        await servers.watched(long())
    assert given_up.is_set()


async def test_one_that_gives_no_answer_is_ended(make: Make, said: Said) -> None:
    servers = make()
    await servers.start(said)
    await servers.end(servers.policies[0].url)
    assert await servers.down() == servers.policies


@pytest.mark.slow
async def test_a_stopped_process_hangs(make: Make, said: Said) -> None:
    servers = make(hang_timeout=0.2)
    await servers.start(said)
    failure = asyncio.ensure_future(servers.failure())
    os.kill(child(servers.gateway).pid, signal.SIGSTOP)
    assert "the gateway gave no sign of life" in await failure


async def test_models_sleep_while_the_trainer_updates(make: Make, said: Said) -> None:
    servers = make(sleep=True)
    await servers.start(said)
    (policy,) = servers.policies
    assert policy.process is not None
    async with servers.asleep():
        assert policy.process.log_tail().splitlines()[-1] == "/sleep?level=1"
    assert policy.process.log_tail().splitlines()[-1] == "/wake_up"
    assert servers.gateway.process is not None
    assert "/sleep" not in servers.gateway.process.log_tail()
    # One that has died is found down later; sleeping does not fail for it.
    child(policy).kill()
    await policy.process.wait()
    async with servers.asleep():
        pass


async def test_nobody_sleeps_unless_told_to(make: Make, said: Said) -> None:
    servers = make()
    await servers.start(said)
    async with servers.asleep():
        pass
    (policy,) = servers.policies
    assert policy.process is not None
    assert "/sleep" not in policy.process.log_tail()


async def test_a_server_that_cannot_sleep_is_named(make: Make, said: Said) -> None:
    servers = make("--sleepless", sleep=True)
    await servers.start(said)
    with pytest.raises(ServerError, match="--enable-sleep-mode"):
        async with servers.asleep():
            pass


async def test_a_restarted_server_has_its_address_and_a_log_of_its_own(
    make: Make, said: Said, tmp_path: Path
) -> None:
    servers = make()
    await servers.start(said)
    (policy,) = servers.policies
    child(policy).kill()
    assert isinstance(policy.process, ServerProcess)
    await policy.process.wait()
    assert not await policy.is_up()
    await servers.restart(policy, said)
    assert await policy.is_up()
    assert said == ["restarting the policy server"]
    logs = {path for path in os.listdir(tmp_path) if path.startswith("policy")}
    assert logs == {"policy server.log", "policy server.1.log"}


async def test_a_restart_waits_for_what_still_has_the_port(
    make: Make, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = make()
    (policy,) = servers.policies
    tries: list[int] = []

    def ends_at_the_third(host: str, port: int) -> None:
        tries.append(port)
        if len(tries) < 3:
            raise PortInUseError("in use")

    monkeypatch.setattr(watched, "check_port_free", ends_at_the_third)
    await servers.restart(policy, said)
    assert tries == [urlsplit(policy.url).port] * 3
    assert policy.restarts == 1
    assert await policy.is_up()


async def test_a_server_that_keeps_falling_ends_the_run(make: Make, said: Said) -> None:
    servers = make(restarts=2)
    (policy,) = servers.policies
    policy.command = [*policy.command, "--fail"]
    with pytest.raises(ServerError, match=r"fell 3 times in a row.*restarts = 2") as error:
        await servers.restart(policy, said)
    assert "no memory left" in str(error.value)
    assert sum("restarting" in line for line in said) == 2


async def test_restarts_are_forgotten_once_a_step_is_done(make: Make, said: Said) -> None:
    servers = make(restarts=1)
    await servers.start(said)
    for _ in range(3):
        await servers.restart(servers.policies[0], said)
        servers.forget_restarts()


async def test_a_server_that_cannot_start_leaves_none_behind(make: Make, said: Said) -> None:
    servers = make("--fail")
    with pytest.raises(ServerStartError, match="no memory left"):
        await servers.start(said)


async def test_a_server_by_url_is_waited_for(said: Said, tmp_path: Path) -> None:
    started, told = server(tmp_path, "one"), asyncio.Event()

    def say(text: str) -> None:
        said.append(text)
        told.set()

    given = Server("policy server", started.url, start_timeout=30.0)
    waiting = asyncio.ensure_future(given.start(say))
    await told.wait()
    assert "waiting for the policy server at http://127.0.0.1" in said[0]
    await started.start(said)
    await waiting
    assert len(said) == 1
    await started.stop()


async def test_a_server_by_url_that_does_not_come_is_an_error_with_the_fix(said: Said) -> None:
    given = Server("policy server", f"http://127.0.0.1:{free_port()}", start_timeout=0.0)
    with pytest.raises(ServerError, match=r"does not answer /health; start it, or remove its URL"):
        await given.start(said)


async def test_tokens_are_counted_since_the_last_question_and_from_0_after_a_restart(
    make: Make, said: Said
) -> None:
    servers = make()
    await servers.start(said)
    assert await servers.new_tokens() == 5
    assert await servers.new_tokens() == 5
    await servers.restart(servers.policies[0], said)
    assert await servers.new_tokens() == 5
    await servers.policies[0].stop()
    assert await servers.new_tokens() is None


async def test_a_gate_the_gateway_refuses_is_an_error(make: Make, said: Said) -> None:
    servers = make()
    await servers.start(said)
    with pytest.raises(ServerError, match="refused the gate: beta: must be positive"):
        await servers.push_gate(Gate())


async def test_a_policy_server_that_is_not_there_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerError, match=url):
        await served_model(url)


async def test_the_gateway_starts_also_while_the_policy_server_is_down(tmp_path: Path) -> None:
    """Both may fall at once, and the gateway be missed first."""
    url = f"http://127.0.0.1:{free_port()}"
    made = make_fleet(recipe(policy_urls=[url]), "none", tmp_path, None)
    await made.gateway.start(lambda _: None)
    try:
        assert made.gateway.process is not None
        assert made.gateway.process.alive
    finally:
        await made.gateway.stop()


def test_servers_tell_v_by_a_head_and_no_critic_is_started(tmp_path: Path) -> None:
    base, head = ["model.path=m", 'stopping.sources=["critic"]'], "stopping.value_head=some/head"
    for overrides, asked in (([head], ["engine"]), ([], [])):
        made = make_fleet(load_recipe("arithmetic", [*base, *overrides]), "m", tmp_path, None)
        assert made.critic is None
        for server, flag, values in (
            (made.policies[0], "--value-head", ["some/head"] if overrides else []),
            (made.gateway, "--critic", asked),
            (made.gateway, "--decide", asked),
        ):
            command = server.command
            assert [command[i + 1] for i, one in enumerate(command) if one == flag] == values


@pytest.mark.parametrize(
    ("overrides", "flags"),
    [
        (["servers.weight_transfer=ipc"], ["--weight-transfer-config", '{"backend": "ipc"}']),
        (["servers.sleep=true"], ["--enable-sleep-mode"]),
        ([], []),
    ],
)
def test_servers_are_started_as_their_weights_come(
    overrides: list[str], flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = make_fleet(load_recipe("arithmetic", ["model.path=m", *overrides]), "m", tmp_path, None)
    command = made.policies[0].command
    assert [
        one for one in command if "weight" in one or "sleep" in one or "backend" in one
    ] == flags
