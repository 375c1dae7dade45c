"""What the gateway's tests share: a gateway in front of a fake server, scripts, raw clients."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp
from openai import AsyncOpenAI

from espo_gateway.app import running
from espo_gateway.config import Config
from espo_gateway.critic.server import ValueServer
from espo_gateway.front.gateway import Gateway
from espo_gateway.testing import FakeServer, Script, Token
from espo_gateway.testing.critic import FakeCritic

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

GOOD = Token("a", -0.1, None, 1)
BAD = Token("b", -8.0, -0.1, 2)

#: z passes 1 with the second BAD token in a row: 0.1·7.9 = 0.79, then 0.9·0.79 + 0.79 = 1.50.
GATE = json.dumps(
    {"version": 3, "weights_version": "w5", "rule": "regret-only", "beta": 1.0}
).encode()

CRITIC_GATE = json.dumps(
    {"rule": "value-gated", "value": "critic", "beta": 2.0, "epsilon": 0.5}
).encode()

#: Stopped at token 8, with ids 1 1 1 1 1 1 2 2.
FAILING = Script([GOOD] * 6 + [BAD] * 10)
LONG = Script([GOOD] * 6 + [BAD] * 10_000)


class Server(Protocol):
    """Whatever has a URL that a gateway can stand before."""

    @property
    def url(self) -> str: ...


@asynccontextmanager
async def gateway_for(
    *servers: Server,
    gate: bytes | None = GATE,
    critic: ValueServer | str | None = None,
    **settings: Any,
) -> AsyncIterator[Gateway]:
    urls = tuple(server.url for server in servers)
    url, critic = (critic, None) if isinstance(critic, str) else (None, critic)
    config = Config(urls, url, port=0, gate=gate, drain_timeout=0.5, **settings)
    async with running(config, critic=critic) as gateway:
        yield gateway


def client_of(url: str, api_key: str = "none") -> AsyncOpenAI:
    """To be entered: one that is dropped open ends in a task of whatever loop runs by then."""
    return AsyncOpenAI(base_url=url + "/v1", api_key=api_key, max_retries=0)


def completion_body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "p", "max_tokens": 100, **fields}


def chat_body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "p"}]
    return {"model": "fake", "messages": messages, "max_tokens": 100, **fields}


async def post(url: str, body: Any) -> tuple[int, Any]:
    """Status and JSON answer."""
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        return response.status, await response.json()


async def post_stream(url: str, body: Any) -> list[dict[str, Any]]:
    """The chunks of an event stream, which must end with [DONE]."""
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        events = (await response.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


async def get_text(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return await response.text()


async def until_running(server: FakeServer | FakeCritic, count: int) -> None:
    """Wait until just so many generations, or questions, are under way."""
    await server.until(lambda: server.running == count)


async def advance(server: FakeServer, tokens: int) -> None:
    """Let a gated server's streams have so many more, in turn."""
    for _ in range(tokens):
        sent = server.generated + 1
        server.release()
        await until_sent(server, sent)


async def until_sent(server: FakeServer, tokens: int) -> None:
    await server.until(lambda: server.generated >= tokens)


async def until_asked(server: FakeServer, requests: int) -> None:
    await server.until(lambda: len(server.bodies) >= requests)


async def until_finished(server: FakeServer, generations: int) -> None:
    await server.until(lambda: server.finished >= generations)


async def metric(gateway: Gateway, name: str) -> float:
    """The sum over a metric's labels."""
    lines = (await get_text(gateway.url + "/metrics")).splitlines()
    starts = (name + " ", name + "{")
    return sum(float(line.split()[-1]) for line in lines if line.startswith(starts))


async def raw_request(
    url: str, path: str, body: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request over a bare TCP connection, that the test can drop when it likes."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer


#: By `start`, in this test.
STARTED: list[asyncio.subprocess.Process] = []


async def start(*arguments: str) -> asyncio.subprocess.Process:
    """The gateway's command; what a test leaves running, a fixture of all tests ends."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "espo_gateway", *arguments),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    STARTED.append(process)
    return process


async def listening(process: asyncio.subprocess.Process) -> tuple[str, str]:
    """The URL it serves, and what it has logged until then."""
    assert process.stderr is not None
    logged = ""
    while line := (await process.stderr.readline()).decode():
        logged += line
        if found := re.search(r"listening on (http://\S+),", line):
            return found[1], logged
    raise AssertionError(logged)


async def generate(url: str, *, chat: bool, stream: bool, **fields: Any) -> dict[str, Any]:
    """One generation; a stream's chunks are put together here, independently of the gateway."""
    body = (chat_body if chat else completion_body)(stream=stream, **fields)
    url += CHAT if chat else COMPLETIONS
    if not stream:
        status, answer = await post(url, body)
        assert status == 200, answer
        choice = answer["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        return {**choice, "text": text, "usage": answer["usage"]}
    chunks = await post_stream(url, {**body, "stream_options": {"include_usage": True}})
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    text = "".join((c["delta"].get("content") or "") if chat else c["text"] for c in choices)
    ids = [i for c in choices for i in c.get("token_ids") or ()]
    assert all("espo" not in choice for choice in choices[:-1])
    return {**choices[-1], "text": text, "token_ids": ids, "usage": chunks[-1]["usage"]}
