"""vLLM's route that ends requests by their ids: told to every server, as any may have them."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec
from aiohttp import web

from espo_gateway.errors import GatewayError
from espo_gateway.front.gateway import Gateway
from espo_gateway.front.headers import forwarded_headers
from espo_gateway.front.paths import upstream_path
from espo_gateway.upstream.server import Upstream

#: What vLLM puts before an id on this route.
_PREFIX = "generate-tokens-"


async def abort(gateway: Gateway, request: web.Request) -> web.Response:
    """Serve /inference/v1/abort_requests. Raises UpstreamError when no server answers.

    The requests end as they would without the gateway: with `finish_reason` "abort" and the tokens
    they have.
    """
    path = upstream_path(request)
    data = _with_all_choices(gateway, await request.read())
    headers = forwarded_headers(gateway.keys, request)

    async def told(server: Upstream) -> web.Response | GatewayError:
        try:
            async with gateway.pool.open(
                request.method, path, headers=headers, data=data, server=server
            ) as reply:
                body = await reply.body()
                return web.Response(
                    status=reply.status, body=body, content_type=reply.content_type or None
                )
        except GatewayError as error:
            return error

    answers = await asyncio.gather(*map(told, gateway.pool.servers))
    responses = [answer for answer in answers if isinstance(answer, web.Response)]
    for answer in answers:
        if not responses and isinstance(answer, GatewayError):
            raise answer
    return min(responses, key=lambda response: response.status)


def _with_all_choices(gateway: Gateway, data: bytes) -> bytes:
    """The body, with the ids of every choice of a request that was made several."""
    try:
        body: Any = msgspec.json.decode(data)
        ids = body["request_ids"]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
        return data  # the servers' to refuse
    given = [ids] if isinstance(ids, str) else ids
    if not isinstance(given, list):
        return data
    more = []
    for one in given:
        if not isinstance(one, str):
            continue
        known_as = one.removeprefix(_PREFIX)
        # The id of the choice that began first is what the client of several is told.
        for request_id in {known_as, re.sub(r"-\d+$", "", known_as)}:
            count = gateway.several.get(request_id, 0)
            more += [f"{_PREFIX}{request_id}-{index}" for index in range(count)]
    return msgspec.json.encode({**body, "request_ids": [*given, *more]}) if more else data
