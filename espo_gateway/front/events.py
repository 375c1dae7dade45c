"""The client's side of a stream: server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import msgspec
from aiohttp import web

from espo_gateway.stream.chunks import Chunk
from espo_gateway.stream.templates import Output

_encode = msgspec.json.Encoder().encode

_ALIVE = b": keep-alive\n\n"
#: Bytes that a client may be behind before its stream waits for it.
_BEHIND = 64 * 2**10


def event(chunk: Chunk) -> bytes:
    """A chunk as an event."""
    return b"data: " + _encode(chunk) + b"\n\n"


class EventStream:
    """The stream of one request, whose choices share it.

    It begins with its first event: an error before that has a status of its own.

    begun: whether it has. certain: to be set once a server has answered well, so that nothing but
    the wait for a token stands between the client and its status.
    """

    def __init__(self, request: web.Request) -> None:
        self.begun = False
        self.certain = asyncio.Event()
        self._request = request
        self._transport = request.transport
        self._response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
            }
        )
        self._beginning = asyncio.Lock()
        self._chunked = False
        self._told = False

    @property
    def flowing(self) -> bool:
        """Whether `put` may be used: it has begun, and the client keeps up."""
        transport = self._transport
        return self.begun and (transport is None or transport.get_write_buffer_size() < _BEHIND)

    def put(self, outputs: list[Output], comments: bytes = b"") -> None:
        """Write without waiting, past aiohttp's response, which has a coroutine for every write.

        comments: before the outputs.
        """
        data = comments + self._encoded(outputs) if comments else self._encoded(outputs)
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    async def deliver(self, outputs: list[Output]) -> None:
        """Write, and wait until the client has kept up."""
        await self.send(self._encoded(outputs))

    async def send(self, data: bytes) -> None:
        """The same of what is encoded, or of comments."""
        if not self.begun:
            async with self._beginning:
                if not self.begun:
                    await self._response.prepare(self._request)
                    self._chunked = self._response.headers.get("Transfer-Encoding") == "chunked"
                    self.begun = True
        if data:
            await self._response.write(data)

    @asynccontextmanager
    async def kept_alive(self, seconds: float) -> AsyncIterator[None]:
        """Until the first token a comment every so many seconds, once it is `certain`; 0: none.

        Clients and load balancers give up on an answer that does not begin.
        """
        task = asyncio.create_task(self._keep_alive(seconds)) if seconds else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])  # it may have been about to begin
                self.begun = self._response.prepared

    async def _keep_alive(self, seconds: float) -> None:
        await self.certain.wait()
        while True:
            await asyncio.sleep(seconds)
            if self._told:
                return
            with suppress(ConnectionError):  # whoever serves the client notices it, too
                await self.send(_ALIVE)

    async def close(self, end: bytes) -> web.StreamResponse:
        """Write the last bytes; the response that has been sent."""
        await self.send(end)
        await self._response.write_eof()
        return self._response

    def sees(self, chunk: Chunk) -> None:
        """Take note of a chunk that is about to be sent: with the first token our comments end."""
        if self._told:
            return
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            delta = choice.get("delta") if isinstance(choice, dict) else None
            # A chat may begin with a chunk that has nothing but the role.
            more = not isinstance(delta, dict) or any({**delta, "role": None}.values())
            self._told = self._told or more or bool(choice.get("finish_reason"))

    def _encoded(self, outputs: list[Output]) -> bytes:
        events = []
        for output in outputs:
            if isinstance(output, tuple):
                template, text = output
                events.append(template.event(text))
            else:
                self.sees(output)
                events.append(event(output))
        return b"".join(events)
