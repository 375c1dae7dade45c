"""One HTTP/1.1 request to a server and its answer, as it comes off the wire.

A client of our own, for one reason: what arrives is handed on in the turn of the event loop that
received it. With aiohttp's client each token wakes a task through a queue and a future, which
costs more than watching it (`scripts/bench_gateway.py`). The parsing is httptools' (llhttp). Each
request has a connection of its own, whose end is how a generation is cancelled.
"""

from __future__ import annotations

import asyncio
import math
import re
import socket
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools
from multidict import CIMultiDict

from espo_gateway.errors import (
    InvalidRequest,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamUnavailable,
    said,
)
from espo_gateway.upstream.inflation import INFLATED, Inflation

#: Of an answer's head, and of a body that nobody reads yet.
MAX_HEAD_BYTES, MAX_BUFFERED_BYTES = 64 * 2**10, 256 * 2**10

#: Seconds of silence until the system asks whether the server's machine is there, seconds between
#: its questions, and how many may go unanswered. Of an answer that comes whole there is no other
#: sign that its machine has gone.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}

#: Of a request, written without waiting until it is taken.
_AT_ONCE = 64 * 2**10

#: A request's body.
Data = bytes | tuple[bytes | memoryview, ...]

_NOT_IN_HEAD = re.compile(r"[\r\n\0]")


@dataclass(frozen=True)
class Limits:
    """How long an answer may take, in seconds.

    connect: until there is a connection. first: from then on until the body's first byte, infinite
    for no limit. idle: between any two reads after that. total: altogether, 0 for no limit.
    """

    connect: float = 5.0
    first: float = 600.0
    idle: float = 600.0
    total: float = 0.0


async def request(
    url: str,
    method: str,
    path: str,
    headers: Mapping[str, str],
    data: Data | None,
    limits: Limits,
) -> Reply:
    """Send a request; its answer once the head has come, of whatever status. `close` it.

    data: the body; in pieces when some of them belong to other requests too.

    Raises:
        InvalidRequest: the path or a header would break out of the request's head.
        UpstreamUnavailable: no connection, or it broke before the answer's head was there.
        UpstreamTimeout: the head took too long.
        UpstreamProtocolError: what came is no HTTP.
    """
    address = urlsplit(url)
    lines = [
        f"{method} {address.path}{path} HTTP/1.1",
        f"Host: {address.netloc}",
        "Connection: close",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    pieces = (data,) if isinstance(data, bytes) else data or ()
    if data is not None:
        lines.append(f"Content-Length: {sum(map(len, pieces))}")
    if " " in path or any(map(_NOT_IN_HEAD.search, lines)):
        raise InvalidRequest("the path or a header has a character that cannot be sent on")
    head = "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")
    loop = asyncio.get_running_loop()
    tls = address.scheme == "https"
    try:
        async with asyncio.timeout(limits.connect):
            _, reply = await loop.create_connection(
                lambda: Reply(url, limits, empty=method == "HEAD"),
                address.hostname or "",
                address.port or (443 if tls else 80),
                ssl=tls or None,
            )
    except TimeoutError as error:
        raise UpstreamUnavailable(f"{url}: no connection in time") from error
    except OSError as error:
        raise UpstreamUnavailable(f"{url}: {said(error)}") from error
    try:
        await reply.send([head, *pieces])
        await reply.begun()
    except BaseException:
        reply.close()
        raise
    return reply


class Reply(asyncio.Protocol):
    """An answer. Read it piece by piece (`read`), or have it pushed (`push`).

    status, headers: there once `request` has returned. A Content-Encoding is among them only if it
        could not be undone. Every error is told to whoever reads.
    """

    def __init__(self, url: str, limits: Limits, *, empty: bool) -> None:
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        self._url = url
        self._limits = limits
        self._empty = empty
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._receive: Callable[[bytes], bool] | None = None
        self._pieces: list[bytes] = []  # of one read
        self._buffered = bytearray()
        self._paused = self._unwritable = False
        self._head_bytes = 0
        self._head_done = self._complete = self._ended = False
        self._error: Exception | None = None
        self._begun = self._last = self._loop.time()
        self._heard = False
        self._timer: asyncio.TimerHandle | None = None
        self._inflation: Inflation | None = None
        self._until_closed = False

    @property
    def content_type(self) -> str:
        """Without its parameters, in lower case."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    @property
    def buffered(self) -> int:
        """Bytes of the body that have come and are not read."""
        return len(self._buffered)

    async def send(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Write a request, no faster than it is taken: copies of it would pile up."""
        assert self._transport is not None
        if sum(map(len, pieces)) <= _AT_ONCE:
            self._transport.write(b"".join(pieces))
            return
        for piece in pieces:
            view = memoryview(piece)  # whose slices are no copies
            for start in range(0, len(view), _AT_ONCE):
                while self._unwritable and not (self._ended or self.status >= 400):
                    await self._wait()
                if self._ended or self.status >= 400:
                    return  # it is refused already; `begun` tells
                self._transport.write(view[start : start + _AT_ONCE])

    async def begun(self) -> None:
        """Wait for the head."""
        while not self._head_done:
            self._raise_error()
            await self._wait()

    async def read(self) -> bytes:
        """What has arrived of the body, at least a byte; nothing at its end.

        Raises UpstreamError: the connection broke, took too long, or carried nonsense.
        """
        while not self._buffered:
            if self._ended:
                self._raise_error()
                return b""
            await self._wait()
        data = bytes(self._buffered)
        self._buffered.clear()
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def peek(self, size: int) -> bytes:
        """What `read` would give next, at least `size` bytes unless no more will come."""
        while len(self._buffered) < size and not self._ended:
            await self._wait()
        return bytes(self._buffered)

    async def body(self) -> bytes:
        """All that is left of it. Raises as `read`."""
        parts = []
        while part := await self.read():
            parts.append(part)
        return b"".join(parts)

    async def push(self, receive: Callable[[bytes], bool]) -> bool:
        """Hand every piece of the body to `receive` as it arrives, until it says False.

        Returns whether the body has come to its end. Raises as `read`, and what `receive` raises.
        """
        if self._buffered and not receive(await self.read()):
            return False
        self._receive = receive
        try:
            while self._receive is not None:
                if self._ended:
                    self._raise_error()
                    return True
                await self._wait()
            self._raise_error()
            return False
        finally:
            self._receive = None

    def close(self) -> None:
        """Drop the connection: the server aborts the request. Whatever is read next is an error."""
        self._end(UpstreamUnavailable(f"{self._url}: closed"))
        if self._transport is not None:
            self._transport.abort()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self, error: Exception | None) -> None:
        if not self._ended:
            self._ended, self._error = True, error
            if self._timer is not None:
                self._timer.cancel()
            self._wake()

    # -- asyncio's calls -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not every system has them all
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._look()

    def pause_writing(self) -> None:
        self._unwritable = True

    def resume_writing(self) -> None:
        self._unwritable = False
        self._wake()

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(UpstreamProtocolError(f"{self._url} sent no valid HTTP: {said(error)}"))
            return
        if not self._head_done:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._fail(UpstreamProtocolError(f"{self._url} sent a head without end"))
        elif self._pieces:
            self._last = self._loop.time()
            if not self._heard:
                self._heard = True
                self._look()
            body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._pieces.clear()
            try:
                if self._inflation is not None:
                    body = self._inflation.feed(body)
            except zlib.error as broken:
                self._fail(UpstreamProtocolError(f"{self._url} sent no valid encoding: {broken}"))
                return
            if body:
                self._take(body)
        if self._complete:
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._head_done and self._until_closed and error is None:
            self._end(None)
        else:
            broken = f"{self._url} broke off" + (f": {said(error)}" if error else "")
            self._end(UpstreamUnavailable(broken))

    def _take(self, body: bytes) -> None:
        if self._receive is None:
            self._buffered += body
            if len(self._buffered) > MAX_BUFFERED_BYTES and not self._paused:
                assert self._transport is not None
                self._paused = True
                self._transport.pause_reading()
            self._wake()
            return
        try:
            if self._receive(body):
                return
        except Exception as error:
            self._fail(error)
        self._receive = None
        self._wake()

    def _fail(self, error: Exception) -> None:
        self._end(error)
        if self._transport is not None:
            self._transport.abort()

    def _look(self) -> None:
        """Whether it takes too long. One timer however many reads: one for each costs much."""
        if self._timer is not None:
            self._timer.cancel()
        limits = self._limits
        if self._heard:
            silence, problem = limits.idle, f"sent nothing for {limits.idle:g} s"
        else:
            silence, problem = limits.first, f"sent no first token within {limits.first:g} s"
        due = self._last + silence
        if limits.total and self._begun + limits.total < due:
            due, problem = self._begun + limits.total, f"took more than {limits.total:g} s"
        if due == math.inf:
            return
        if self._paused or self._loop.time() < due:
            # Of a paused one it is not the server that is slow.
            self._timer = self._loop.call_at(max(due, self._loop.time() + 0.05), self._look)
        else:
            self._fail(UpstreamTimeout(f"{self._url} {problem}"))

    # -- httptools' calls ----------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.add(name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:  # "100 Continue" and the like; another head follows
            self.headers.clear()
            return
        self._head_done = True
        self._until_closed = not {"Content-Length", "Transfer-Encoding"} & self.headers.keys()
        encoding = self.headers.get("Content-Encoding", "").strip().lower()
        if encoding in INFLATED and not self._empty:
            self._inflation = Inflation()
            self.headers.popall("Content-Length", None)
        if encoding in (*INFLATED, "identity") and not self._empty:
            self.headers.popall("Content-Encoding")
        self._complete = self._empty
        self._wake()

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._complete = self._head_done
