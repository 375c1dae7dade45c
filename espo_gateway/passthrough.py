"""Requests that are handed on as they are: other endpoints, and what no monitor can follow."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from espo_gateway.affinity import affinity_key
from espo_gateway.events import event_stream
from espo_gateway.request import Plan
from espo_gateway.signals import decode_chunk
from espo_gateway.sse import SSEParser
from espo_gateway.upstream import UpstreamPool

#: Headers that belong to one connection (RFC 9110, 7.6.1), not to the message.
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_NOT_FORWARDED = _HOP_BY_HOP | {"host", "content-length", "accept-encoding", "expect"}


def forwarded_headers(request: web.Request, *, json: bool = False) -> dict[str, str]:
    """The client's headers for the upstream; `json` when the gateway writes the body anew."""
    skipped = _NOT_FORWARDED | {"content-type"} if json else _NOT_FORWARDED
    headers = {k: v for k, v in request.headers.items() if k.lower() not in skipped}
    headers["Accept-Encoding"] = "identity"
    if json:
        headers["Content-Type"] = "application/json"
    return headers


async def pass_through(pool: UpstreamPool, request: web.Request) -> web.StreamResponse:
    """Any request and its answer, byte by byte. Raises UpstreamError."""
    data = await request.read() if request.can_read_body else None
    async with pool.open(
        request.method, request.path_qs, headers=forwarded_headers(request), data=data
    ) as upstream:
        response = web.StreamResponse(status=upstream.status)
        for name, value in upstream.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                response.headers.add(name, value)
        await response.prepare(request)
        while received := await upstream.read():
            await response.write(received)
        await response.write_eof()
        return response


async def pass_marked(
    pool: UpstreamPool, request: web.Request, planned: Plan
) -> web.StreamResponse:
    """A generation nobody monitors: every choice says so, in `espo`. Raises UpstreamError."""
    mark = {"mode": "off", "stopped": False, "reason": planned.unmonitored}
    data = msgspec.json.encode(planned.body)
    headers = forwarded_headers(request, json=True)
    key = affinity_key(pool.affinity, headers, planned.body)
    async with pool.open("POST", planned.path, headers=headers, data=data, key=key) as upstream:
        if upstream.content_type != "text/event-stream":
            body = await upstream.body()
            if upstream.status == 200:
                body = _marked(body, mark)
            return web.Response(
                body=body, status=upstream.status, content_type=upstream.content_type
            )
        response, parser = event_stream(upstream.status), SSEParser()
        while received := await upstream.read():
            events = parser.feed(received)
            if not response.prepared:
                await response.prepare(request)
            lines = [b"data: " + _marked(event, mark) + b"\n\n" for event in events]
            await response.write(b"".join(lines))
        await response.write_eof()
        return response


def _marked(data: bytes, mark: dict[str, Any]) -> bytes:
    """With the mark on every choice that is finished; anything else stays as it is."""
    try:
        answer = decode_chunk(data)
    except ValueError:
        return data
    finished = [c for c in answer.get("choices") or () if c.get("finish_reason") is not None]
    for choice in finished:
        choice["espo"] = mark
    return msgspec.json.encode(answer) if finished else data
