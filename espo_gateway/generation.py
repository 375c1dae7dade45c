"""OpenAI's two generating endpoints: a request planned, followed upstream, and answered."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from aiohttp import web

from espo_gateway.answer import Answer, merged, total_usage
from espo_gateway.bodies import decode
from espo_gateway.errors import GatewayError
from espo_gateway.gateway import Gateway
from espo_gateway.passthrough import forwarded_headers, generation_headers, pass_marked
from espo_gateway.relay import follow, interleave
from espo_gateway.request import Plan, plan
from espo_gateway.session import Chunk, Session

_encode = msgspec.json.Encoder().encode


async def generate(gateway: Gateway, request: web.Request) -> web.StreamResponse:
    data = await request.read()
    planned = plan(decode(request, data), chat=request.path.endswith("/chat/completions"))
    if planned.unmonitored is not None:
        return await pass_marked(gateway, request, planned)
    gate = gateway.gate
    sessions = [
        Session(gate, planned.control, planned.asked, single, chat=planned.chat)
        for single in planned.singles
    ]
    gateway.sessions.update(sessions)
    serve = _stream if planned.asked.stream else _answer
    try:
        return await serve(gateway, request, planned, sessions)
    finally:
        for session in sessions:
            gateway.finished(session)


def _chunks(
    gateway: Gateway, request: web.Request, planned: Plan, sessions: list[Session]
) -> AsyncGenerator[list[Chunk], None]:
    headers = forwarded_headers(gateway.keys, request, json=True)
    several = len(sessions) > 1
    streams = [
        follow(
            gateway.pool,
            planned.path,
            generation_headers(headers, single.body, single.index if several else None),
            single,
            session,
            gateway.critic,
        )
        for single, session in zip(planned.singles, sessions, strict=True)
    ]
    return interleave(streams)


async def _answer(
    gateway: Gateway, request: web.Request, planned: Plan, sessions: list[Session]
) -> web.StreamResponse:
    answers = [Answer(chat=planned.chat) for _ in sessions]
    async with aclosing(_chunks(gateway, request, planned, sessions)) as batches:
        async for chunks in batches:
            for chunk in chunks:
                answers[chunk["choices"][0]["index"]].add(chunk)
    usage = total_usage([(session.prompt, session.usage) for session in sessions])
    answer = merged(answers, usage, chat=planned.chat)
    return web.Response(body=_encode(answer), content_type="application/json")


async def _stream(
    gateway: Gateway, request: web.Request, planned: Plan, sessions: list[Session]
) -> web.StreamResponse:
    response: web.StreamResponse | None = None
    first: Chunk = {}
    try:
        async with aclosing(_chunks(gateway, request, planned, sessions)) as batches:
            async for chunks in batches:
                if response is None:
                    # Not before the upstream has answered: its errors have a status of theirs.
                    response = event_stream()
                    await response.prepare(request)
                    first = chunks[0]
                if len(sessions) > 1:
                    for chunk in chunks:
                        chunk["id"], chunk["created"] = first["id"], first["created"]
                await response.write(b"".join([_event(chunk) for chunk in chunks]))
        assert response is not None
        end = b"data: [DONE]\n\n"
        if planned.asked.usage:
            usage = total_usage([(session.prompt, session.usage) for session in sessions])
            end = _event(sessions[0].usage_chunk(usage)) + end
    except GatewayError as error:
        if response is None:
            raise
        gateway.metrics.count_error(error)
        end = _event(error.body()) + b"data: [DONE]\n\n"
    await response.write(end)
    await response.write_eof()
    return response


def event_stream() -> web.StreamResponse:
    """An answer of server-sent events."""
    return web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    )


def _event(chunk: Chunk) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
