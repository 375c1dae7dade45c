"""OpenAI's two generating endpoints: a request planned, followed upstream, and answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

import msgspec
from aiohttp import web

from espo_gateway.config import CHAT, TOKENS
from espo_gateway.errors import GatewayError, InvalidRequest
from espo_gateway.front.admission import Slots
from espo_gateway.front.bodies import decode
from espo_gateway.front.events import EventStream, event
from espo_gateway.front.gateway import Gateway
from espo_gateway.front.headers import forwarded_headers, generation_headers
from espo_gateway.front.passthrough import pass_marked
from espo_gateway.front.relay import Bodies, OutputSink, follow
from espo_gateway.stream.answer import Answer, merged, total_usage
from espo_gateway.stream.chunks import Chunk
from espo_gateway.stream.request import Body, Plan, Single, choices_of, plan
from espo_gateway.stream.session import Policy, Session
from espo_gateway.stream.tokens import TokensAnswer, merged_tokens, plan_tokens, prompt_ids
from espo_gateway.telemetry.logs import current
from espo_gateway.traces.sessions import Turn
from espo_gateway.upstream.affinity import SESSION_ID

_encode = msgspec.json.Encoder().encode


async def generate(gateway: Gateway, request: web.Request, path: str) -> web.StreamResponse:
    """Serve a path of `MONITORED`. Raises the kinds of GatewayError."""
    data = await request.read()
    body, most = decode(request, data), gateway.config.max_choices
    if path == TOKENS:
        planned = plan_tokens(body, max_choices=most)
    else:
        planned = plan(body, chat=path == CHAT, max_choices=most)
    unmonitored = planned.unmonitored is not None and planned.control.mode != "off"
    if unmonitored and gateway.policy.refuse:
        raise InvalidRequest(
            f"this gateway serves only what it can monitor, and not {planned.unmonitored}; "
            'leave that out, or send "espo": {"mode": "off"}'
        )
    policy = gateway.policy_of(request, planned.path)
    async with gateway.admission.slot(choices_of(planned)) as slots:
        return await _admitted(gateway, request, planned, policy, slots)


async def _admitted(
    gateway: Gateway, request: web.Request, planned: Plan, policy: Policy, slots: Slots
) -> web.StreamResponse:
    if planned.unmonitored is not None:
        gateway.metrics.count_unmonitored(planned.unmonitored)
        return await pass_marked(gateway, request, planned)
    with gateway.observers.turn(request.headers.get(SESSION_ID), len(planned.singles)) as turn:
        return await _monitored(gateway, request, planned, policy, slots, turn)


async def _monitored(
    gateway: Gateway,
    request: web.Request,
    planned: Plan,
    policy: Policy,
    slots: Slots,
    turn: Turn | None,
) -> web.StreamResponse:
    began = partial(gateway.metrics.first_token, request, planned.path)
    head: Chunk = {}
    sessions = [
        gateway.session(planned, single, policy, began, turn, head) for single in planned.singles
    ]
    if planned.tokens:
        for session, single in zip(sessions, planned.singles, strict=True):
            session.prompt_token_ids = prompt_ids(single)
    gateway.sessions.update(sessions)
    serve = _stream if planned.asked.stream else _answer
    try:
        return await serve(gateway, request, planned, sessions, slots)
    finally:
        for session in sessions:
            gateway.finished(session, turn)


async def _follow_all(
    gateway: Gateway,
    request: web.Request,
    planned: Plan,
    sessions: list[Session],
    sinks: Sequence[OutputSink],
    slots: Slots,
) -> None:
    """Follow every choice; the first that fails ends the others."""
    headers = forwarded_headers(gateway.keys, request, json=True)
    answered = partial(gateway.answered, request)
    bodies = Bodies()
    several = len(sessions) > 1

    async def follow_one(single: Single, session: Session, sink: OutputSink) -> None:
        async with slots.one():
            await follow(
                gateway.pool,
                planned.path,
                generation_headers(headers, single.body, single.index if several else None),
                single,
                session,
                sink,
                gateway.critic,
                gateway.answer_probe,
                bodies=bodies,
                answered=answered,
            )

    known_as = _known_as(planned.body)
    if several:
        gateway.several[known_as] = len(sessions)
    follows = [follow_one(*choice) for choice in zip(planned.singles, sessions, sinks, strict=True)]
    if len(follows) == 1:
        await follows[0]
        return
    try:
        async with asyncio.TaskGroup() as group:
            for one in follows:
                group.create_task(one)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        gateway.several.pop(known_as, None)


def _known_as(body: Body) -> str:
    """The id that the servers know a request by, as `generation_headers` leaves it to them."""
    entry, request_id = current.get(), body.get("request_id")
    if entry is None or (request_id is not None and not entry.given):
        return str(request_id)
    return entry.request_id


async def _answer(
    gateway: Gateway,
    request: web.Request,
    planned: Plan,
    sessions: list[Session],
    slots: Slots,
) -> web.StreamResponse:
    answers = [TokensAnswer() if planned.tokens else Answer(chat=planned.chat) for _ in sessions]
    await _follow_all(gateway, request, planned, sessions, answers, slots)
    usage = total_usage([(session.prompt, session.usage) for session in sessions])
    if planned.tokens:
        model, created = planned.body.get("model"), int(time.time())
        answer = merged_tokens(answers, usage, model=model, created=created)
    else:
        answer = merged(answers, usage, chat=planned.chat)
    return web.Response(body=_encode(answer), content_type="application/json")


async def _stream(
    gateway: Gateway,
    request: web.Request,
    planned: Plan,
    sessions: list[Session],
    slots: Slots,
) -> web.StreamResponse:
    stream = EventStream(request)
    try:
        async with stream.kept_alive(gateway.config.sse_keep_alive):
            await _follow_all(gateway, request, planned, sessions, [stream] * len(sessions), slots)
        end = b"data: [DONE]\n\n"
        if planned.asked.usage:
            usage = total_usage([(session.prompt, session.usage) for session in sessions])
            end = event(sessions[0].usage_chunk(usage)) + end
    except GatewayError as error:
        if not stream.begun:
            raise
        gateway.metrics.count_error(error)
        end = event(error.body()) + b"data: [DONE]\n\n"
    return await stream.close(end)
