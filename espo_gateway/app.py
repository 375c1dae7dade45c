"""The gateway as an HTTP application, and the server that runs it.

async with running(Config(upstreams=("http://127.0.0.1:8000",), port=0)) as gateway:
    client = AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none")
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from aiohttp import web

from espo_gateway.admin.live import Live
from espo_gateway.admin.routes import admin_routes
from espo_gateway.admin.scrape import GatewayCollector
from espo_gateway.config import MONITORED, Config
from espo_gateway.critic.custom import CustomCritic, load_critic
from espo_gateway.critic.server import CriticServer, EngineCritic, ValueServer
from espo_gateway.front.abort import abort
from espo_gateway.front.auth import read_keys
from espo_gateway.front.gateway import Gateway
from espo_gateway.front.generation import generate
from espo_gateway.front.middleware import completion, middleware
from espo_gateway.front.openapi import description
from espo_gateway.front.passthrough import list_models, pass_through
from espo_gateway.front.paths import ABORT, generating_path, upstream_path
from espo_gateway.telemetry.logs import http_log
from espo_gateway.telemetry.metrics import Metrics
from espo_gateway.upstream.connection import Limits
from espo_gateway.upstream.pool import UpstreamPool

#: Methods that are passed through; CONNECT and TRACE speak of connections, not of models.
_PASSED = ("DELETE", "GET", "OPTIONS", "PATCH", "POST", "PUT")  # GET is HEAD, too
#: Longest request line and header, in bytes, and how many headers: as many as vLLM's server takes,
#: or enough for what clients send. aiohttp would take 8190, and 128.
_LINE, _FIELD, _FIELDS = 64 * 2**10, 16 * 2**10, 256
#: Seconds that servers have to say, before anything is served, whether they decide by themselves.
_PATIENCE = 2.0
#: Seconds that handlers have to clean up when they are broken off.
_CLEAN_UP = 0.5


def application(gateway: Gateway) -> web.Application:
    """All routes of a gateway, and what follows it."""
    live = Live(gateway)
    gateway.followers.append(live.ended)
    gateway.metrics.registry.register(GatewayCollector(gateway))

    async def generation(request: web.Request) -> web.StreamResponse:
        return await generate(gateway, request, request.path)

    async def end(request: web.Request) -> web.StreamResponse:
        return await abort(gateway, request)

    async def other(request: web.Request) -> web.StreamResponse:
        upstream_path(request)  # else its other spellings are none of what follows
        path = generating_path(request)
        if path in MONITORED:
            return await generate(gateway, request, path)
        if request.path == "/v1/models" and request.method == "GET":
            return await list_models(gateway, request)
        return await pass_through(gateway, request)

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(request: web.Request) -> web.Response:
        return await _ready(gateway)

    async def openapi(request: web.Request) -> web.Response:
        return web.json_response(description())

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(
            body=gateway.metrics.exposition(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    app = web.Application(
        middlewares=[middleware(gateway)], client_max_size=gateway.config.max_request_bytes
    )
    app.on_response_prepare.append(completion(gateway))
    app.add_routes(
        [
            *(web.post(path, generation) for path in sorted(MONITORED)),
            web.post(ABORT, end),
            *(web.route(method, "/v1/{path:.*}", other) for method in _PASSED),
            *(web.route(method, "/inference/v1/{path:.*}", other) for method in _PASSED),
            *admin_routes(gateway, live),
            web.get("/health", health),
            web.get("/ready", ready),
            web.get("/metrics", metrics),
            web.get("/openapi.json", openapi),
        ]
    )
    return app


async def _ready(gateway: Gateway) -> web.Response:
    pool = gateway.pool
    critic = gateway.critic if isinstance(gateway.critic, CriticServer) else None
    answering, valued = await asyncio.gather(
        pool.probe_all(), critic.answers() if critic else asyncio.sleep(0)
    )
    servers = [
        {
            "url": server.url,
            "answers": answers,
            "in_flight": server.in_flight,
            **({} if server.models is None else {"models": sorted(server.models)}),
        }
        for server, answers in zip(pool.servers, answering, strict=True)
    ]
    body: dict[str, Any] = {"upstreams": servers}
    if critic is not None:
        body["critic"] = {"url": critic.url, "answers": valued}
    if gateway.traffic.draining:
        body["status"] = "draining"
    else:
        # Without the critic's values nothing stops, but everything is served.
        problem = "" if valued or critic is None else "; the critic does not answer"
        body["status"] = ("ok" if any(answering) else "no upstream answers") + problem
    ready = any(answering) and not gateway.traffic.draining
    return web.json_response(body, status=200 if ready else 503)


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

    Requests under way then have the drain timeout to finish, and new ones are refused.

    Args:
        critic: in the place of the configured one.

    Raises InvalidRequest for a bad gate or key file and OSError for a taken port.
    """
    keys = read_keys(config)
    async with AsyncExitStack() as stack:
        pool = UpstreamPool(
            list(config.upstreams),
            limits=Limits(
                config.connect_timeout,
                config.first_token_timeout,
                config.idle_timeout,
                config.total_timeout,
            ),
            attempts=config.attempts,
            health_interval=config.health_interval,
            breaker_failures=config.breaker_failures,
            breaker_timeout=config.breaker_timeout,
            affinity=config.affinity,
            headers=keys.upstream_headers,
            asks_who_decides=config.decide == "auto",
            needs_values=config.critic_in_engine,
        )
        await stack.enter_async_context(pool)
        await pool.ask_who_decides(_PATIENCE)
        metrics = Metrics()
        if critic is None and config.critic_in_engine:
            critic = EngineCritic()
        elif critic is None and config.critic is not None:
            options: dict[str, Any] = {
                "timeout": config.critic_timeout,
                "registry": metrics.registry,
            }
            critic = await stack.enter_async_context(
                CriticServer(config.critic, headers=keys.upstream_headers, **options)
                if config.critic_class is None
                else CustomCritic(load_critic(config.critic), name=config.critic, **options)
            )
        gateway = Gateway(pool, config, metrics, keys, critic=critic)
        sock = sock or listen(config.host, config.port)
        runner = web.AppRunner(
            application(gateway),
            # Else a client's departure goes unnoticed, and its tokens are generated to the end.
            handler_cancellation=True,
            access_log=None,
            logger=http_log,
            # Also how long the next request's head may take, since a connection was opened.
            keepalive_timeout=config.request_timeout,
            shutdown_timeout=_CLEAN_UP,
            max_line_size=_LINE,
            max_field_size=_FIELD,
            max_headers=_FIELDS,
        )
        await runner.setup()
        try:
            await web.SockSite(runner, sock, backlog=1024).start()
            host, port = sock.getsockname()[:2]
            gateway.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            yield gateway
        finally:
            # Still listening: who asks now is told that another gateway must serve it.
            gateway.drain()
            await gateway.traffic.over(config.drain_timeout)
            await runner.cleanup()
            # It does not wait for those that it breaks off last, which are yet to be recorded.
            await gateway.traffic.ended(_CLEAN_UP)
            await gateway.observers.close()
