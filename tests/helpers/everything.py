"""A server whose routes are all open, and bare HTTP to the gateway before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from espo_gateway.front.gateway import Gateway
from espo_gateway.testing import Fake
from tests.helpers.gateway import gateway_for


class Everything(Fake):
    """Answers every route with 200, and tells what came: as a vLLM whose routes are all open."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, Any, bytes]] = []

    def _add_routes(self, app: web.Application) -> None:
        app.router.add_route("*", "/{path:.*}", self._any)

    async def _models(self, request: web.Request) -> web.Response:
        return await self._any(request)

    async def _any(self, request: web.Request) -> web.Response:
        seen = (request.method, request.raw_path, request.headers.copy(), await request.read())
        self.seen.append(seen)
        return web.json_response({"data": [{"id": "fake"}]})


@asynccontextmanager
async def everything(**settings: Any) -> AsyncIterator[tuple[Everything, Gateway]]:
    # Else the gateway asks the server who decides, and what is seen is not the client's alone.
    settings = {"decide": "gateway", **settings}
    async with Everything() as server, gateway_for(server, **settings) as gateway:
        server.seen.clear()
        yield server, gateway


async def send(gateway: Gateway, data: bytes) -> tuple[int, bytes, bytes]:
    """Raw bytes; status, head and the rest, until the gateway closes or the answer is complete."""
    address = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (
                int(line.split(b":")[1])
                for line in head.lower().split(b"\r\n")
                if b"content-length" in line
            ),
            0,
        )
        body = await reader.readexactly(length)
        return int(head.split()[1]), head, body
    finally:
        writer.close()


def get(target: str, *headers: str) -> bytes:
    head = [f"GET {target} HTTP/1.1", "Host: localhost", *headers, "", ""]
    return "\r\n".join(head).encode("latin-1")
