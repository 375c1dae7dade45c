"""The gateway as an HTTP application, and the server that runs it.

async with running(Config(upstreams=("http://127.0.0.1:8000",), port=0)) as gateway:
    client = AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none")
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from aiohttp import web

from espo_gateway.admin import admin_routes
from espo_gateway.config import Config
from espo_gateway.critic import CriticServer, ValueServer
from espo_gateway.errors import GatewayError
from espo_gateway.gateway import Gateway
from espo_gateway.generation import generate
from espo_gateway.metrics import Metrics
from espo_gateway.own_critic import OwnCritic, load_critic
from espo_gateway.passthrough import pass_through
from espo_gateway.upstream import UpstreamPool

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(gateway: Gateway) -> web.Application:
    """All routes of a gateway."""

    async def generation(request: web.Request) -> web.StreamResponse:
        return await generate(gateway, request)

    async def other(request: web.Request) -> web.StreamResponse:
        return await pass_through(gateway.pool, request)

    async def health(request: web.Request) -> web.Response:
        return await _health(gateway)

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(
            body=gateway.metrics.exposition(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    app = web.Application(
        middlewares=[_observing(gateway)], client_max_size=gateway.config.max_request_bytes
    )
    app.add_routes(
        [
            web.post("/v1/completions", generation),
            web.post("/v1/chat/completions", generation),
            web.route("*", "/v1/{path:.*}", other),
            *admin_routes(gateway),
            web.get("/health", health),
            web.get("/metrics", metrics),
        ]
    )
    return app


def _observing(gateway: Gateway) -> Any:
    """Count every request; tell every error in OpenAI's shape."""
    metrics = gateway.metrics

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith("/v1/"):
            return await _answered(gateway, request, handler)
        resource = request.match_info.route.resource
        endpoint = resource.canonical if resource is not None else "unknown"
        started = time.monotonic()
        status = "499"  # nginx's word for a client that left
        metrics.in_flight.inc()
        try:
            response = await _answered(gateway, request, handler)
            status = str(response.status)
            return response
        except (asyncio.CancelledError, ConnectionResetError):
            metrics.cancelled.inc()
            raise
        finally:
            metrics.in_flight.dec()
            metrics.requests.labels(endpoint, status).inc()
            metrics.seconds.labels(endpoint).observe(time.monotonic() - started)

    return observe


async def _answered(gateway: Gateway, request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except GatewayError as error:
        gateway.metrics.count_error(error)
        headers = getattr(error, "headers", None)
        return web.json_response(error.body(), status=error.status, headers=headers)
    except web.HTTPException as error:
        refused = GatewayError(f"{error.reason}: {request.method} {request.path}")
        refused.status, refused.type = error.status, "invalid_request_error"
        return web.json_response(refused.body(), status=error.status)
    except ConnectionResetError:
        raise
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        failed = GatewayError("the gateway failed; its log says how")
        return web.json_response(failed.body(), status=500)


async def _health(gateway: Gateway) -> web.Response:
    pool = gateway.pool
    critic = gateway.critic if isinstance(gateway.critic, CriticServer) else None
    answering, valued = await asyncio.gather(
        pool.probe_all(), critic.answers() if critic else asyncio.sleep(0)
    )
    servers = [
        {"url": server.url, "answers": answers, "in_flight": server.in_flight}
        for server, answers in zip(pool.servers, answering, strict=True)
    ]
    healthy = any(answering)
    body: dict[str, Any] = {"upstreams": servers}
    if critic is not None:
        body["critic"] = {"url": critic.url, "answers": valued}
    # Without the critic's values nothing stops, but everything is served.
    problem = "" if valued or critic is None else "; the critic does not answer"
    body["status"] = ("ok" if healthy else "no upstream answers") + problem
    return web.json_response(body, status=200 if healthy else 503)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises OSError when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


@asynccontextmanager
async def running(
    config: Config, *, critic: ValueServer | None = None, sock: socket.socket | None = None
) -> AsyncIterator[Gateway]:
    """A gateway that serves until the block is left; `gateway.url` says where.

    Args:
        critic: in the place of the configured one.

    Raises InvalidRequest for a bad gate and OSError for a taken port.
    """
    async with AsyncExitStack() as stack:
        pool = UpstreamPool(
            list(config.upstreams),
            connect_timeout=config.connect_timeout,
            idle_timeout=config.idle_timeout,
            attempts=config.attempts,
        )
        await stack.enter_async_context(pool)
        metrics = Metrics(pool)
        if critic is None and config.critic is not None:
            options: dict[str, Any] = {
                "timeout": config.critic_timeout,
                "registry": metrics.registry,
            }
            critic = await stack.enter_async_context(
                CriticServer(config.critic, **options)
                if config.critic_class is None
                else OwnCritic(load_critic(config.critic), name=config.critic, **options)
            )
        gateway = Gateway(pool, config, metrics, critic=critic)
        sock = sock or listen(config.host, config.port)
        runner = web.AppRunner(
            application(gateway),
            # Else a client's departure goes unnoticed, and its tokens are generated to the end.
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=config.drain_timeout,
        )
        await runner.setup()
        try:
            await web.SockSite(runner, sock, backlog=1024).start()
            host, port = sock.getsockname()[:2]
            gateway.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            yield gateway
        finally:
            await runner.cleanup()
            await asyncio.to_thread(gateway.close)
