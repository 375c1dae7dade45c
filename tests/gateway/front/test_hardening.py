"""What a hostile or broken client can send, and what of it ever reaches a server."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from espo_gateway.telemetry.metrics import total
from espo_gateway.testing import Fake, FakeServer, Script
from tests.helpers.everything import Everything, everything, get, send
from tests.helpers.gateway import (
    COMPLETIONS,
    GOOD,
    LONG,
    completion_body,
    gateway_for,
    get_text,
    raw_request,
)

# -- paths -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "/v1/../pause",
        "/v1/./../pause",
        "/v1/%2e%2e/pause",
        "/v1/.%2E/pause",
        "/v1/%252e%252e/pause",
        "/v1/%25252e%25252e/pause",
        "/v1//..%2fpause",
        "/v1/..%2fpause",
        "/v1/..%5cpause",
        "/v1/..\\pause",
        "/v1\\..\\pause",
        "/v1/x/..;/..;/pause",
        "/v1/%00",
        "/v1/models%0d%0aX-Evil:%201",
        "/v1//pause",
        "/v1/a//pause",
        "//pause",
        "//host/pause",
        "//host/v1/models",
        "///v1/models",
        "/pause",
        "/%76%31/../pause",
        "http://evil/pause",
        "http://evil/v1/../pause",
        "http://evil//v1/models",
        "/v1",
        "/V1/models",
        "*",
        "v1/models",
        "/v1/../update_weights?x=/v1/",
        "/?/v1/models",
        "/v1/models/../../pause?",
        "/v1/models#/../../pause",
    ],
)
async def test_no_path_leads_out_of_v1(target: str) -> None:
    async with everything() as (server, gateway):
        status, *_ = await send(gateway, get(target))
        reached = [path for _, path, *_ in server.seen]
        assert reached in ([], ["/v1/models"])
        assert (status < 300) == (reached != []), status
        assert status < 500


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        ("/v1/models", "/v1/models"),
        ("/v1/models/", "/v1/models/"),
        ("/v1/models/org%2Fname", "/v1/models/org%2Fname"),
        ("/v1/files/a%20b?x=%2e%2e%2f&y=a+b", None),
        # The host of an absolute target is not where it goes.
        ("http://evil/v1/models?a=1", "/v1/models?a=1"),
        ("http://evil:1/v1/models", "/v1/models"),
    ],
)
async def test_what_is_plain_is_passed_on(target: str, reached: str | None) -> None:
    async with everything() as (server, gateway):
        assert (await send(gateway, get(target)))[0] == 200
        (path,) = [path for _, path, *_ in server.seen]
        assert urlsplit(path).path == urlsplit(reached or target).path
        assert (urlsplit(path).query == "") == ("?" not in target)


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PROPFIND", "BREW"])
async def test_other_methods_are_not_passed_on(method: str) -> None:
    async with everything() as (server, gateway):
        status, *_ = await send(gateway, get("/v1/models").replace(b"GET", method.encode()))
        assert 400 <= status < 500
        assert server.seen == []


# -- headers -----------------------------------------------------------------------------------


async def test_headers_of_the_connection_stay_on_it() -> None:
    headers = [
        "Connection: X-Named, close",
        "Connection: x-other",
        "X-Named: 1",
        "X-Other: 1",
        "Keep-Alive: 5",
        "Proxy-Authorization: Basic eA==",
        "Proxy-Connection: close",
        "TE: trailers",
        "Upgrade: websocket",
        "X-Forwarded-For: 1.1.1.1",
        "x-forwarded-host: evil",
        "X-Forwarded-Proto: https",
        "Forwarded: for=1.1.1.1",
        "X-Real-IP: 1.1.1.1",
        "X-Kept: 1",
        "X-Twice: 1",
        "X-Twice: 2",
    ]
    async with everything() as (server, gateway):
        assert (await send(gateway, get("/v1/models", *headers)))[0] == 200
        ((_, _, seen, _),) = server.seen
    assert seen["Host"] == urlsplit(server.url).netloc
    assert seen.getall("X-Twice") == ["1", "2"]
    names = {name.lower() for name in seen}
    # "close" is our own word: each request has a connection of its own.
    assert names == {"host", "connection", "accept-encoding", "x-kept", "x-twice", "x-request-id"}
    assert seen["Connection"] == "close"


@pytest.mark.parametrize(
    "header",
    [
        "X-Evil: a\rX-Other: b",
        "X-Evil: a\nX-Other : b",
        "X-Evil: a\x00b",
        "X-Folded: a\r\n b",
        "X Evil: a",
        ": a",
        "X-Evil\r\n",
        "X-Long: " + "a" * 20_000,
        "\r\n".join(f"X-{number}: a" for number in range(1000)),
        "Content-Length: 1\r\nContent-Length: 2",
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding : chunked",
        "Content-Length: -1",
        "Content-Length: +1",
        "Content-Length: 0x1",
        "Content-Length: 1, 2",
    ],
)
async def test_malformed_heads_reach_no_server(header: str) -> None:
    async with everything() as (server, gateway):
        head = get("/v1/models", header).replace(b"GET", b"POST")
        smuggled = b"0\r\n\r\n" + get("/v1/smuggled")
        status, *_ = await send(gateway, head + smuggled)
        assert status == 400
        assert server.seen == []


async def test_an_upgrade_is_no_way_past_the_gateway() -> None:
    async with everything() as (server, gateway):
        upgrade = get("/v1/models", "Connection: Upgrade", "Upgrade: h2c", "HTTP2-Settings: x")
        status, *_ = await send(gateway, upgrade + get("/pause"))
        assert status == 200
        assert [path for _, path, *_ in server.seen] == ["/v1/models"]


async def test_headers_the_server_names_as_its_connections_stay_there() -> None:
    class Naming(Everything):
        async def _any(self, request: web.Request) -> web.Response:
            headers = {"Connection": "X-Mine", "X-Mine": "1", "X-Yours": "1"}
            return web.Response(headers=headers)

    async with Naming() as server, gateway_for(server) as gateway:
        _, head, _ = await send(gateway, get("/v1/models"))
    assert b"X-Yours" in head
    assert b"X-Mine" not in head


# -- slow clients ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /v1/models HT", get("/v1/models")[:-2] + b"X-Slow: a", get("/health") + b"GET /h"],
)
async def test_a_head_that_never_ends_is_not_waited_for(sent: bytes) -> None:
    async with everything(request_timeout=0.2) as (server, gateway):
        address = urlsplit(gateway.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(sent)
        await reader.read()  # until the gateway closes it
        writer.close()
        assert server.seen == []


async def test_a_head_that_trickles_is_not_waited_for_either() -> None:
    async with everything(request_timeout=0.3) as (server, gateway):
        address = urlsplit(gateway.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        closed = asyncio.ensure_future(reader.read())
        while not closed.done():
            writer.write(b"a")
            await asyncio.wait([closed], timeout=0.02)
        writer.close()
        assert server.seen == []


async def test_a_body_that_never_ends_is_a_408() -> None:
    async with everything(request_timeout=0.2) as (server, gateway):
        for path in (COMPLETIONS, "/v1/embeddings"):
            head = get(path, "Content-Type: application/json", "Content-Length: 100")
            status, answered, body = await send(gateway, head.replace(b"GET", b"POST") + b"{")
            assert status == 408
            assert b"Connection: close" in answered
            assert "request_timeout" in json.loads(body)["error"]["message"]
        assert server.seen == []
        assert gateway.traffic.count == 0


# -- answers that break ------------------------------------------------------------------------


class Breaks(Fake):
    """Breaks off in the middle of an answer that is no generation."""

    def _add_routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/responses", self._half)

    async def _half(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b'{"output": "ha')
        assert request.transport is not None
        request.transport.abort()
        return response


async def test_an_answer_that_breaks_is_cut_off_not_mixed_with_an_error() -> None:
    async with Breaks() as server, gateway_for(server) as gateway:
        async with (
            aiohttp.ClientSession() as session,
            session.post(gateway.url + "/v1/responses", json={}) as response,
        ):
            assert response.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        assert gateway.traffic.count == 0


async def test_an_unmonitored_stream_that_breaks_ends_with_an_error_event() -> None:
    script = Script([GOOD] * 100, fault="reset", after=3)
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        body = completion_body(stream=True, espo={"mode": "off"})
        async with (
            aiohttp.ClientSession() as session,
            session.post(gateway.url + COMPLETIONS, json=body) as response,
        ):
            assert response.status == 200
            *events, end, rest = (await response.read()).split(b"\n\n")
    assert (end, rest) == (b"data: [DONE]", b"")
    *tokens, error = (json.loads(event.removeprefix(b"data: ")) for event in events)
    assert [token["choices"][0]["text"] for token in tokens] == [GOOD.text] * 3
    assert "broke off" in error["error"]["message"]


@pytest.mark.parametrize(("fault", "after", "status"), [("reset", 3, 200), ("no-body", 0, 503)])
async def test_an_unmonitored_stream_that_breaks_counts_against_its_server(
    fault: Any, after: int, status: int
) -> None:
    script = Script([GOOD] * 100, fault=fault, after=after)
    async with FakeServer(script) as server, gateway_for(server, attempts=1) as gateway:
        body = completion_body(stream=True, espo={"mode": "off"})
        for _ in range(2):
            async with (
                aiohttp.ClientSession() as session,
                session.post(gateway.url + COMPLETIONS, json=body) as response,
            ):
                assert response.status == status
                await response.read()
        assert gateway.pool.servers[0].breaker.failures == 2


async def test_a_departed_client_is_not_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeServer(LONG, gated=True) as server, gateway_for(server) as gateway:
        address = urlsplit(gateway.url)
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        data = json.dumps(completion_body(stream=True)).encode()
        head = get(COMPLETIONS, "Content-Type: application/json", f"Content-Length: {len(data)}")
        writer.write(head.replace(b"GET", b"POST") + data)
        await server.until(lambda: server.running == 1)
        writer.transport.abort()
        await server.until(lambda: server.aborted == 1)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("n", [1, 2])
async def test_nor_is_one_that_was_slow(n: int, caplog: pytest.LogCaptureFixture) -> None:
    """What waits for it is told of its departure in another way than what writes to it."""
    script = Script([GOOD._replace(text="a" * 10_000)] * 100_000)
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        body = completion_body(stream=True, n=n, max_tokens=100_000)
        _, writer = await raw_request(gateway.url, COMPLETIONS, body)
        await server.until(lambda: server.running == n)
        sent = -1
        while server.generated > sent:  # until all wait for the client
            sent = server.generated
            await get_text(gateway.url + "/health")
        writer.transport.abort()
        await server.until(lambda: server.aborted == n)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert total(gateway.metrics.requests, status="499") == 1
