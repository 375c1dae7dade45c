"""What a request is, however its path is spelt: monitored, counted and marked, or refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from espo_gateway.front.gateway import Gateway
from espo_gateway.testing import FakeServer
from tests.helpers.gateway import (
    FAILING,
    chat_body,
    gateway_for,
    get_text,
    metric,
)

#: Spellings of a monitored route; %s is its first segment after /v1/ or its last.
SPELLINGS = [
    "/v1/chat/completions",
    "/v1/chat/completions/",
    "/v1/chat/completions//",
    "/v1/chat%2Fcompletions",
    "/v1/chat%2fcompletions/",
    "/v1/chat%252Fcompletions",
    "/v1/chat%5Ccompletions",
    "/v1/chat\\completions",
    "/v1//chat/completions",
    "//v1/chat/completions",
    "///v1/chat/completions",
    "/v1/./chat/completions",
    "/v1/chat/../chat/completions",
    "/v1%2Fchat%2Fcompletions",
    "/%76%31/chat/%63ompletions",
    "/v1/chat/completions;x=1",
    "/v1/chat;a/completions",
    "/v1/chat/completions%3Bx",
    "/v1/chat/completions%3Fx=1",
    "/v1/chat/completions%23x",
    "/v1/chat/completions%20",
    "/v1/Chat/Completions",
    "/V1/chat/completions",
    "/v1/chat/completions?x=1",
    "http://elsewhere/v1/chat/completions",
    "/v1/completions/",
    "/v1/%63ompletions%2F",
]
#: Routes of vLLM and others that generate and that nobody monitors.
GENERATING = [
    "/v1/responses",
    "/v1/messages",
    "/v1/chat/completions/batch",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/engines/some-model/completions",
    "/v1/deployments/m/chat/completions",
    "/v1/fim/completions",
    "/v1/batches",
    "/v1/messages/batches",
    "/v1/complete",
    "/v1/threads/runs",
    "/v1/threads/t1/runs",
]
#: Others, which generate nothing.
OTHERS = [
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/score"),
    ("POST", "/v1/rerank"),
    ("POST", "/v1/moderations"),
    ("POST", "/v1/files"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/responses/r1/cancel"),
    ("POST", "/v1/chat/completions/render"),
    ("POST", "/v1/completions/derender"),
    ("GET", "/v1/responses/r1"),
    ("GET", "/v1/chat/completions/c1"),
    ("DELETE", "/v1/responses/r1"),
    ("GET", "/v1/models"),
]
REASON = "a route that has no monitor"


class Lenient(FakeServer):
    """Serves whatever comes; as a chat what looks like one when it is decoded and tidied up."""

    def __init__(self, script: Any = FAILING) -> None:
        super().__init__(script)
        self.passed: list[str] = []

    def _add_routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_route("*", "/{path:.*}", self._any)

    async def _any(self, request: web.Request) -> web.StreamResponse:
        self.passed.append(request.path)
        return web.json_response({"object": "response"})


@asynccontextmanager
async def lenient(**settings: Any) -> AsyncIterator[tuple[Lenient, Gateway]]:
    # Else the gateway asks the server who decides, and what is seen is not the client's alone.
    settings = {"decide": "gateway", **settings}
    async with Lenient() as server, gateway_for(server, **settings) as gateway:
        yield server, gateway


async def send(gateway: Gateway, target: str) -> tuple[int, Any]:
    """A chat to a target that no client tidies up; status and answer."""
    data = json.dumps({**chat_body(), "prompt": "p"}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.split(":")[-1]))
    head = f"POST {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    answered = await reader.read()
    writer.close()
    body = answered.partition(b"\r\n\r\n")[2]
    return int(answered.split()[1]), json.loads(body) if body.startswith(b"{") else body


@pytest.mark.parametrize("unmonitored", ["pass", "refuse"])
@pytest.mark.parametrize("target", SPELLINGS)
async def test_no_spelling_of_a_route_is_a_way_around_the_monitor(
    target: str, unmonitored: str
) -> None:
    async with lenient(unmonitored=unmonitored) as (server, gateway):
        status, answer = await send(gateway, target)
        assert server.passed == []
        if status == 200:
            assert answer["choices"][0]["espo"]["stopped"]
            assert server.bodies[0]["stream"] is True
        else:
            assert status in (400, 404)
            assert server.bodies == []


@pytest.mark.parametrize("target", [s for s in SPELLINGS if s.endswith(("/", "%2Fcompletions"))])
async def test_what_servers_would_serve_is_served(target: str) -> None:
    async with lenient() as (server, gateway):
        status, _ = await send(gateway, target)
        assert (status == 200) == ("//" not in target and "v1%2F" not in target)
        assert len(server.bodies) == (status == 200)


def spelt(text: str, how: list[int]) -> str:
    """Every character as it is, encoded once, or encoded twice."""
    ways = (lambda c: c, lambda c: f"%{ord(c):02x}", lambda c: quote(f"%{ord(c):02X}"))
    return "".join(ways[how[i % len(how)]](c) for i, c in enumerate(text))


@given(
    st.sampled_from(["chat/completions", "completions", "responses", "messages"]),
    st.lists(st.integers(0, 2), min_size=1, max_size=7),
    st.sampled_from(["", "/", ";a", "?b", "%3Fb", "%20", "%2f"]),
)
def test_nor_is_any_encoding(route: str, how: list[int], end: str) -> None:
    async def play() -> None:
        async with lenient(unmonitored="refuse", max_request_bytes=10_000) as (server, gateway):
            status, answer = await send(gateway, "/v1/" + spelt(route, how) + end)
            assert server.passed == []
            assert status == 400 or answer["choices"][0]["espo"]["stopped"]

    asyncio.run(play())


# -- routes without a monitor ------------------------------------------------------------------


@pytest.mark.parametrize("path", GENERATING)
async def test_generations_that_nobody_monitors_are_counted_marked_and_limited(path: str) -> None:
    async with (
        lenient(max_in_flight=1, max_queue=0) as (server, gateway),
        aiohttp.ClientSession() as session,
    ):
        async with session.post(gateway.url + path, json={"model": "m", "input": "x"}) as response:
            assert (response.status, await response.json()) == (200, {"object": "response"})
            assert response.headers["X-Espo-Unmonitored"] == f"{REASON}: {path}"
        assert server.passed == [path]
        counted = f'espo_gateway_unmonitored_requests_total{{reason="{REASON}"}} 1.0'
        assert counted in await get_text(gateway.url + "/metrics")
        async with (
            gateway.admission.slot(),
            session.post(gateway.url + path, json={}) as response,
        ):
            assert response.status == 429
        assert server.passed == [path]


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("end", ["", "/", "?stream=1"])
async def test_they_are_refused_when_told_so(path: str, end: str) -> None:
    async with (
        lenient(unmonitored="refuse") as (server, gateway),
        aiohttp.ClientSession() as session,
        session.post(gateway.url + path + end, data=b"not JSON") as response,
    ):
        assert response.status == 400
        error = (await response.json())["error"]
        assert error["type"] == "invalid_request_error"
        assert path in error["message"]
        assert "--unmonitored pass" in error["message"]
        assert server.passed == []


@pytest.mark.parametrize("unmonitored", ["pass", "refuse"])
@pytest.mark.parametrize(("method", "path"), OTHERS)
async def test_what_generates_nothing_is_passed_as_before(
    method: str, path: str, unmonitored: str
) -> None:
    async with (
        lenient(unmonitored=unmonitored, max_in_flight=1, max_queue=0) as (server, gateway),
        gateway.admission.slot(),
        aiohttp.ClientSession() as session,
        session.request(method, URL(gateway.url + path)) as response,
    ):
        assert response.status == 200
        assert "X-Espo-Unmonitored" not in response.headers
        assert await metric(gateway, "espo_gateway_unmonitored_requests_total") == 0
        assert server.passed in ([path], [])  # the models are the fake's own
