"""Requests that are handed on as they are: other endpoints, and what no monitor can follow."""

from __future__ import annotations

import asyncio
import re
from contextlib import nullcontext
from typing import Any

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from espo_gateway.errors import GatewayError, InvalidRequest, UpstreamProtocolError
from espo_gateway.front.events import EventStream, event
from espo_gateway.front.gateway import Gateway
from espo_gateway.front.headers import (
    ANSWERED,
    answered_headers,
    forwarded_headers,
    generation_headers,
    leads_back,
)
from espo_gateway.front.paths import generating_path, upstream_path
from espo_gateway.front.relay import check_place, streams
from espo_gateway.stream.chunks import decode_chunk
from espo_gateway.stream.request import Plan
from espo_gateway.stream.sse import SSEParser
from espo_gateway.upstream.affinity import affinity_key, passed_key
from espo_gateway.upstream.connection import Reply


class _Named(msgspec.Struct, gc=False):
    model: Any = None
    stream: Any = None


_named = msgspec.json.Decoder(_Named).decode
_FORM_MODEL = re.compile(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]+)\r\n')

#: On an answer that nobody monitors: why not.
UNMONITORED = "X-Espo-Unmonitored"


async def pass_through(gateway: Gateway, request: web.Request) -> web.StreamResponse:
    """Any request and its answer, byte by byte. Raises InvalidRequest or UpstreamError.

    A generation among them is counted, marked and limited like all others, or refused.
    """
    path = upstream_path(request)
    generating = generating_path(request)
    reason = None
    if generating is not None:
        reason = f"a route that has no monitor: {generating}"
        if gateway.policy.refuse:
            raise InvalidRequest(
                f"this gateway serves only what it can monitor, and not {generating}; send it to "
                "/v1/chat/completions or /v1/completions, or start the gateway with "
                "--unmonitored pass"
            )
    async with nullcontext() if reason is None else gateway.admission.slot():
        if reason is not None:
            gateway.metrics.count_unmonitored(reason)
        return await _passed(gateway, request, path, reason)


async def _passed(
    gateway: Gateway, request: web.Request, path: str, reason: str | None
) -> web.StreamResponse:
    data = await request.read() if request.body_exists else None
    headers = forwarded_headers(gateway.keys, request)
    model = requested_model(request, data) if len(gateway.pool.servers) > 1 else None
    key = passed_key(gateway.pool.affinity, headers, data)
    whole = reason is not None and not _named_in(data).stream
    async with gateway.pool.open(
        request.method, path, headers=headers, data=data, key=key, model=model, whole=whole
    ) as upstream:
        request[ANSWERED] = CIMultiDict()
        response = web.StreamResponse(status=upstream.status)
        response.headers.extend(answered_headers(upstream.headers, gateway.pool.urls, anew=False))
        if 300 <= upstream.status < 400 and leads_back(response.headers, request):
            raise UpstreamProtocolError(
                "the upstream redirects; give the gateway the address that answers (--upstream)",
                excerpt=upstream.headers["Location"],
            )
        if reason is not None:
            response.headers[UNMONITORED] = reason
        await response.prepare(request)
        while received := await upstream.read():
            await response.write(received)
        await response.write_eof()
        return response


async def list_models(gateway: Gateway, request: web.Request) -> web.StreamResponse:
    """What all servers serve, each model once; of one server, or when none tells, as it answers."""
    servers = gateway.pool.servers
    if len(servers) > 1:
        headers = forwarded_headers(gateway.keys, request)
        listed = await asyncio.gather(*(gateway.pool.models(s, headers) for s in servers))
        models = {model["id"]: model for some in reversed(listed) for model in reversed(some or [])}
        if models:
            return web.json_response({"object": "list", "data": [*reversed(models.values())]})
    return await pass_through(gateway, request)


def requested_model(request: web.Request, data: bytes | None) -> str | None:
    """The model that any request is for, as far as it says so."""
    named = re.fullmatch("/v1/models/(.+)", request.path)
    if named:
        return named[1]
    if not data:
        return None
    if request.content_type == "application/json":
        model = _named_in(data).model
        return model if isinstance(model, str) else None
    if request.content_type == "multipart/form-data":
        found = _FORM_MODEL.search(data)
        return found[1].decode(errors="replace") if found else None
    return None


def _named_in(data: bytes | None) -> _Named:
    """What a body says, where it is JSON."""
    try:
        return _named(data or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Named()


async def pass_marked(gateway: Gateway, request: web.Request, planned: Plan) -> web.StreamResponse:
    """A generation nobody monitors: every choice says so, in `espo`. Raises UpstreamError."""
    mark = {"mode": "off", "stopped": False, "reason": planned.unmonitored}
    data = msgspec.json.encode(planned.body)
    headers = forwarded_headers(gateway.keys, request, json=True)
    headers = generation_headers(headers, planned.body)
    key = affinity_key(gateway.pool.affinity, headers, planned.body)
    stream, parser = EventStream(request), SSEParser()
    # Around `open`, which must see that the server failed.
    try:
        async with (
            stream.kept_alive(gateway.config.sse_keep_alive),
            gateway.pool.open(
                "POST",
                planned.path,
                headers=headers,
                data=data,
                key=key,
                model=planned.body.get("model"),
                whole=not planned.asked.stream,
            ) as upstream,
        ):
            gateway.answered(request, upstream)
            check_place(upstream)
            if not (await streams(upstream) and 200 <= upstream.status < 300):
                return await _marked_whole(upstream, mark)
            stream.certain.set()
            while received := await upstream.read():
                marked = [_marked(data, mark, stream) for data in parser.feed(received)]
                comments = parser.take_comments()
                if marked or comments:
                    lines = (data.replace(b"\n", b"\ndata: ") for data in marked)
                    events = (b"data: " + data + b"\n\n" for data in lines)
                    await stream.send(comments + b"".join(events))
        end = b""
    except GatewayError as error:
        if not stream.begun:
            raise
        gateway.metrics.count_error(error)
        end = event(error.body()) + b"data: [DONE]\n\n"
    return await stream.close(end)


async def _marked_whole(upstream: Reply, mark: dict[str, Any]) -> web.Response:
    body = await upstream.body()
    if upstream.status == 200:
        body = _marked(body, mark)
    response = web.Response(body=body, status=upstream.status)
    for name in ("Content-Type", "Content-Encoding"):
        if (value := upstream.headers.get(name)) is not None:
            response.headers[name] = value
    return response


def _marked(data: bytes, mark: dict[str, Any], stream: EventStream | None = None) -> bytes:
    """With the mark on every choice that is finished; anything else stays as it is."""
    try:
        answer = decode_chunk(data)
    except ValueError:
        return data
    if stream is not None:
        stream.sees(answer)
    choices = answer.get("choices")
    finished = [
        choice
        for choice in (choices if isinstance(choices, list) else ())
        if isinstance(choice, dict) and choice.get("finish_reason")
    ]
    for choice in finished:
        choice["espo"] = mark
    return msgspec.json.encode(answer) if finished else data
