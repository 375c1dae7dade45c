"""`FakeServer`: streams a script over HTTP, or misbehaves by it."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import islice

from aiohttp import web

from espo_gateway.testing.chunks import (
    as_tokens,
    choice_of,
    ending,
    event,
    flat,
    head,
    limit,
    usage_of,
)
from espo_gateway.testing.engine import decided
from espo_gateway.testing.fake import Fake
from espo_gateway.testing.script import Body, Script, Token
from espo_gateway.vllm_plugin.wire import ROUTE

_BLOCK = b"x" * 2**16


class FakeServer(Fake):
    """Answers every generation by `script`, or by the scripts put in `queue`, in order.

    script: a Script, or a function from a request's body to one.
    gated: tokens are sent only as `release` allows.
    decides: it is a vLLM that decides by itself, and says so; values: that it knows V, which its
        scripts have. Both may be changed.

    Attributes:
        bodies: the generations' request bodies; headers: their headers.
        running: generations under way. Each ends up in one of aborted (left by its client), failed
            (by its script's status or fault) and finished (sent to the end).
        generated: tokens sent by all of them.
        aborts: the ids that each request to end some has named.
    """

    def __init__(
        self,
        script: Script | Callable[[Body], Script],
        *,
        gated: bool = False,
        decides: bool = False,
        values: bool = False,
        port: int = 0,
    ) -> None:
        super().__init__(gated=gated, port=port)
        self.script = script
        self.decides, self.values = decides, values
        self.queue: deque[Script] = deque()
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.aborts: list[list[str]] = []
        self.running = self.aborted = self.failed = self.finished = self.generated = 0

    def _add_routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_post("/inference/v1/abort_requests", self._abort)
        app.router.add_post("/v1/embeddings", self._echo)
        app.router.add_get(ROUTE, self._engine)

    # -- endpoints -----------------------------------------------------------------------------

    async def _engine(self, request: web.Request) -> web.Response:
        if not self.decides:
            raise web.HTTPNotFound
        return web.json_response({"decides": True, "values": self.values})

    async def _echo(self, request: web.Request) -> web.Response:
        return web.Response(body=await request.read(), content_type="application/json")

    async def _abort(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "request_ids" not in body:
            return web.json_response({"detail": "Missing 'request_ids'"}, status=400)
        self.aborts.append(body["request_ids"])
        return web.Response()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        script = self.queue.popleft() if self.queue else self.script
        if not isinstance(script, Script):
            script = script(body)
        if self.decides:
            script = decided(script, body)
        if request.path == "/inference/v1/generate":
            script, body = _of_tokens(script, body), flat(body)
        if not script.token_ids:
            body = {**body, "return_token_ids": False}
        await self._count(running=1)
        outcome = "failed"
        try:
            response = await self._play(request, body, script)
            if script.status == 200 and script.fault is None:
                outcome = "finished"
            return response
        except (asyncio.CancelledError, ConnectionResetError):
            outcome = "aborted"
            raise
        finally:
            await asyncio.shield(self._count(running=-1, **{outcome: 1}))

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
        response = web.StreamResponse(headers={"Content-Type": script.content_type})
        await response.prepare(request)
        if script.fault == "no-body":
            return self._drop(request, response)
        async for data in self._events(body, script, chat):
            step = script.split or len(data)
            for start in range(0, len(data), step):
                await response.write(data[start : start + step])
        if script.fault == "reset":
            return self._drop(request, response)
        await response.write_eof()
        return response

    async def _play_whole(
        self, request: web.Request, body: Body, script: Script, chat: bool
    ) -> web.StreamResponse:
        if script.fault in ("reset", "no-body"):
            return self._drop(request)
        tokens = []
        room = limit(body) if script.fault is None else script.after
        for token in islice(script.tokens, room):
            await self._generated(1)
            tokens.append(token)
        if script.fault == "stall":
            await asyncio.Event().wait()
        choice = choice_of(body, script, tokens, chat, whole=True)
        choice["finish_reason"], choice["stop_reason"] = ending(body, script, len(tokens))
        answer = {**head(chat), "choices": [choice], "usage": usage_of(script, len(tokens))}
        if body.get("return_token_ids"):
            (answer if chat else choice)["prompt_token_ids"] = list(script.prompt_token_ids)
        text = json.dumps(answer if script.rewrite is None else script.rewrite(answer))
        if script.fault is not None:
            text = text[: len(text) // 2]
        return web.Response(text=text, content_type="application/json")

    # -- the stream ----------------------------------------------------------------------------

    async def _generated(self, count: int) -> None:
        if self._permits is not None:
            for _ in range(count):
                await self._permits.acquire()
        else:
            await asyncio.sleep(0)  # an endless script must leave room for its client to go
        await self._count(generated=count)

    async def _events(self, body: Body, script: Script, chat: bool) -> AsyncIterator[bytes]:
        """The stream's bytes, up to and with the fault."""
        options = body.get("stream_options") or {}
        rewrite = script.rewrite or (lambda chunk: chunk)
        first: Body = {}
        if body.get("return_token_ids"):
            first["prompt_token_ids"] = list(script.prompt_token_ids)
        if chat:
            delta = {"role": "assistant", "content": ""}
            choice: Body = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
            chunk = {**head(chat, stream=True), "choices": [choice], **first}
            if options.get("continuous_usage_stats") and script.tells_prompt:
                chunk["usage"] = usage_of(script, 0)
            yield event(rewrite(chunk))
            first = {}
        sent, last = 0, b""
        async for count, chunk in self._chunks(body, script, chat):
            chunk["choices"][0].update(first)
            first = {}
            sent += count
            last = event(rewrite(chunk))
            yield last
        if script.fault == "stall":
            await asyncio.Event().wait()
        elif script.fault == "garbage":
            yield b"data: {not json\n\n"
        elif script.fault == "error":
            yield event({"error": {"message": "engine died", "type": "scripted", "code": 500}})
        elif script.fault == "half":
            yield (last or event(head(chat, stream=True)))[:40]
        elif script.fault == "flood":
            yield b"data: "
            while True:
                await asyncio.sleep(0)
                yield _BLOCK
        elif script.fault is None:
            if options.get("include_usage"):
                usage = usage_of(script, sent)
                last_chunk = {**head(chat, stream=True), "choices": [], "usage": usage}
                asked_tokens = "sampling_params" in body
                yield event(as_tokens(last_chunk, body) if asked_tokens else last_chunk)
            yield b"data: [DONE]\n\n"

    async def _chunks(
        self, body: Body, script: Script, chat: bool
    ) -> AsyncIterator[tuple[int, Body]]:
        """Chunks with tokens, and how many each has; with a fault, none says it is the last."""
        options = body.get("stream_options") or {}
        continuous = options.get("continuous_usage_stats") and script.tells_prompt
        tokens = iter(islice(script.tokens, limit(body)))
        sent = 0
        ahead: list[Token] = []  # at most one: whether it is there tells the last chunk
        while True:
            room = script.per_chunk if script.fault is None else script.after - sent
            count = min(script.per_chunk, room)
            merged = [*ahead, *islice(tokens, count - len(ahead))] if count else []
            if not merged:
                return
            await self._generated(len(merged))
            sent += len(merged)
            choice = choice_of(body, script, merged, chat)
            ahead = list(islice(tokens, 1))
            if not ahead and script.fault is None:
                choice["finish_reason"], choice["stop_reason"] = ending(body, script, sent)
            chunk = {**head(chat, stream=True), "choices": [choice]}
            if continuous:
                chunk["usage"] = usage_of(script, sent)
            yield len(merged), chunk


def _of_tokens(script: Script, asked: Body) -> Script:
    """The same, in the words of vLLM's route for tokens."""

    def rewrite(chunk: Body) -> Body:
        chunk = as_tokens(chunk, asked)
        return chunk if script.rewrite is None else script.rewrite(chunk)

    return replace(script, rewrite=rewrite)
