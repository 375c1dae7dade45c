"""OpenAI's two generating endpoints: a request planned, followed upstream, and answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
from aiohttp import web

from espo_gateway.answer import Answer, merged, total_usage
from espo_gateway.errors import GatewayError, InvalidRequest
from espo_gateway.gateway import Gateway
from espo_gateway.passthrough import forwarded_headers, pass_marked
from espo_gateway.patience import Limits
from espo_gateway.relay import follow
from espo_gateway.request import Plan, plan
from espo_gateway.session import Chunk, Output, Policy, Session

_encode = msgspec.json.Encoder().encode


async def generate(gateway: Gateway, request: web.Request) -> web.StreamResponse:
    """Serve /v1/completions or /v1/chat/completions. Raises the kinds of GatewayError."""
    data = await request.read()
    try:
        body = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}") from error
    planned = plan(body, chat=request.path.endswith("/chat/completions"))
    refuse = gateway.config.unmonitored == "refuse"
    if planned.unmonitored is not None:
        if refuse and planned.control.mode != "off":
            raise InvalidRequest(
                f"this gateway serves only what it can monitor, and not {planned.unmonitored}; "
                'leave that out, or send "espo": {"mode": "off"}'
            )
        return await pass_marked(gateway.pool, request, planned)
    gate, policy = gateway.gate, Policy(gateway.config.finish_reason, refuse)
    sessions = [
        Session(
            gate,
            planned.control,
            planned.asked,
            single,
            chat=planned.chat,
            policy=policy,
            watching=gateway.watching(),
        )
        for single in planned.singles
    ]
    gateway.sessions.update(sessions)
    serve = _stream if planned.asked.stream else _answer
    try:
        return await serve(gateway, request, planned, sessions)
    finally:
        for session in sessions:
            gateway.finished(session)


async def _follow_all(
    gateway: Gateway,
    request: web.Request,
    planned: Plan,
    sessions: list[Session],
    deliver: Callable[[Session, list[Output]], Awaitable[None]],
) -> None:
    """Follow every choice; the first that fails ends the others."""
    headers = forwarded_headers(request, json=True)
    config = gateway.config
    limits = Limits(config.first_token_timeout, config.idle_timeout, config.total_timeout)
    follows = [
        follow(
            gateway.pool,
            planned.path,
            headers,
            single,
            session,
            partial(deliver, session),
            limits,
            gateway.critic,
        )
        for single, session in zip(planned.singles, sessions, strict=True)
    ]
    if len(follows) == 1:
        await follows[0]
        return
    try:
        async with asyncio.TaskGroup() as group:
            for one in follows:
                group.create_task(one)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _answer(
    gateway: Gateway, request: web.Request, planned: Plan, sessions: list[Session]
) -> web.StreamResponse:
    answers = {session: Answer(chat=planned.chat) for session in sessions}

    async def deliver(session: Session, outputs: list[Output]) -> None:
        answer = answers[session]
        for output in outputs:
            if isinstance(output, tuple):
                template, text = output
                answer.add_text(template.field, text)
            else:
                answer.add(output)

    await _follow_all(gateway, request, planned, sessions, deliver)
    usage = total_usage([(session.prompt, session.usage) for session in sessions])
    answer = merged(list(answers.values()), usage, chat=planned.chat)
    return web.Response(body=_encode(answer), content_type="application/json")


async def _stream(
    gateway: Gateway, request: web.Request, planned: Plan, sessions: list[Session]
) -> web.StreamResponse:
    stream = _EventStream(request)
    first: Chunk = {}

    async def deliver(session: Session, outputs: list[Output]) -> None:
        events = []
        for output in outputs:
            if isinstance(output, tuple):
                template, text = output
                events.append(template.event(text))
                continue
            if not first:
                first.update(output)
            # Choices of one answer share its id, wherever they come from.
            output["id"], output["created"] = first["id"], first["created"]
            events.append(_event(output))
        await stream.write(b"".join(events))

    try:
        await _follow_all(gateway, request, planned, sessions, deliver)
        end = b"data: [DONE]\n\n"
        if planned.asked.usage:
            usage = total_usage([(session.prompt, session.usage) for session in sessions])
            end = _event(sessions[0].usage_chunk(usage)) + end
    except GatewayError as error:
        if not stream.begun:
            raise
        gateway.metrics.count_error(error)
        end = _event(error.body()) + b"data: [DONE]\n\n"
    await stream.write(end)
    return await stream.close()


class _EventStream:
    """The client's stream. It begins with its first event: an error before has its own status."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response = event_stream()
        self._beginning = asyncio.Lock()

    @property
    def begun(self) -> bool:
        return self._response.prepared

    async def write(self, data: bytes) -> None:
        if not self._response.prepared:
            async with self._beginning:
                if not self._response.prepared:
                    await self._response.prepare(self._request)
        await self._response.write(data)

    async def close(self) -> web.StreamResponse:
        await self._response.write_eof()
        return self._response


def event_stream() -> web.StreamResponse:
    """An answer of server-sent events."""
    return web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    )


def _event(chunk: Chunk) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
