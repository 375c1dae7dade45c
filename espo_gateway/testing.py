"""`FakeServer`: an OpenAI/vLLM server on a real port that streams a script, or misbehaves by it.

For tests without a model. Nothing in it waits for a clock: tokens come at once, or one for each
`release`, and `until` awaits what the server has seen. The critic's is in `testing_critic.py`.

    script = Script([Token("a"), Token("b", logprob=-4.0, max_logprob=-0.1)], per_chunk=2)
    async with FakeServer(script) as server:
        ...                                     # talk to server.url
        await server.until(lambda: server.running == 0)
        assert server.aborted == 1 and server.generated < 10
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, Self

from aiohttp import web

from espo_gateway.app import listen

Body = dict[str, Any]


class Token(NamedTuple):
    """A token to stream. max_logprob: None for the sampled one's; logprob: None sends null."""

    text: str
    logprob: float | None = -0.1
    max_logprob: float | None = None
    id: int = 0


@dataclass(frozen=True)
class Script:
    """What the server answers to one generation.

    tokens: may be endless; `max_tokens` of the request ends them, else finish_reason does.
    per_chunk: tokens merged into one chunk. split: bytes per write, None for whole events.
    logprobs, token_ids: False never sends any, though asked.
    tells_prompt: False leaves out continuous usage.
    status: answered at once when not 200.
    fault: what happens once `after` tokens are sent. "reset" drops the connection (before the
        headers when after is 0), "stall" sends nothing more, "garbage" sends no JSON, "error" sends
        an error event, "eof" ends without a last chunk.
    """

    tokens: Iterable[Token]
    finish_reason: str = "stop"
    stop_reason: int | str | None = None
    prompt_token_ids: tuple[int, ...] = (1, 2, 3)
    per_chunk: int = 1
    split: int | None = None
    logprobs: bool = True
    token_ids: bool = True
    tells_prompt: bool = True
    status: int = 200
    fault: Literal["reset", "stall", "garbage", "error", "eof"] | None = None
    after: int = 0


class Fake:
    """What the fakes share: a port, a model's name, and counters that can be waited for.

    gated: work is done only as `release` allows.
    """

    def __init__(self, *, gated: bool = False, port: int = 0) -> None:
        self.url = ""
        self._port = port
        self._permits = asyncio.Semaphore(0) if gated else None
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**28)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        self._add_routes(app)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        sock: socket.socket = listen("127.0.0.1", self._port)
        await web.SockSite(self._runner, sock).start()
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Close the port and drop every connection, as a server that dies does."""
        if self._runner is not None:
            await self._runner.cleanup()

    def release(self, count: int = 1) -> None:
        """Let that much more be done."""
        assert self._permits is not None, "make the server with gated=True"
        for _ in range(count):
            self._permits.release()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is looked at whenever a counter has moved."""
        async with self._changed:
            await self._changed.wait_for(condition)

    async def _count(self, **changes: int) -> None:
        for name, change in changes.items():
            setattr(self, name, getattr(self, name) + change)
        async with self._changed:
            self._changed.notify_all()

    def _add_routes(self, app: web.Application) -> None:
        raise NotImplementedError

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    def _drop(
        self, request: web.Request, response: web.StreamResponse | None = None
    ) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return response or web.Response()


class FakeServer(Fake):
    """Answers every generation by `script`, or by the scripts put in `queue`, in order.

    script: a Script, or a function from a request's body to one.
    gated: tokens are sent only as `release` allows.

    Attributes:
        bodies: the generations' request bodies; headers: their headers.
        running, aborted, finished: generations under way, left by their client, sent to the end.
        generated: tokens sent by all of them.
    """

    def __init__(
        self, script: Script | Callable[[Body], Script], *, gated: bool = False, port: int = 0
    ) -> None:
        super().__init__(gated=gated, port=port)
        self.script = script
        self.queue: deque[Script] = deque()
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.aborted = self.finished = self.generated = 0

    def _add_routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_post("/v1/embeddings", self._echo)

    # -- endpoints -----------------------------------------------------------------------------

    async def _echo(self, request: web.Request) -> web.Response:
        return web.Response(body=await request.read(), content_type="application/json")

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        script = self.queue.popleft() if self.queue else self.script
        if not isinstance(script, Script):
            script = script(body)
        if not script.token_ids:
            body = {**body, "return_token_ids": False}
        await self._count(running=1)
        try:
            return await self._play(request, body, script)
        except (asyncio.CancelledError, ConnectionResetError):
            await asyncio.shield(self._count(aborted=1))
            raise
        finally:
            await asyncio.shield(self._count(running=-1))

    async def _play(self, request: web.Request, body: Body, script: Script) -> web.StreamResponse:
        if script.status != 200:
            error = {"message": "as scripted", "type": "scripted", "param": None}
            return web.json_response(
                {"error": {**error, "code": script.status}}, status=script.status
            )
        chat = request.path.endswith("/chat/completions")
        if not body.get("stream"):
            return await self._play_whole(request, body, script, chat)
        if script.fault == "reset" and script.after == 0:
            return self._drop(request)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        async for data in self._events(body, script, chat):
            if data is None:
                return self._drop(request, response)
            step = script.split or len(data)
            for start in range(0, len(data), step):
                await response.write(data[start : start + step])
        await self._count(finished=1)
        await response.write_eof()
        return response

    async def _play_whole(
        self, request: web.Request, body: Body, script: Script, chat: bool
    ) -> web.StreamResponse:
        tokens = []
        for token in islice(script.tokens, _limit(body)):
            await self._generated(1)
            tokens.append(token)
        choice = _choice(body, script, tokens, chat, whole=True)
        choice["finish_reason"], choice["stop_reason"] = _ending(body, script, len(tokens))
        answer = {**_head(chat), "choices": [choice], "usage": _usage(script, len(tokens))}
        if body.get("return_token_ids"):
            (answer if chat else choice)["prompt_token_ids"] = list(script.prompt_token_ids)
        await self._count(finished=1)
        return web.Response(text=json.dumps(answer), content_type="application/json")

    # -- the stream ----------------------------------------------------------------------------

    async def _generated(self, count: int) -> None:
        if self._permits is not None:
            for _ in range(count):
                await self._permits.acquire()
        else:
            await asyncio.sleep(0)  # an endless script must leave room for its client to go
        await self._count(generated=count)

    async def _events(self, body: Body, script: Script, chat: bool) -> AsyncIterator[bytes | None]:
        """The stream's events; None where the connection is to be dropped."""
        options = body.get("stream_options") or {}
        continuous = options.get("continuous_usage_stats") and script.tells_prompt
        tokens = iter(islice(script.tokens, _limit(body)))
        sent = 0
        first: Body = {}
        if body.get("return_token_ids"):
            first["prompt_token_ids"] = list(script.prompt_token_ids)
        if chat:
            delta = {"role": "assistant", "content": ""}
            choice: Body = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
            chunk = {**_head(chat, stream=True), "choices": [choice], **first}
            if continuous:
                chunk["usage"] = _usage(script, 0)
            yield _event(chunk)
            first = {}
        ahead: list[Token] = []  # at most one: whether it is there tells the last chunk
        while True:
            room = script.per_chunk if script.fault is None else script.after - sent
            count = min(script.per_chunk, room)
            merged = [*ahead, *islice(tokens, count - len(ahead))] if count else []
            if not merged:
                break
            await self._generated(len(merged))
            sent += len(merged)
            choice = {**_choice(body, script, merged, chat), **first}
            first = {}
            ahead = list(islice(tokens, 1))
            if not ahead and script.fault is None:
                choice["finish_reason"], choice["stop_reason"] = _ending(body, script, sent)
            chunk = {**_head(chat, stream=True), "choices": [choice]}
            if continuous:
                chunk["usage"] = _usage(script, sent)
            yield _event(chunk)
        if script.fault == "reset":
            yield None
        elif script.fault == "stall":
            await asyncio.Event().wait()
        elif script.fault == "garbage":
            yield b"data: {not json\n\n"
        elif script.fault == "error":
            yield _event({"error": {"message": "engine died", "type": "scripted", "code": 500}})
        elif script.fault is None:
            if options.get("include_usage"):
                usage = _usage(script, sent)
                yield _event({**_head(chat, stream=True), "choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"


def _event(chunk: Body) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def _limit(body: Body) -> int | None:
    return body.get("max_completion_tokens") or body.get("max_tokens")


def _ending(body: Body, script: Script, sent: int) -> tuple[str, int | str | None]:
    return ("length", None) if sent == _limit(body) else (script.finish_reason, script.stop_reason)


def _head(chat: bool, *, stream: bool = False) -> Body:
    kind = "chat.completion" if chat else "text_completion"
    return {
        "id": "chatcmpl-1" if chat else "cmpl-1",
        "object": kind + ".chunk" if chat and stream else kind,
        "created": 1,
        "model": "fake",
    }


def _usage(script: Script, completion: int) -> Body:
    prompt = len(script.prompt_token_ids)
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
    }


def _choice(
    body: Body, script: Script, tokens: list[Token], chat: bool, *, whole: bool = False
) -> Body:
    text = "".join(token.text for token in tokens)
    choice: Body = {"index": 0, "logprobs": None, "finish_reason": None, "stop_reason": None}
    if not chat:
        choice["text"] = text
    elif whole:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        choice["delta"] = {"content": text}
    asked = body.get("logprobs")
    if script.logprobs and (asked if chat else asked is not None):
        choice["logprobs"] = (_chat_logprobs if chat else _completion_logprobs)(body, tokens)
    if body.get("return_token_ids"):
        choice["token_ids"] = [token.id for token in tokens]
    return choice


def _tops(token: Token) -> list[tuple[str, float | None]]:
    """The sampled token, and the likeliest where it is another."""
    sampled: list[tuple[str, float | None]] = [(token.text, token.logprob)]
    return sampled if token.max_logprob is None else [*sampled, ("<top>", token.max_logprob)]


def _completion_logprobs(body: Body, tokens: list[Token]) -> Body:
    return {
        "text_offset": [0] * len(tokens),
        "token_logprobs": [token.logprob for token in tokens],
        "tokens": [token.text for token in tokens],
        "top_logprobs": [dict(_tops(token)[: body["logprobs"] + 1]) for token in tokens],
    }


def _chat_logprobs(body: Body, tokens: list[Token]) -> Body:
    def entry(text: str, logprob: float | None) -> Body:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    top = body.get("top_logprobs") or 0
    return {
        "content": [
            {
                **entry(token.text, token.logprob),
                "top_logprobs": [entry(*alternative) for alternative in _tops(token)[:top]],
            }
            for token in tokens
        ]
    }
