"""A fake vLLM that costs next to nothing: chat streams in vLLM 0.32's own bytes, paced by steps.

A step gives every running stream one token, as an engine's does, so the tokens of many streams
arrive interleaved. The first token comes at once. Nothing of it is for tests: see
`espo_gateway.testing` for a server that is faithful or fails on purpose.

    python -m benchmark.upstream --port 9000 --step-ms 8
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import struct
from typing import Any

from espo_gateway import event_loop

PROMPT_TOKENS = 57
#: Different tokens sent; enough that no proxy profits from their repetition.
VARIETY = 4096

_EVENT_STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


class Chunks:
    """The bytes of every chunk, made beforehand."""

    def __init__(self, *, logprobs: bool, usage: bool) -> None:
        rng = random.Random(0)
        self._usage = usage
        self._choices = [_choice(rng, logprobs) for _ in range(VARIETY)]

    def role(self, id: bytes) -> bytes:
        choice = (
            b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}'
        )
        return self._chunk(id, choice, 0, b',"prompt_token_ids":null,"prompt_text":null')

    def token(self, id: bytes, request: int, number: int, last: bool) -> bytes:
        choice = self._choices[(number + 97 * request) % VARIETY]
        end = b'"length","stop_reason":null' if last else b"null"
        return self._chunk(id, choice % end, number)

    def end(self, id: bytes, tokens: int, usage: bool) -> bytes:
        end = b"data: [DONE]\n\n"
        if usage:
            whole = b'"choices":[],"usage":%b}\n\n' % _usage(tokens, b"")
            end = b"data: " + _head(id) + whole + end
        return end

    def _chunk(self, id: bytes, choice: bytes, tokens: int, more: bytes = b"") -> bytes:
        usage = b""
        if self._usage:
            usage = b',"usage":' + _usage(tokens, b',"completion_tokens_details":null')
        return b'data: %b"choices":[%b]%b%b}\n\n' % (_head(id), choice, usage, more)


def _head(id: bytes) -> bytes:
    return (
        b'{"id":"chatcmpl-%b","object":"chat.completion.chunk","created":1785000000,'
        b'"model":"policy",' % id
    )


def _usage(tokens: int, details: bytes) -> bytes:
    total = PROMPT_TOKENS + tokens
    return b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d%b}' % (
        PROMPT_TOKENS,
        total,
        tokens,
        details,
    )


def _choice(rng: random.Random, logprobs: bool) -> bytes:
    """One token's choice, with a place for the finish reason."""

    def entry(text: str, logprob: float) -> dict[str, Any]:
        # vLLM's logprobs are float32, written with all the digits of a double.
        exact = struct.unpack("f", struct.pack("f", logprob))[0]
        return {"token": text, "logprob": exact, "bytes": list(text.encode())}

    def word() -> str:
        return " " * (rng.random() < 0.7) + "".join(
            rng.choices("etaoinshrdlu", k=rng.choice((1, 2, 3, 3, 4, 5, 7)))
        )

    text, other = word(), word()
    top, second = -rng.expovariate(4.0), -1.0 - rng.expovariate(0.3)
    likeliest = [entry(text, top), entry(other, second)]
    content = {"content": [{**likeliest[0], "top_logprobs": likeliest}]} if logprobs else None
    delta, told = (json.dumps(part, separators=(",", ":")) for part in ({"content": text}, content))
    return (
        f'{{"index":0,"delta":{delta},"logprobs":{told},"finish_reason":%b,"token_ids":null}}'
    ).encode()


class Engine:
    """Steps: each gives every running stream one token."""

    def __init__(self, step: float) -> None:
        self._step = step
        self.running: set[Stream] = set()
        self.requests = 0
        self.chunks = {
            (logprobs, usage): Chunks(logprobs=logprobs, usage=usage)
            for logprobs in (False, True)
            for usage in (False, True)
        }

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            due = max(due + self._step, clock())
            await asyncio.sleep(due - clock())
            for stream in list(self.running):
                stream.step()


class Stream(asyncio.Protocol):
    """One connection: a request after another, each answered by a stream."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._received = b""

    def connection_made(self, transport: Any) -> None:
        self._transport: asyncio.Transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._engine.running.discard(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, rest = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        if len(rest) < length:
            return
        self._received = rest[length:]
        self._closes = b"\r\nconnection: close" in head.lower()
        if head.startswith(b"POST"):
            self._begin(json.loads(rest[:length]))
        else:
            body = b'{"object":"list","data":[{"id":"policy","object":"model"}]}'
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )

    def _begin(self, body: dict[str, Any]) -> None:
        options = body.get("stream_options") or {}
        self._usage = bool(options.get("include_usage"))
        continuous = bool(options.get("continuous_usage_stats"))
        self._chunks = self._engine.chunks[bool(body.get("logprobs")), continuous]
        self._tokens = int(body.get("max_tokens") or body["max_completion_tokens"])
        self._sent = 0
        self._engine.requests += 1
        self._number = self._engine.requests
        self._id = b"%032x" % self._number
        self._transport.write(_EVENT_STREAM)
        self._write(self._chunks.role(self._id))
        self._engine.running.add(self)
        self.step()

    def step(self) -> None:
        self._sent += 1
        last = self._sent == self._tokens
        self._write(self._chunks.token(self._id, self._number, self._sent, last))
        if last:
            self._engine.running.discard(self)
            self._write(self._chunks.end(self._id, self._sent, self._usage))
            self._transport.write(b"0\r\n\r\n")
            if self._closes:
                self._transport.close()

    def _write(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


async def serve(port: int, step: float) -> None:
    engine = Engine(step)
    server = await asyncio.get_running_loop().create_server(
        lambda: Stream(engine), "127.0.0.1", port, backlog=1024
    )
    async with server:
        await engine.run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=8.0)
    arguments = parser.parse_args()
    event_loop.run(serve(arguments.port, arguments.step_ms / 1000))
