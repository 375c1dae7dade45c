"""How a gateway ends: running requests finish, new ones are sent elsewhere, nobody holds it up."""

from __future__ import annotations

import asyncio
import signal
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from espo_gateway.app import running
from espo_gateway.config import Config
from espo_gateway.testing import FakeServer, Script
from tests.helpers.gateway import (
    COMPLETIONS,
    FAILING,
    GOOD,
    LONG,
    completion_body,
    gateway_for,
    get_text,
    listening,
    post,
    post_stream,
    raw_request,
    start,
)

FINE = Script([GOOD] * 10)


async def get(url: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.json()


async def test_health_and_readiness() -> None:
    async with FakeServer(FINE) as server, gateway_for(server) as gateway:
        assert await get(gateway.url + "/health") == (200, {"status": "ok"})
        status, body = await get(gateway.url + "/ready")
        assert (status, body["status"], body["upstreams"][0]["url"]) == (200, "ok", server.url)
        gateway.drain()
        assert (await get(gateway.url + "/health"))[0] == 200
        status, body = await get(gateway.url + "/ready")
        assert (status, body["status"]) == (503, "draining")
    async with FakeServer(FINE) as server, gateway_for(server) as gateway:
        await server.stop()
        assert (await get(gateway.url + "/health"))[0] == 200
        status, body = await get(gateway.url + "/ready")
        assert (status, body["status"]) == (503, "no upstream answers")


@pytest.mark.parametrize("stream", [True, False])
async def test_running_requests_finish_and_new_ones_are_refused(stream: bool) -> None:
    async with FakeServer(FINE, gated=True) as server:
        config = Config((server.url,), port=0, drain_timeout=30.0)
        async with running(config) as gateway:
            url = gateway.url + COMPLETIONS
            ask = post_stream if stream else post
            first = asyncio.ensure_future(ask(url, completion_body(stream=stream)))
            await server.until(lambda: server.running == 1)
            gateway.drain()
            async with aiohttp.ClientSession() as session:
                for path in (COMPLETIONS, "/v1/embeddings"):
                    async with session.post(gateway.url + path, json=completion_body()) as refused:
                        assert refused.status == 503
                        assert refused.headers["Connection"] == "close"
                        assert "another" in (await refused.json())["error"]["message"]
            server.release(10)
        # Leaving the block has waited for it.
        answer: Any = await first
        choice = answer[-1]["choices"][0] if stream else answer[1]["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert (server.finished, server.aborted) == (1, 0)


@pytest.mark.parametrize("drain_timeout", [0.0, 0.1])
async def test_the_drain_timeout_ends_what_does_not_finish(drain_timeout: float) -> None:
    async with FakeServer(LONG, gated=True) as server:
        async with running(Config((server.url,), port=0, drain_timeout=drain_timeout)) as gateway:
            reader, writer = await raw_request(gateway.url, COMPLETIONS, completion_body())
            await server.until(lambda: server.running == 1)
        assert await reader.read() == b""
        writer.close()
        await server.until(lambda: server.aborted == 1)
        assert gateway.traffic.count == 0


async def test_idle_connections_hold_nothing_up() -> None:
    async with FakeServer(FINE) as server:
        async with running(Config((server.url,), port=0, drain_timeout=600.0)) as gateway:
            session = aiohttp.ClientSession()
            async with session.get(gateway.url + "/health") as response:
                await response.read()
            address = urlsplit(gateway.url)
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(b"GET /v1/mod")
        assert await reader.read() == b""
        writer.close()
        await session.close()


async def test_a_client_that_does_not_read_holds_nothing_up() -> None:
    async with FakeServer(LONG) as server:
        config = Config((server.url,), port=0, drain_timeout=0.2)
        async with running(config) as gateway:
            body = completion_body(stream=True, max_tokens=10_000)
            _, writer = await raw_request(gateway.url, COMPLETIONS, body)
            await server.until(lambda: server.generated > 100)
        writer.transport.abort()
        assert gateway.traffic.count == 0


async def test_the_command_lets_streams_finish() -> None:
    async with FakeServer(FINE, gated=True) as server:
        server.release(2)
        process = await start("--upstream", server.url, "--port", "0")
        try:
            url, _ = await listening(process)
            stream = asyncio.ensure_future(
                post_stream(url + COMPLETIONS, completion_body(stream=True))
            )
            await server.until(lambda: server.running == 1)
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            assert b"stopping when 1 running requests" in await process.stderr.readline()
            status, body = await get(url + "/ready")
            assert (status, body["status"]) == (503, "draining")
            assert (await post(url + COMPLETIONS, completion_body()))[0] == 503
            assert process.returncode is None
            server.release(10)
            assert (await stream)[-1]["choices"][0]["finish_reason"] == "stop"
            assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_at_once(second: signal.Signals) -> None:
    async with FakeServer(LONG, gated=True) as server:
        server.release(2)
        process = await start("--upstream", server.url, "--port", "0")
        try:
            url, _ = await listening(process)
            reader, writer = await raw_request(url, COMPLETIONS, completion_body(stream=True))
            await server.until(lambda: server.running == 1)
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            assert b"stopping when 1" in await process.stderr.readline()
            process.send_signal(second)
            assert await process.wait() == 0
            assert await reader.read() == b""
            writer.close()
            await server.until(lambda: server.aborted == 1)
        finally:
            if process.returncode is None:
                process.kill()


async def test_sighup_reads_keys_and_gate_again(tmp_path: Any) -> None:
    (keys := tmp_path / "keys").write_text("key-1\n")
    (gate := tmp_path / "gate.json").write_text("{}")
    keys.chmod(0o600)
    async with FakeServer(FAILING) as server:
        process = await start(
            *("--upstream", server.url, "--port", "0"),
            *("--api-keys-file", str(keys), "--gate", str(gate)),
        )
        try:
            url, logged = await listening(process)
            assert "1 API keys" in logged
            assert process.stderr is not None
            keys.write_text("")
            process.send_signal(signal.SIGHUP)
            line = (await process.stderr.readline()).decode()
            assert "nothing was read again: api_keys_file" in line
            keys.write_text("key-1\nkey-2\n")
            for wrong, said in {"[": "JSON", '{"rule": "nope"}': "rule", None: "No such"}.items():
                gate.unlink() if wrong is None else gate.write_text(wrong)
                process.send_signal(signal.SIGHUP)
                line = (await process.stderr.readline()).decode()
                assert f"nothing was read again: --gate {gate}: " in line
                assert said in line
            gate.write_text('{"rule": "regret-only", "beta": 7.0}')
            process.send_signal(signal.SIGHUP)
            assert b"2 API keys" in await process.stderr.readline()
            assert "invalid_api_key" in await get_text(url + "/v1/models")
        finally:
            process.terminate()
            assert await process.wait() == 0


async def test_sighup_does_not_end_one_that_waits_for_its_servers(tmp_path: Any) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    class Busy(FakeServer):
        async def _models(self, request: web.Request) -> web.Response:
            asked.set()
            await go_on.wait()
            return await super()._models(request)

    (keys := tmp_path / "keys").write_text("key-1\n")
    async with Busy(FINE) as server:
        process = await start(
            *("--upstream", server.url, "--port", "0", "--wait", "60"),
            *("--api-keys-file", str(keys)),
        )
        try:
            await asked.wait()
            process.send_signal(signal.SIGHUP)
            go_on.set()
            _, logged = await listening(process)
            assert "read keys and gate again: 1 API keys" in logged
        finally:
            process.terminate()
            assert await process.wait() == 0
