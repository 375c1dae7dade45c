"""The HTTP surface: OpenAI's endpoints, the gate, health and metrics.

async with running(Config(upstreams=("http://127.0.0.1:8000",), port=0)) as gateway:
    client = AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none")
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

from espo_gateway.answer import Answer, merged, total_usage
from espo_gateway.config import Config
from espo_gateway.critic import CriticServer, ValueServer
from espo_gateway.errors import GatewayError, InvalidRequest, UpstreamError
from espo_gateway.gates import gate_from_json, gate_to_json
from espo_gateway.metrics import Metrics
from espo_gateway.passthrough import forwarded_headers, pass_marked, pass_through
from espo_gateway.relay import follow, interleave
from espo_gateway.request import Plan, plan
from espo_gateway.rules import Gate
from espo_gateway.session import Chunk, Session
from espo_gateway.upstream import UpstreamPool

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_encode = msgspec.json.Encoder().encode


class Gateway:
    """One gateway's state: its servers, the gate in force, its counters."""

    def __init__(
        self,
        pool: UpstreamPool,
        config: Config,
        metrics: Metrics,
        *,
        critic: ValueServer | None = None,
    ) -> None:
        self.pool = pool
        self.url = ""
        self.critic = critic
        self.metrics = metrics
        self.gate = Gate()
        self._config = config
        if config.gate is not None:
            self.push_gate(config.gate)

    def push_gate(self, data: bytes) -> None:
        """Put a gate in force for the requests that come; raises InvalidRequest.

        A request under way keeps the gate it started with.
        """
        self.gate = gate_from_json(data, has_critic=self.critic is not None)
        self.metrics.gate_version.set(self.gate.version)

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(
            middlewares=[self._observe], client_max_size=self._config.max_request_bytes
        )
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_route("*", "/v1/{path:.*}", self._pass_through)
        app.router.add_get("/espo/gate", self._get_gate)
        app.router.add_put("/espo/gate", self._put_gate)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        return app

    @web.middleware
    async def _observe(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Count every request; tell every error in OpenAI's shape."""
        if not request.path.startswith("/v1/"):
            return await self._answered(request, handler)
        resource = request.match_info.route.resource
        endpoint = resource.canonical if resource is not None else "unknown"
        started = time.monotonic()
        status = "499"  # nginx's word for a client that left
        self.metrics.in_flight.inc()
        try:
            response = await self._answered(request, handler)
            status = str(response.status)
            return response
        except (asyncio.CancelledError, ConnectionResetError):
            self.metrics.cancelled.inc()
            raise
        finally:
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(endpoint, status).inc()
            self.metrics.seconds.labels(endpoint).observe(time.monotonic() - started)

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except GatewayError as error:
            self._count_error(error)
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

    def _count_error(self, error: GatewayError) -> None:
        if isinstance(error, UpstreamError):
            self.metrics.upstream_errors.labels(type(error).__name__).inc()
            log.warning("upstream: %s", error.message)

    # -- OpenAI's endpoints --------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        try:
            body = msgspec.json.decode(data)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"the request body is not valid JSON: {error}") from error
        planned = plan(body, chat=request.path.endswith("/chat/completions"))
        if planned.unmonitored is not None:
            return await pass_marked(self.pool, request, planned)
        gate = self.gate
        sessions = [
            Session(gate, planned.control, planned.asked, single, chat=planned.chat)
            for single in planned.singles
        ]
        serve = self._stream if planned.asked.stream else self._answer
        try:
            return await serve(request, planned, sessions)
        finally:
            for session in sessions:
                self.metrics.count(session)

    def _chunks(
        self, request: web.Request, planned: Plan, sessions: list[Session]
    ) -> AsyncGenerator[list[Chunk], None]:
        headers = forwarded_headers(request, json=True)
        streams = [
            follow(self.pool, planned.path, headers, single, session, self.critic)
            for single, session in zip(planned.singles, sessions, strict=True)
        ]
        return interleave(streams)

    async def _answer(
        self, request: web.Request, planned: Plan, sessions: list[Session]
    ) -> web.StreamResponse:
        answers = [Answer(chat=planned.chat) for _ in sessions]
        async with aclosing(self._chunks(request, planned, sessions)) as batches:
            async for chunks in batches:
                for chunk in chunks:
                    answers[chunk["choices"][0]["index"]].add(chunk)
        usage = total_usage([(session.prompt, session.usage) for session in sessions])
        answer = merged(answers, usage, chat=planned.chat)
        return web.Response(body=_encode(answer), content_type="application/json")

    async def _stream(
        self, request: web.Request, planned: Plan, sessions: list[Session]
    ) -> web.StreamResponse:
        response: web.StreamResponse | None = None
        first: Chunk = {}
        try:
            async with aclosing(self._chunks(request, planned, sessions)) as batches:
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
            self._count_error(error)
            end = _event(error.body()) + b"data: [DONE]\n\n"
        await response.write(end)
        await response.write_eof()
        return response

    async def _pass_through(self, request: web.Request) -> web.StreamResponse:
        return await pass_through(self.pool, request)

    # -- the gateway's own ---------------------------------------------------------------------

    async def _get_gate(self, request: web.Request) -> web.Response:
        return web.Response(body=gate_to_json(self.gate), content_type="application/json")

    async def _put_gate(self, request: web.Request) -> web.Response:
        self.push_gate(await request.read())
        return await self._get_gate(request)

    async def _health(self, request: web.Request) -> web.Response:
        critic = self.critic if isinstance(self.critic, CriticServer) else None
        answering, valued = await asyncio.gather(
            self.pool.probe_all(), critic.answers() if critic else asyncio.sleep(0)
        )
        servers = [
            {"url": server.url, "answers": answers, "in_flight": server.in_flight}
            for server, answers in zip(self.pool.servers, answering, strict=True)
        ]
        healthy = any(answering)
        body: dict[str, Any] = {"upstreams": servers}
        if critic is not None:
            body["critic"] = {"url": critic.url, "answers": valued}
        # Without the critic's values nothing stops, but everything is served.
        problem = "" if valued or critic is None else "; the critic does not answer"
        body["status"] = ("ok" if healthy else "no upstream answers") + problem
        return web.json_response(body, status=200 if healthy else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self.metrics.exposition(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )


def event_stream() -> web.StreamResponse:
    """An answer of server-sent events."""
    return web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    )


def _event(chunk: Chunk) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"


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
            critic = await stack.enter_async_context(
                CriticServer(
                    config.critic, timeout=config.critic_timeout, registry=metrics.registry
                )
            )
        gateway = Gateway(pool, config, metrics, critic=critic)
        sock = sock or listen(config.host, config.port)
        runner = web.AppRunner(
            gateway.app(),
            # Else a client's departure goes unnoticed, and its tokens are generated to the end.
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=config.shutdown_timeout,
        )
        await runner.setup()
        try:
            await web.SockSite(runner, sock, backlog=1024).start()
            host, port = sock.getsockname()[:2]
            gateway.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            yield gateway
        finally:
            await runner.cleanup()
