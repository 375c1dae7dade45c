"""The client's side of a stream: server-sent events."""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web

from espo_gateway.stream.chunks import Chunk
from espo_gateway.stream.templates import Output

_encode = msgspec.json.Encoder().encode

#: Bytes that a client may be behind before its stream waits for it.
_BEHIND = 64 * 2**10


def event(chunk: Chunk) -> bytes:
    """A chunk as an event."""
    return b"data: " + _encode(chunk) + b"\n\n"


def event_stream(status: int = 200) -> web.StreamResponse:
    """An answer of events."""
    return web.StreamResponse(
        status=status,
        headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"},
    )


class EventStream:
    """The stream of one request, whose choices share it.

    It begins with its first event: an error before that has a status of its own.

    begun: whether it has.
    """

    def __init__(self, request: web.Request) -> None:
        self.begun = False
        self._request = request
        self._response = event_stream()
        self._beginning = asyncio.Lock()
        self._chunked = False
        self._head: Chunk = {}

    @property
    def flowing(self) -> bool:
        """Whether `put` may be used: it has begun, and the client keeps up."""
        transport = self._request.transport
        return self.begun and (transport is None or transport.get_write_buffer_size() < _BEHIND)

    def put(self, outputs: list[Output]) -> None:
        """Write without waiting, past aiohttp's response, which has a coroutine for every write."""
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        data = self._encoded(outputs)
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    async def deliver(self, outputs: list[Output]) -> None:
        """Write, and wait until the client has kept up."""
        data = self._encoded(outputs)
        if not self.begun:
            async with self._beginning:
                if not self.begun:
                    await self._response.prepare(self._request)
                    self._chunked = self._response.headers.get("Transfer-Encoding") == "chunked"
                    self.begun = True
        await self._response.write(data)

    async def close(self, end: bytes) -> web.StreamResponse:
        """Write the last bytes; the response that has been sent."""
        await self._response.write(end)
        await self._response.write_eof()
        return self._response

    def _encoded(self, outputs: list[Output]) -> bytes:
        events = []
        for output in outputs:
            if isinstance(output, tuple):
                template, text = output
                events.append(template.event(text))
                continue
            # Choices of one answer share its id, wherever they come from.
            head = self._head = self._head or output
            output.update((name, head[name]) for name in ("id", "created") if name in head)
            events.append(event(output))
        return b"".join(events)
