"""Requests that are handed on as they are: other endpoints, and what no monitor can follow."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import msgspec
from aiohttp import web
from multidict import CIMultiDict, MultiMapping

from espo_gateway.errors import GatewayError, InvalidRequest
from espo_gateway.front.auth import Keys
from espo_gateway.front.events import event, event_stream
from espo_gateway.front.gateway import Gateway
from espo_gateway.front.relay import streams
from espo_gateway.stream.chunks import decode_chunk
from espo_gateway.stream.request import Body, Plan
from espo_gateway.stream.sse import SSEParser
from espo_gateway.telemetry.logs import REQUEST_ID, current
from espo_gateway.upstream.affinity import affinity_key, passed_key
from espo_gateway.upstream.connection import Reply

_CONTROL = frozenset(map(chr, [*range(0x20), 0x7F]))

#: Headers that belong to one connection (RFC 9110, 7.6.1), not to the message.
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
#: Written anew for the upstream, or said by nobody: a client must not pass itself off as a proxy.
_NOT_FORWARDED = _HOP_BY_HOP | {
    "accept-encoding",
    "content-encoding",  # the body has been decoded
    "content-length",
    "expect",
    "forwarded",
    "host",
    "x-real-ip",
    "x-request-id",
}


def forwarded_headers(keys: Keys, request: web.Request, *, json: bool = False) -> CIMultiDict[str]:
    """The client's headers for the upstream; `json` when the gateway writes the body anew."""
    skipped = _NOT_FORWARDED | _connection_headers(request.headers)
    if json:
        skipped |= {"content-type"}
    if not keys.pass_clients:
        skipped |= {"authorization"}
    headers = CIMultiDict(
        (name, value)
        for name, value in request.headers.items()
        if name.lower() not in skipped and not name.lower().startswith("x-forwarded-")
    )
    headers.update(keys.upstream_headers)
    headers["Accept-Encoding"] = "identity"
    if json:
        headers["Content-Type"] = "application/json"
    if (entry := current.get()) is not None:
        headers[REQUEST_ID] = entry.request_id
    return headers


def generation_headers(
    headers: CIMultiDict[str], body: Body, index: int | None = None
) -> CIMultiDict[str]:
    """Of one upstream request for a generation; with the choice's index where there are several.

    A `request_id` of the body stays the server's name for it: vLLM would prefer the header.
    """
    entry = current.get()
    if entry is None:
        return headers
    headers = headers.copy()
    if not entry.given and body.get("request_id") is not None:
        del headers[REQUEST_ID]
    elif index is not None:
        headers[REQUEST_ID] = f"{entry.request_id}-{index}"
    return headers


def _connection_headers(headers: MultiMapping[str]) -> frozenset[str]:
    """Those that the sender names as meant for this connection only."""
    named = ",".join(headers.getall("Connection", []))
    return frozenset(name.strip().lower() for name in named.split(","))


def upstream_path(request: web.Request) -> str:
    """Path and query for the upstream, as the client wrote them.

    Raises InvalidRequest for a path that some server could read as one outside /v1/, where vLLM's
    own administration is.
    """
    decoded = request.rel_url.raw_path
    for _ in range(3):  # as often as a chain of servers could
        decoded = unquote(decoded)
    # Some servers take a backslash for a slash, and ignore what follows a semicolon.
    segments = [part.partition(";")[0] for part in decoded.replace("\\", "/").split("/")]
    inner = segments[2:-1] if segments[-1] == "" else segments[2:]
    plain = {"", ".", ".."}.isdisjoint(inner) and _CONTROL.isdisjoint(decoded)
    if segments[:2] != ["", "v1"] or not plain:
        raise InvalidRequest("the path must be a plain one under /v1/")
    return request.rel_url.raw_path_qs


async def pass_through(gateway: Gateway, request: web.Request) -> web.StreamResponse:
    """Any request and its answer, byte by byte. Raises InvalidRequest or UpstreamError."""
    path = upstream_path(request)
    data = await request.read() if request.body_exists else None
    headers = forwarded_headers(gateway.keys, request)
    key = passed_key(gateway.pool.affinity, headers, data)
    async with gateway.pool.open(
        request.method, path, headers=headers, data=data, key=key
    ) as upstream:
        response = web.StreamResponse(status=upstream.status)
        skipped = _HOP_BY_HOP | _connection_headers(upstream.headers)
        for name, value in upstream.headers.items():
            if name.lower() not in skipped:
                response.headers.add(name, value)
        await response.prepare(request)
        while received := await upstream.read():
            await response.write(received)
        await response.write_eof()
        return response


async def pass_marked(gateway: Gateway, request: web.Request, planned: Plan) -> web.StreamResponse:
    """A generation nobody monitors: every choice says so, in `espo`. Raises UpstreamError."""
    mark = {"mode": "off", "stopped": False, "reason": planned.unmonitored}
    data = msgspec.json.encode(planned.body)
    headers = forwarded_headers(gateway.keys, request, json=True)
    headers = generation_headers(headers, planned.body)
    key = affinity_key(gateway.pool.affinity, headers, planned.body)
    stream, parser = event_stream(), SSEParser()
    # Around `open`, which must see that the server failed.
    try:
        async with gateway.pool.open(
            "POST", planned.path, headers=headers, data=data, key=key
        ) as upstream:
            if not await streams(upstream):
                return await _marked_whole(upstream, mark)
            received = await upstream.read()
            stream.set_status(upstream.status)
            await stream.prepare(request)
            while received:
                marked = (_marked(data, mark) for data in parser.feed(received))
                lines = (data.replace(b"\n", b"\ndata: ") for data in marked)
                await stream.write(b"".join(b"data: " + data + b"\n\n" for data in lines))
                received = await upstream.read()
    except GatewayError as error:
        if not stream.prepared:
            raise
        gateway.metrics.count_error(error)
        await stream.write(event(error.body()) + b"data: [DONE]\n\n")
    await stream.write_eof()
    return stream


async def _marked_whole(upstream: Reply, mark: dict[str, Any]) -> web.Response:
    body = await upstream.body()
    if upstream.status == 200:
        body = _marked(body, mark)
    response = web.Response(body=body, status=upstream.status)
    for name in ("Content-Type", "Content-Encoding", "Retry-After"):
        if (value := upstream.headers.get(name)) is not None:
            response.headers[name] = value
    return response


def _marked(data: bytes, mark: dict[str, Any]) -> bytes:
    """With the mark on every choice that is finished; anything else stays as it is."""
    try:
        answer = decode_chunk(data)
    except ValueError:
        return data
    choices = answer.get("choices")
    finished = [
        choice
        for choice in (choices if isinstance(choices, list) else ())
        if isinstance(choice, dict) and choice.get("finish_reason")
    ]
    for choice in finished:
        choice["espo"] = mark
    return msgspec.json.encode(answer) if finished else data
