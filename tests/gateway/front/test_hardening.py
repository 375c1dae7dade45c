"""What a hostile or broken client can send, and what of it ever reaches a server."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from espo_gateway.front.gateway import Gateway
from espo_gateway.testing import Fake, FakeServer, Script
from tests.helpers.gateway import (
    COMPLETIONS,
    FAILING,
    GOOD,
    LONG,
    completion_body,
    gateway_for,
    post,
    post_stream,
)


class Everything(Fake):
    """Answers every route with 200, and tells what came: as a vLLM whose routes are all open."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, Any, bytes]] = []

    def _add_routes(self, app: web.Application) -> None:
        app.router.add_route("*", "/{path:.*}", self._any)

    async def _models(self, request: web.Request) -> web.Response:
        return await self._any(request)

    async def _any(self, request: web.Request) -> web.Response:
        seen = (request.method, request.raw_path, request.headers.copy(), await request.read())
        self.seen.append(seen)
        return web.json_response({"data": [{"id": "fake"}]})


@asynccontextmanager
async def everything(**settings: Any) -> AsyncIterator[tuple[Everything, Gateway]]:
    # Else the gateway asks the server who decides, and what is seen is not the client's alone.
    settings = {"decide": "gateway", **settings}
    async with Everything() as server, gateway_for(server, **settings) as gateway:
        server.seen.clear()
        yield server, gateway


async def send(gateway: Gateway, data: bytes) -> tuple[int, bytes, bytes]:
    """Raw bytes; status, head and the rest, until the gateway closes or the answer is complete."""
    address = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (
                int(line.split(b":")[1])
                for line in head.lower().split(b"\r\n")
                if b"content-length" in line
            ),
            0,
        )
        body = await reader.readexactly(length)
        return int(head.split()[1]), head, body
    finally:
        writer.close()


def get(target: str, *headers: str) -> bytes:
    head = [f"GET {target} HTTP/1.1", "Host: localhost", *headers, "", ""]
    return "\r\n".join(head).encode("latin-1")


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


# -- bodies ------------------------------------------------------------------------------------


async def raw(
    gateway: Gateway, data: bytes, path: str = COMPLETIONS, **headers: str
) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post(URL(gateway.url + path, encoded=True), data=data, headers=headers) as response,
    ):
        return response.status, await response.json()


DEEP = b"[" * 100_000
BAD_JSON = [
    b"",
    b" ",
    b"{",
    b"nonsense",
    b"[]",
    b'"text"',
    b"null",
    b"1",
    b"\xef\xbb\xbf{",
    b"\xef\xbb\xbf",
    b"\xff\xfe{",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"\\udfff": 1}',
    b'{"temperature": NaN}',
    b'{"temperature": -Infinity}',
    b'{"temperature": 1e999}',
    b'{"seed": 1' + b"0" * 5000 + b"}",
    DEEP,
    DEEP + b"]" * len(DEEP),
    b'{"a":' * 100_000,
    b'{"prompt": "a", "espo": ' + DEEP + b"}",
    b'{"espo": {"beta": 1e999}}',
    b'{"espo": {"beta": 1' + b"0" * 400 + b"}}",
    b'{"n": 99999999999999999999999999}',
    b'{"prompt": "a"} {"prompt": "b"}',
]


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions"])
async def test_bad_bodies_are_the_clients_fault(path: str) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        for data in BAD_JSON:
            status, answer = await raw(gateway, data, path)
            assert status == 400, data[:80]
            assert answer["error"]["type"] == "invalid_request_error"
            assert len(answer["error"]["message"]) > 10
        assert server.bodies == []


async def test_bad_gates_are_the_clients_fault_too() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        before = gateway.gate
        for data in (*BAD_JSON, b"\xef\xbb\xbf{}"):
            async with (
                aiohttp.ClientSession() as session,
                session.put(gateway.url + "/espo/gate", data=data) as response,
            ):
                assert response.status == 400, data[:80]
        assert gateway.gate is before


@pytest.mark.parametrize("depth", [100, 400, 800, 900, 940, 960, 980, 1000, 2000])
async def test_no_depth_is_the_gateways_fault(depth: int) -> None:
    async with everything() as (_, gateway):
        nested = b"[" * depth + b"]" * depth
        # Read whole, written anew, and with `espo` off also written as it is.
        for espo in (b"{}", b'{"mode": "off"}'):
            body = b'{"model": "m", "prompt": "a", "x": ' + nested + b', "espo": ' + espo + b"}"
            status, answer = await raw(gateway, body)
            assert status in (200, 400, 502), answer


async def test_the_last_of_two_equal_names_counts_for_monitor_and_server_alike() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        data = b'{"model": "fake", "prompt": "p", "max_tokens": 3, "max_tokens": 5, "n": 2, "n": 1}'
        status, answer = await raw(gateway, data)
        assert (status, len(answer["choices"])) == (200, 1)
        assert [(body["max_tokens"], body["n"]) for body in server.bodies] == [(5, 1)]


async def test_large_numbers_are_left_for_the_server() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        for seed in (2**63, 2**64, 10**30):
            await post(gateway.url + COMPLETIONS, completion_body(seed=seed))
        assert [body["seed"] for body in server.bodies] == [2**63, 2**64, 10**30]


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"]
)
async def test_a_body_that_is_not_called_json(content_type: str) -> None:
    data = json.dumps(completion_body()).encode()
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        status, answer = await raw(gateway, data, **{"Content-Type": content_type})
        assert status == 400
        assert "Content-Type" in answer["error"]["message"]
        assert server.bodies == []
        status, _ = await raw(gateway, data, **{"Content-Type": "Application/JSON; charset=utf-8"})
        assert status == 200


async def test_other_endpoints_are_passed_byte_by_byte() -> None:
    async with everything() as (server, gateway):
        for data in (*BAD_JSON, bytes(range(256)), b"\r\n--x\r\n"):
            headers = {"Content-Type": "weird/thing"}
            assert (await raw(gateway, data, "/v1/audio?a=%2F", **headers))[0] == 200
            method, path, seen, body = server.seen.pop()
            assert (method, path, body) == ("POST", "/v1/audio?a=%2F", data)
            assert seen["Content-Type"] == "weird/thing"


async def test_a_body_that_is_too_large() -> None:
    async with everything(max_request_bytes=1000) as (server, gateway):
        for path in (COMPLETIONS, "/v1/embeddings", "/espo/gate"):
            method = b"PUT" if path == "/espo/gate" else b"POST"
            head = get(path, "Content-Type: application/json").replace(b"GET", method)
            for rest in (
                b"Content-Length: 99999999\r\n\r\n",
                b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 0x400 + b"\r\n",
            ):
                status, answered, body = await send(gateway, head[:-2] + rest)
                assert status == 413
                assert b"Connection: close" in answered
                error = json.loads(body)["error"]
                assert error["type"] == "invalid_request_error"
                assert "max_request_bytes" in error["message"]
        assert server.seen == []
        # Small on the wire, large in memory.
        bomb = gzip.compress(b" " * 10_000_000)
        assert (await raw(gateway, bomb[:900], Content_Encoding="gzip"))[0] in (400, 413)


async def test_a_compressed_body() -> None:
    data = gzip.compress(json.dumps(completion_body()).encode())
    async with everything() as (server, gateway):
        assert (await raw(gateway, data, "/v1/embeddings", Content_Encoding="gzip"))[0] == 200
        ((*_, seen, body),) = server.seen
        assert "Content-Encoding" not in seen
        assert json.loads(body) == completion_body()
        status, answer = await raw(gateway, b"no gzip", Content_Encoding="gzip")
        assert status == 400
        assert "broken" in answer["error"]["message"]


@pytest.mark.parametrize(
    "rest", [b"zz\r\nabc\r\n", b"-1\r\nabc\r\n", b"5\r\nabcdefgh\r\n0\r\n\r\n"]
)
async def test_a_body_whose_framing_is_broken(rest: bytes) -> None:
    async with everything() as (server, gateway):
        head = get(COMPLETIONS, "Content-Type: application/json", "Transfer-Encoding: chunked")
        data = head.replace(b"GET", b"POST") + rest
        status, *_ = await send(gateway, data)
        assert status == 400
        assert server.seen == []


# -- what servers serve ------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
async def test_a_body_in_any_encoding_that_json_may_have(encoding: str) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        data = json.dumps(completion_body(prompt="ü\u2028"), ensure_ascii=False).encode(encoding)
        assert (await raw(gateway, data))[0] == 200
        assert server.bodies[0]["prompt"] == "ü\u2028"


#: Fields that vLLM's types take, and what for.
LAX: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({"n": 2.0}, {"n": 1}, 2),
    ({"n": "2"}, {"n": 1}, 2),
    ({"n": True}, {"n": 1}, 1),
    ({"n": None}, {}, 1),
    ({"n": "2", "seed": "7"}, {"seed": 7}, 2),
    ({"seed": 7.0}, {"seed": 7}, 1),
    ({"stream_options": {}}, {}, 1),
    ({"stream_options": None}, {}, 1),
    ({"stream": "false", "stream_options": {}}, {}, 1),
    ({"stream": 0}, {}, 1),
    ({"logprobs": "2"}, {"logprobs": 2}, 1),
    ({"logprobs": 2.0}, {"logprobs": 2}, 1),
    ({"return_token_ids": "true"}, {"return_token_ids": True}, 1),
    ({"echo": "false"}, {"echo": False}, 1),
    ({"use_beam_search": 0}, {}, 1),
]


@pytest.mark.parametrize(("fields", "sent", "choices"), LAX)
async def test_values_are_taken_as_servers_take_them(
    fields: dict[str, Any], sent: dict[str, Any], choices: int
) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        status, answer = await post(gateway.url + COMPLETIONS, completion_body(**fields))
        assert (status, len(answer["choices"])) == (200, choices)
        assert all(choice["espo"]["stopped"] for choice in answer["choices"])
        assert sent.items() <= server.bodies[0].items()
        logprobs = answer["choices"][0]["logprobs"]
        assert (logprobs is None) == ("logprobs" not in fields)
        assert ("token_ids" in answer["choices"][0]) == ("return_token_ids" in fields)


@pytest.mark.parametrize("stream", ["true", "True", 1, "1", 1.0])
@pytest.mark.parametrize("usage", [True, "true", 1])
async def test_so_is_whether_to_stream(stream: Any, usage: Any) -> None:
    body = completion_body(stream=stream, stream_options={"include_usage": usage})
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        chunks = await post_stream(gateway.url + COMPLETIONS, body)
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2.5},
        {"n": "two"},
        {"n": 0.0},
        {"n": [2]},
        {"stream": "maybe"},
        {"stream": 2},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": "x"},
    ],
)
async def test_what_servers_would_refuse_is_refused(fields: dict[str, Any]) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        status, answer = await post(gateway.url + COMPLETIONS, completion_body(**fields))
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert server.bodies == []


@pytest.mark.parametrize("size", [9_000, 16_000])
@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/embeddings"])
async def test_long_heads_as_servers_take_them(path: str, size: int) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        data = json.dumps(completion_body()).encode()
        assert (await raw(gateway, data, path, X_Long="a" * size))[0] == 200
        assert (await raw(gateway, data, f"{path}?x={'a' * size}"))[0] == 200
        if path == COMPLETIONS:
            assert server.headers[0]["X-Long"] == "a" * size


async def test_many_headers_as_servers_take_them() -> None:
    async with everything() as (server, gateway):
        headers = [f"X-{number}: a" for number in range(200)]
        assert (await send(gateway, get("/v1/models", *headers)))[0] == 200
        ((_, _, seen, _),) = server.seen
        assert seen["X-199"] == "a"


@pytest.mark.parametrize("connection", ["keep-alive", "close", None])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"stream": True}),
        (COMPLETIONS, {"stream": True, "espo": {"mode": "off"}}),
        (COMPLETIONS, {"stream": True, "n": 2}),
        (COMPLETIONS, {}),
        ("/v1/embeddings", {}),
        ("/v1/streamed", {}),
    ],
)
async def test_a_client_of_http_1_0_sees_where_an_answer_ends(
    path: str, fields: dict[str, Any], connection: str | None
) -> None:
    class Streaming(FakeServer):
        def _add_routes(self, app: web.Application) -> None:
            super()._add_routes(app)
            app.router.add_post("/v1/streamed", self._streamed)

        async def _streamed(self, request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"{}")
            return response

    async with Streaming(FAILING) as server, gateway_for(server) as gateway:
        address = urlsplit(gateway.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        data = json.dumps(completion_body(**fields)).encode()
        head = f"POST {path} HTTP/1.0\r\nContent-Type: application/json\r\n"
        head += "" if connection is None else f"Connection: {connection}\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        answered = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert b" 200 " in answered
        assert b"chunked" not in answered
        if b"content-length" in answered:
            length = int(answered.partition(b"content-length: ")[2].split()[0])
            assert json.loads(await reader.readexactly(length))
        else:
            body = await reader.read()  # until the gateway closes
            assert body.endswith(b"data: [DONE]\n\n" if "stream" in fields else b"{}")
        writer.close()


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
