"""What the fakes share: a port, a model's name, and counters that can be waited for."""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

from aiohttp import web

from espo_gateway.app import listen


class Fake(ABC):
    """A server on `url` while its block lasts; make your own by adding routes.

    gated: work is done only as `release` allows. port: 0 takes a free one.
    """

    def __init__(self, *, gated: bool = False, port: int = 0) -> None:
        self.url = ""
        self._port = port
        self._permits = asyncio.Semaphore(0) if gated else None
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**28)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        self._add_routes(app)
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            shutdown_timeout=0.1,
            # As vLLM's server, which has hardly a limit.
            max_line_size=2**17,
            max_field_size=2**17,
            max_headers=2**10,
        )
        await self._runner.setup()
        sock: socket.socket = listen("127.0.0.1", self._port)
        await web.SockSite(self._runner, sock, backlog=1024).start()
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Close the port and drop every connection, as a server that dies does."""
        if self._runner is not None:
            await self._runner.cleanup()

    def release(self, count: int = 1) -> None:
        """Let that much more be done."""
        assert self._permits is not None, "make the server with gated=True"
        for _ in range(count):
            self._permits.release()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is looked at whenever a counter has moved."""
        async with self._changed:
            await self._changed.wait_for(condition)

    @abstractmethod
    def _add_routes(self, app: web.Application) -> None:
        """Add what this server answers, beside `/health` and `/v1/models`."""

    async def _count(self, **changes: int) -> None:
        for name, change in changes.items():
            setattr(self, name, getattr(self, name) + change)
        async with self._changed:
            self._changed.notify_all()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    def _drop(
        self, request: web.Request, response: web.StreamResponse | None = None
    ) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return response or web.Response()
