"""What the start finds out about the servers, what it says, and when it refuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from espo_gateway.config import Config
from espo_gateway.errors import UpstreamError
from espo_gateway.front.auth import read_keys
from espo_gateway.startup import check_servers
from espo_gateway.testing import FakeServer, Script
from tests.helpers.critics import LockedCritic
from tests.helpers.gateway import GOOD, listening, start

FINE = Script([GOOD._replace(logprob=-1.0)] * 10)


class Found:
    """Checks a configuration; what it logged."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        caplog.set_level(logging.INFO)

    async def __call__(self, *servers: FakeServer, **settings: Any) -> str:
        self._caplog.clear()
        config = Config(tuple(server.url for server in servers), **settings)
        await check_servers(config, read_keys(config))
        return self._caplog.text


@pytest.fixture
def found(caplog: pytest.LogCaptureFixture) -> Found:
    return Found(caplog)


async def test_the_start_says_what_it_found() -> None:
    async with FakeServer(FINE) as one, FakeServer(FINE) as two:
        process = await start("--upstream", one.url, two.url, "--port", "0", "--max-queue", "7")
        _, logged = await listening(process)
        process.terminate()
        assert await process.wait() == 0
    for url in (one.url, two.url):
        assert f"{url} serves fake, logprobs raw" in logged
    for said in ("4096 requests in flight and 7 waiting", "no API keys", "rule none"):
        assert said in logged
    assert "administration from this machine, without key" in logged
    assert "WARNING" not in logged


async def test_processed_logprobs_are_recognized(found: Found) -> None:
    def script(body: dict[str, Any]) -> Script:
        return Script([GOOD._replace(logprob=-1.0 / body["temperature"])])

    async with FakeServer(script) as server:
        assert "logprobs processed" in await found(server)


async def test_a_certain_model_does_not_tell(found: Found) -> None:
    async with FakeServer(Script([GOOD._replace(logprob=-1e-5)])) as server:
        assert "logprobs unknown (it is too certain" in await found(server)


async def test_a_server_of_chats_only(found: Found) -> None:
    class Chats(FakeServer):
        async def _generate(self, request: web.Request) -> web.StreamResponse:
            if request.path == "/v1/completions":
                raise web.HTTPNotFound
            return await super()._generate(request)

    async with Chats(FINE) as server:
        assert "logprobs raw" in await found(server)


@pytest.mark.parametrize(
    "script", [Script([GOOD], logprobs=False), Script([GOOD], status=400)], ids=["none", "refused"]
)
async def test_a_server_without_logprobs(script: Script, found: Found) -> None:
    async with FakeServer(script) as server:
        told = "gives no logprobs, without which nothing can be stopped"
        assert told in await found(server)
        with pytest.raises(UpstreamError, match="unmonitored=refuse would refuse every request"):
            await found(server, unmonitored="refuse")


async def test_a_server_with_too_few_logprobs_for_chats(found: Found) -> None:
    def script(body: dict[str, Any]) -> Script:
        return Script([GOOD], status=400) if body["logprobs"] > 1 else FINE

    async with FakeServer(script) as server:
        said = await found(server, unmonitored="refuse")
        assert "logprobs one (HTTP 400: as scripted)" in said
        assert "refuses 2 logprobs a token, without which no chat can be stopped" in said


async def test_a_server_that_fails_at_the_start_may_recover(found: Found) -> None:
    async with FakeServer(Script([GOOD], status=500)) as server:
        assert "logprobs unknown (HTTP 500" in await found(server, unmonitored="refuse")


class Locked(FakeServer):
    async def _models(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer right":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"data": [{"id": "locked", "max_model_len": 512}]})


async def test_a_server_that_wants_a_key(found: Found, tmp_path: Path) -> None:
    (path := tmp_path / "key").write_text("right")
    async with Locked(FINE) as server:
        assert "serves locked (max_model_len 512)" in await found(server, upstream_key_file=path)
        assert [headers["Authorization"] for headers in server.headers] == ["Bearer right"] * 2
        with pytest.raises(UpstreamError, match="refuses the upstream key: HTTP 401: Unauth"):
            await found(server, upstream_key="wrong")
        with pytest.raises(UpstreamError, match=r"wants a key, and there is none.*upstream-key"):
            await found(server, api_keys=("right",))
        # Without keys of its own the gateway hands on the clients'.
        assert "clients must send theirs" in await found(server)


async def test_a_critic_that_wants_a_key(found: Found) -> None:
    async with FakeServer(FINE) as server, LockedCritic(lambda prefix: 0.0) as critic:
        said = await found(server, critic=critic.url, upstream_key="right")
        assert f"{critic.url} serves critic" in said
        with pytest.raises(UpstreamError, match="gives no values"):
            await found(server, critic=critic.url)


async def test_different_models_are_told(found: Found) -> None:
    async with FakeServer(FINE) as one, Locked(FINE) as two:
        told = "the servers serve different models"
        assert told in await found(one, two, upstream_key="right")
        assert told not in await found(one, one)


async def test_a_bad_key_file_ends_the_start(tmp_path: Path) -> None:
    process = await start("--upstream", "http://127.0.0.1:9", "--admin-key-file", f"{tmp_path}/no")
    _, stderr = await process.communicate()
    assert process.returncode == 1
    last = stderr.decode().splitlines()[-1]
    assert "admin_key_file: cannot read" in last
    assert "No such file" in last


async def test_a_server_that_should_know_v_and_does_not(found: Found) -> None:
    async with FakeServer(FINE, decides=True, values=True) as server:
        await found(server, critic="engine")
        server.values = False
        with pytest.raises(UpstreamError, match=r"tells no V; .* --value-head"):
            await found(server, critic="engine")
    async with FakeServer(FINE) as plain:
        with pytest.raises(UpstreamError, match="tells no V"):
            await found(plain, critic="engine")
