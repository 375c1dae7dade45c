"""Bodies as clients send them: which are refused, which are taken as servers take them."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from espo_gateway.front.gateway import Gateway
from espo_gateway.testing import FakeServer
from tests.helpers.everything import everything, get, send
from tests.helpers.gateway import (
    COMPLETIONS,
    FAILING,
    completion_body,
    gateway_for,
    post,
    post_stream,
)


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
