"""Around every handler: who asks, whether it may; the answer told, counted and logged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import nullcontext

from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Middleware

from espo_gateway.errors import GatewayError, InvalidRequest
from espo_gateway.front.auth import authorize
from espo_gateway.front.bodies import receive
from espo_gateway.front.gateway import Gateway
from espo_gateway.front.paths import served
from espo_gateway.telemetry.logs import REQUEST_ID, AccessEntry, current
from espo_gateway.telemetry.metrics import ARRIVED

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def middleware(gateway: Gateway) -> Middleware:
    """Log every request, count those for the servers, and tell every error in OpenAI's shape."""
    metrics = gateway.metrics

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        entry = AccessEntry.of(request)
        current.set(entry)
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "unknown"
        generates = served(route)
        status = "499"  # nginx's word for a client that left
        if generates:
            request[ARRIVED] = entry.started
            metrics.in_flight.inc()
        try:
            response = await _answered(gateway, request, handler, entry)
            status = str(response.status)
            return response
        except (asyncio.CancelledError, ConnectionError) as error:
            if generates:
                metrics.cancelled.inc()
            # Which of the two it is is chance; aiohttp logs the second as a failure of ours.
            raise asyncio.CancelledError from error
        finally:
            if generates:
                metrics.in_flight.dec()
                metrics.requests.labels(route, status).inc()
                metrics.seconds.labels(route).observe(entry.seconds)
            entry.write(request, route, status)

    return observe


def completion(gateway: Gateway) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """What is done just before a response's head is sent."""

    async def complete(request: web.Request, response: web.StreamResponse) -> None:
        if (entry := current.get()) is not None:
            response.headers[REQUEST_ID] = entry.request_id
            entry.response = response
        if request.version < HttpVersion11 and response.content_length is None:
            response.force_close()  # nothing else would tell such a client where it ends
        await gateway.complete(request, response)

    return complete


async def _answered(
    gateway: Gateway, request: web.Request, handler: Handler, entry: AccessEntry
) -> web.StreamResponse:
    try:
        return await _admitted(gateway, request, handler)
    except GatewayError as error:
        gateway.metrics.count_error(error)
        refused = error
    except web.HTTPException as error:
        if error.status < 400:
            raise
        refused = GatewayError(f"{error.reason}: {request.method} {request.rel_url.raw_path}")
        refused.status, refused.type = error.status, "invalid_request_error"
        refused.headers = {k: v for k, v in error.headers.items() if k == "Allow"}
    except ConnectionError:
        raise
    except RecursionError:
        refused = InvalidRequest("the request is nested too deeply")
    except Exception:
        log.exception("%s %s failed", request.method, request.rel_url.raw_path)
        refused = GatewayError("the gateway failed; its log says how")
    if entry.response is not None:
        # Another head now would be taken for the body; a connection cut off is understood.
        request.protocol.force_close()
        return entry.response
    return web.json_response(refused.body(), status=refused.status, headers=refused.headers)


async def _admitted(gateway: Gateway, request: web.Request, handler: Handler) -> web.StreamResponse:
    authorize(request, gateway.keys, loopback=gateway.config.loopback)
    with gateway.traffic.one() if served(request.path) else nullcontext():
        await receive(request, gateway.config)
        response = await handler(request)
        # Here, not after us: the last byte belongs to the request too.
        await response.prepare(request)
        await response.write_eof()
        return response
