"""What a client of a stream sees before its first token, and between tokens: comments."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from espo_gateway.front.gateway import Gateway
from espo_gateway.testing import Body, FakeServer, Script
from tests.helpers.gateway import (
    CHAT,
    COMPLETIONS,
    FAILING,
    GATE,
    GOOD,
    chat_body,
    client_of,
    completion_body,
    gateway_for,
    post,
    raw_request,
)

COMMENT = b": PROCESSING 1"
#: What a client may ask for, and where.
ASKED: dict[str, tuple[str, Body]] = {
    "completion": (COMPLETIONS, completion_body(stream=True)),
    "chat": (CHAT, chat_body(stream=True)),
    "choices": (COMPLETIONS, completion_body(stream=True, n=2)),
    "ids": (COMPLETIONS, completion_body(stream=True, logprobs=1, return_token_ids=True)),
    "unmonitored": (CHAT, chat_body(stream=True, espo={"mode": "off"})),
    "shadow": (CHAT, chat_body(stream=True, espo={"mode": "shadow"})),
}


class Commenting(FakeServer):
    """Sends a comment before everything else, and one after every event."""

    async def _events(self, body: Body, script: Script, chat: bool) -> AsyncIterator[bytes]:
        yield COMMENT + b"\n\n"
        async for data in super()._events(body, script, chat):
            yield data
            if b"[DONE]" not in data:
                yield b":\n\n"


@asynccontextmanager
async def asked(gateway: Gateway, kind: str) -> AsyncIterator[aiohttp.ClientResponse]:
    path, body = ASKED[kind]
    async with (
        aiohttp.ClientSession() as session,
        session.post(gateway.url + path, json=body) as response,
    ):
        yield response


@pytest.mark.parametrize("kind", ASKED)
async def test_a_servers_comment_comes_with_the_head_before_any_token(kind: str) -> None:
    async with (
        Commenting(FAILING, gated=True) as server,
        gateway_for(server) as gateway,
        asked(gateway, kind) as response,
    ):
        assert response.status == 200
        assert await response.content.readuntil(b"\n\n") == COMMENT + b"\n\n"
        assert server.generated == 0
        server.release(1000)
        rest = await response.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        # Those between tokens come, too, and no event is torn by one.
        lines = [line for line in rest.split(b"\n\n") if line]
        assert lines.count(b":") > 3
        for line in lines:
            assert line.startswith((b":", b"data: [")) or json.loads(line.removeprefix(b"data: "))


@pytest.mark.parametrize("split", [None, 1, 7])
async def test_clients_read_the_same_with_comments_and_without(split: int | None) -> None:
    script = Script([GOOD] * 20, split=split)

    async def read(server: FakeServer) -> list[Any]:
        async with (
            server,
            gateway_for(server, sse_keep_alive=0.001) as gateway,
            client_of(gateway.url) as client,
        ):
            create: Any = client.chat.completions.create
            stream = await create(**chat_body(stream=True))
            return [chunk.model_dump() async for chunk in stream]

    assert await read(Commenting(script)) == await read(FakeServer(script))


async def test_a_client_that_does_not_stream_gets_none() -> None:
    async with Commenting(FAILING) as server, gateway_for(server) as gateway:
        status, answer = await post(gateway.url + CHAT, chat_body())
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "aaaaaabb")


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("gate", [GATE, None], ids=["gate", "none"])
async def test_comments_of_our_own_keep_a_silent_stream_alive(
    kind: str, gate: bytes | None
) -> None:
    async with (
        FakeServer(FAILING, gated=True) as server,
        gateway_for(server, gate=gate, sse_keep_alive=0.01) as gateway,
        asked(gateway, kind) as response,
    ):
        for _ in range(3):
            line = await response.content.readuntil(b"\n\n")
            if b'"role"' not in line:
                assert line == b": keep-alive\n\n"
        assert server.generated == 0
        server.release(1)
        while b'"logprobs":' not in line or b'"role"' in line:
            line = await response.content.readuntil(b"\n\n")
        # As long as another, which has none yet, is sent some.
        async with asked(gateway, kind) as other:
            for _ in range(4):
                await other.content.readuntil(b"\n\n")
            server.release(1000)
        rest = await response.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert b"data: {" in rest
        # Nothing between tokens, which need none.
        assert b": keep-alive" not in rest


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("status", [400, 429, 500])
async def test_an_error_has_its_status_however_often_we_would_write(kind: str, status: int) -> None:
    class Slow(FakeServer):
        async def _play(self, *arguments: Any) -> Any:
            await reached.wait()
            return await super()._play(*arguments)

    reached = asyncio.Event()
    settings: dict[str, Any] = {"sse_keep_alive": 0.001, "attempts": 1}
    async with (
        Slow(Script([], status=status)) as server,
        gateway_for(server, **settings) as gateway,
    ):

        async def ask() -> int:
            async with asked(gateway, kind) as response:
                return response.status

        answer = asyncio.create_task(ask())
        await server.until(lambda: server.running > 0)
        await asyncio.sleep(0.01)  # several comments' time
        reached.set()
        assert await answer == status


async def test_a_server_that_fails_after_a_comment_is_told_of_in_the_stream() -> None:
    script = Script([GOOD] * 5, fault="error")
    async with (
        Commenting(script) as server,
        gateway_for(server) as gateway,
        asked(gateway, "completion") as response,
    ):
        *_, error, end, rest = (await response.read()).split(b"\n\n")
        assert response.status == 200
        assert b"engine died" in error
        assert (end, rest) == (b"data: [DONE]", b"")


async def test_a_client_that_leaves_before_the_first_token_is_noticed() -> None:
    async with (
        FakeServer(FAILING, gated=True) as server,
        gateway_for(server, sse_keep_alive=0.001) as gateway,
    ):
        body = completion_body(stream=True)
        reader, writer = await raw_request(gateway.url, COMPLETIONS, body)
        await reader.readuntil(b": keep-alive")
        writer.transport.abort()
        await server.until(lambda: server.aborted == 1)
