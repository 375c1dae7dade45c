"""One request and its answer, against a server that sends just the bytes it is told to."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espo_gateway.errors import (
    InvalidRequest,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from espo_gateway.supervisor import free_port
from espo_gateway.upstream.connection import MAX_BUFFERED_BYTES, Limits, Reply, request

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Plain; charset=utf-8\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\nOdd: 1\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass
class Peer:
    """A server's side. `ends`: after the bytes it closes; `lost`: the client has gone."""

    url: str = ""
    asked: bytes = b""
    writer: asyncio.StreamWriter | None = None
    connected: asyncio.Event = field(default_factory=asyncio.Event)
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, data: bytes) -> None:
        assert self.writer is not None
        self.writer.write(data)


@asynccontextmanager
async def peer(answer: bytes = b"", *, ends: bool = False) -> AsyncIterator[Peer]:
    one = Peer()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        one.writer = writer
        one.asked = await reader.readuntil(b"\r\n\r\n")
        one.connected.set()
        writer.write(answer)
        if ends:
            writer.close()
        try:
            while await reader.read(2**16):
                pass
        except ConnectionError:
            pass
        one.lost.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        one.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield one
        if one.writer is not None and not one.writer.is_closing():
            one.writer.transport.abort()


async def ask(one: Peer, *, method: str = "GET", limits: Limits | None = None) -> Reply:
    return await request(one.url, method, "/v1/x?y=1", {"A": "b"}, None, limits or Limits())


@pytest.mark.parametrize(
    ("answer", "ends"),
    [
        (CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", False),
        (HEAD + b"Content-Length: 5\r\n\r\nabcde", False),
        (HEAD + b"\r\nabcde", True),
        (
            b"HTTP/1.1 100 Continue\r\nOdd: 1\r\n\r\n" + HEAD + b"Content-Length: 5\r\n\r\nabcde",
            False,
        ),
    ],
    ids=["chunked", "length", "until closed", "after a 100"],
)
async def test_a_body_however_its_end_is_told(answer: bytes, ends: bool) -> None:
    async with peer(answer, ends=ends) as one:
        reply = await ask(one)
        assert (reply.status, reply.content_type) == (200, "text/plain")
        assert "Odd" not in reply.headers
        assert await reply.body() == b"abcde"
        assert await reply.read() == b""
        reply.close()
        assert one.asked.startswith(b"GET /v1/x?y=1 HTTP/1.1\r\nHost: 127.0.0.1:")
        assert b"\r\nA: b\r\n" in one.asked
        assert b"\r\nConnection: close\r\n" in one.asked


async def test_a_server_whose_machine_has_gone_is_noticed_however_long_it_may_be_silent() -> None:
    async with peer() as one:
        sock = socket.create_connection(("127.0.0.1", int(one.url.rpartition(":")[2])))
        sock.setblocking(False)
        _, reply = await asyncio.get_running_loop().create_connection(
            lambda: Reply(one.url, Limits(), empty=False), sock=sock
        )
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        idle, between, unanswered = (sock.getsockopt(socket.IPPROTO_TCP, name) for name in names)
        assert idle + between * unanswered <= 300
        reply.close()


async def test_a_head_request_has_no_body() -> None:
    async with peer(HEAD + b"Content-Length: 5\r\n\r\n") as one:
        reply = await ask(one, method="HEAD")
        assert await reply.body() == b""
        reply.close()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=8))
async def test_bytes_may_be_split_anywhere(cuts: list[int]) -> None:
    answer = CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    async with peer() as one:
        asking = asyncio.ensure_future(ask(one))
        await one.connected.wait()
        assert one.writer is not None
        for cut in cuts:
            one.send(answer[:cut])
            answer = answer[cut:]
            await one.writer.drain()
            await asyncio.sleep(0)
        one.send(answer)
        reply = await asking
        assert await reply.body() == b"abcde"
        reply.close()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (b"", UpstreamUnavailable, "broke off"),
        (HEAD, UpstreamUnavailable, "broke off"),
        (b"what?\r\n\r\n", UpstreamProtocolError, "no valid HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: " + b"x" * 2**20, UpstreamProtocolError, "head without end"),
        (
            HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            UpstreamProtocolError,
            "no valid HTTP",
        ),
    ],
    ids=["nothing", "half a head", "no HTTP", "endless head", "two lengths"],
)
async def test_a_head_that_is_none(answer: bytes, error: type[Exception], message: str) -> None:
    async with peer(answer, ends=True) as one:
        with pytest.raises(error, match=message):
            await ask(one)
        await one.lost.wait()


@pytest.mark.parametrize("way", ["read", "push"])
@pytest.mark.parametrize(
    ("rest", "error"),
    [
        (b"5\r\nab", UpstreamUnavailable),
        (b"2\r\nab\r\nzz\r\n", UpstreamProtocolError),
    ],
    ids=["half a chunk", "no chunk"],
)
async def test_a_body_that_breaks(rest: bytes, error: type[Exception], way: str) -> None:
    """What came before the break is handed on first."""
    async with peer(CHUNKED + rest, ends=True) as one:
        reply = await ask(one)
        seen = bytearray()

        def receive(data: bytes) -> bool:
            seen.extend(data)
            return True

        async def read() -> None:
            while data := await reply.read():
                seen.extend(data)

        with pytest.raises(error):
            await (reply.push(receive) if way == "push" else read())
        assert bytes(seen) == (b"ab" if error is UpstreamUnavailable else b"")
        reply.close()


async def test_no_server() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UpstreamUnavailable, match=url):
        await request(url, "GET", "/", {}, None, Limits())


@pytest.mark.parametrize(
    ("limits", "answer", "message"),
    [
        (Limits(first=0.05), b"", "no first token within 0.05 s"),
        (Limits(first=0.05), CHUNKED, "no first token within 0.05 s"),
        (Limits(idle=0.05), CHUNKED + b"1\r\na\r\n", "sent nothing for 0.05 s"),
        (Limits(total=0.05), CHUNKED + b"1\r\na\r\n", "took more than 0.05 s"),
    ],
    ids=["head", "first byte", "silence", "altogether"],
)
async def test_what_takes_too_long(limits: Limits, answer: bytes, message: str) -> None:
    async with peer(answer) as one:
        with pytest.raises(UpstreamTimeout, match=message):
            await (await ask(one, limits=limits)).body()
        await one.lost.wait()


@pytest.mark.parametrize("leave", ["cancel", "close"])
async def test_leaving_drops_the_connection(leave: str) -> None:
    async with peer(CHUNKED if leave == "close" else b"") as one:
        asking = asyncio.ensure_future(ask(one))
        await one.connected.wait()
        if leave == "cancel":
            asking.cancel()
        else:
            (await asking).close()
        await one.lost.wait()


async def test_a_push_can_be_left_and_taken_up_by_reading() -> None:
    async with peer(CHUNKED + b"1\r\na\r\n") as one:
        reply = await ask(one)
        got: list[bytes] = []

        def receive(data: bytes) -> bool:
            got.append(data)
            return b"b" not in data

        pushing = asyncio.ensure_future(reply.push(receive))
        while not got:  # noqa: ASYNC110 (the event loop's own turns)
            await asyncio.sleep(0)
        one.send(b"1\r\nb\r\n")
        assert await pushing is False
        one.send(b"1\r\nc\r\n0\r\n\r\n")
        assert await reply.body() == b"c"
        assert b"".join(got) == b"ab"
        assert await reply.push(receive) is True
        reply.close()


async def test_what_a_receiver_raises_ends_the_push() -> None:
    def receive(data: bytes) -> bool:
        raise ConnectionResetError("the client has left")

    async with peer(CHUNKED) as one:
        reply = await ask(one)
        pushing = asyncio.ensure_future(reply.push(receive))
        await asyncio.sleep(0)
        one.send(b"1\r\na\r\n")
        with pytest.raises(ConnectionResetError):
            await pushing
        await one.lost.wait()


async def test_an_unread_body_does_not_fill_the_memory() -> None:
    async with peer(HEAD + b"\r\n") as one:
        reply = await ask(one, limits=Limits(idle=0.5))
        assert one.writer is not None
        one.send(b"x" * 2**26)
        while reply.buffered <= MAX_BUFFERED_BYTES:  # noqa: ASYNC110 (the event loop's own turns)
            await asyncio.sleep(0)
        await asyncio.sleep(0.6)
        assert reply.buffered < 2 * MAX_BUFFERED_BYTES
        one.writer.close()
        assert len(await reply.body()) == 2**26  # and nobody took the pause for silence
        reply.close()


@pytest.mark.parametrize(
    ("path", "headers"),
    [("/v1/a b", {}), ("/v1/\r\nX: y", {}), ("/", {"A": "b\r\nC: d"}), ("/", {"A\n": "b"})],
)
async def test_nothing_breaks_out_of_the_head(path: str, headers: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="cannot be sent on"):
        await request("http://127.0.0.1:9", "GET", path, headers, None, Limits())


async def test_a_request_is_sent_no_faster_than_it_is_taken() -> None:
    """And not to its end when it is refused before."""
    arrived, answer = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        arrived.set()
        await answer.wait()
        writer.write(b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno")

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1000)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        body = b"x" * (64 * 2**20)
        asked = asyncio.create_task(
            request(url, "POST", "/", {}, (b"", memoryview(body)), Limits())
        )
        await arrived.wait()
        transports = [t for t in gc.get_objects() if issubclass(type(t), asyncio.Transport)]
        assert 0 < sum(t.get_write_buffer_size() for t in transports) < 2**20
        answer.set()
        reply = await asked
        assert (reply.status, await reply.body()) == (413, b"no")
        reply.close()
