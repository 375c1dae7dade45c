"""The clients: many requests at once over bare connections, with the time of every token."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

#: LiteLLM does not start without one.
KEY = "sk-of-the-benchmark-which-guards-nothing"
#: A chunk with text; the one with the role has an empty content.
_TOKEN = re.compile(rb'"content":\s?"[^"]')
_TOKENS_USED = re.compile(rb'"completion_tokens":\s?(\d+)')


@dataclass
class Round:
    """What one round of requests saw. Times in milliseconds."""

    tokens: int
    seconds: float
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


class BenchmarkError(Exception):
    """A proxy that lost tokens or failed: its numbers would mean nothing."""


def chat_request(tokens: int, *, stream: bool, logprobs: bool) -> dict[str, Any]:
    """A body; with logprobs, as the gateway itself asks its server."""
    messages = [
        {"role": "system", "content": "Reason step by step, then give the answer in a box."},
        {"role": "user", "content": "What is the sum of the first forty odd numbers?"},
    ]
    body: dict[str, Any] = {"model": "policy", "messages": messages, "max_tokens": tokens}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if logprobs:
        body |= {"logprobs": True, "top_logprobs": 2}
        if stream:
            body["stream_options"]["continuous_usage_stats"] = True
    return body


async def run_round(
    url: str, body: dict[str, Any], *, streams: int, spread: float, seed: int
) -> Round:
    """That many requests, begun within `spread` seconds, each read to its end."""
    starts = random.Random(seed)
    delays = [starts.uniform(0.0, spread) for _ in range(streams)]
    began = time.perf_counter()
    clients = await asyncio.gather(*(_request(url, body, delay) for delay in delays))
    result = Round(body["max_tokens"] * streams, time.perf_counter() - began)
    for client in clients:
        client.check(body)
        times = client.times
        if times:
            result.first.append(times[0] - client.sent)
            result.between += [b - a for a, b in itertools.pairwise(times)]
    return result


async def _request(url: str, body: dict[str, Any], delay: float) -> _Client:
    await asyncio.sleep(delay)
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    _, client = await asyncio.get_running_loop().create_connection(
        lambda: _Client(json.dumps(body).encode()), address.hostname, address.port
    )
    await client.closed.wait()
    return client


class _Client(asyncio.Protocol):
    """One request. times: of each token, in milliseconds; empty when it does not stream."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._received: list[bytes] = []
        self.times: list[float] = []
        self.sent = 0.0
        self.closed = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\n"
            f"Authorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(self._body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        transport.write(head.encode() + self._body)
        self.sent = time.perf_counter() * 1e3

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter() * 1e3
        self._received.append(data)
        self.times += [now] * len(_TOKEN.findall(data))

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set()

    def check(self, body: dict[str, Any]) -> None:
        """Raises BenchmarkError unless the whole answer came."""
        answer, tokens = b"".join(self._received), body["max_tokens"]
        if not answer.startswith(b"HTTP/1.1 200"):
            raise BenchmarkError(f"an error instead of an answer: {answer[:400]!r}")
        used = _TOKENS_USED.findall(answer)
        if not used or int(used[-1]) != tokens:
            raise BenchmarkError(f"{used[-1:]} tokens of {tokens} told: {answer[-400:]!r}")
        if not body.get("stream"):
            self.times = []
            return
        if b"data: [DONE]" not in answer or len(_TOKEN.findall(answer)) != tokens:
            raise BenchmarkError(
                f"{len(_TOKEN.findall(answer))} tokens of {tokens}: {answer[-400:]!r}"
            )
