"""One single request upstream, followed by its session; and several of them side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

import aiohttp
import msgspec

from espo_gateway.affinity import affinity_key
from espo_gateway.critic import Inquiry, ValueServer
from espo_gateway.errors import UpstreamError, UpstreamProtocolError, UpstreamStatusError
from espo_gateway.reading import read_bytes, read_events
from espo_gateway.request import Single, upstream_body
from espo_gateway.session import Chunk, Session
from espo_gateway.signals import decode_chunk
from espo_gateway.upstream import UpstreamPool

#: How much of an unreadable answer an error quotes.
_EXCERPT = 200


async def follow(
    pool: UpstreamPool,
    path: str,
    headers: Mapping[str, str],
    single: Single,
    session: Session,
    critic: ValueServer | None = None,
) -> AsyncGenerator[list[Chunk], None]:
    """The client's chunks of one choice, as many at a time as are ready, the finished one last.

    The upstream's request is over, cancelled if need be, before the last chunk is given. Close the
    generator (`contextlib.aclosing`) to cancel it earlier. Raises the kinds of `UpstreamError`.
    """
    chat = path.endswith("/chat/completions")
    body = upstream_body(single, chat=chat, token_ids=session.wants_ids)
    key = affinity_key(pool.affinity, headers, single.body)
    inquiry = Inquiry(critic, session) if critic is not None and session.wants_ids else None
    try:
        async with pool.open(
            "POST", path, headers=headers, data=msgspec.json.encode(body), key=key
        ) as response:
            await check_stream(response)
            async with aclosing(read_events(response)) as reads:
                async for events in reads:
                    pool.begun(response)
                    done, failure = False, None
                    try:
                        done = _feed(session, events)
                    except UpstreamError as error:
                        failure = error  # what came before it is still the client's
                    if inquiry is not None:
                        await inquiry.proceed()
                    if chunks := session.drain():
                        yield chunks
                    if failure is not None:
                        raise failure
                    if done or session.ended:
                        break
            if inquiry is not None:
                await inquiry.conclude()
    finally:
        if inquiry is not None:
            inquiry.close()
    yield [*session.drain(), session.finish()]


def _feed(session: Session, events: list[bytes]) -> bool:
    """Whether the stream is done."""
    for data in events:
        if data == b"[DONE]":
            return True
        try:
            chunk = decode_chunk(data)
        except ValueError as error:
            raise UpstreamProtocolError(
                f"the upstream sent no JSON object: {data[:_EXCERPT]!r}"
            ) from error
        session.feed(chunk)
    return False


async def check_stream(response: aiohttp.ClientResponse) -> None:
    """Raises UpstreamStatusError or UpstreamProtocolError unless the answer is an event stream."""
    if response.status == 200 and response.content_type == "text/event-stream":
        return
    data = b"".join([received async for received in read_bytes(response)])
    if response.status == 200:
        raise UpstreamProtocolError(
            f"the upstream answered a streaming request with {response.content_type}: "
            f"{data[:_EXCERPT]!r}"
        )
    try:
        answer: object = decode_chunk(data)
    except ValueError:
        answer = data[:_EXCERPT].decode(errors="replace")
    retry_after = response.headers.get("Retry-After")
    raise UpstreamStatusError(
        response.status, answer, {"Retry-After": retry_after} if retry_after else None
    )


def interleave(
    streams: list[AsyncGenerator[list[Chunk], None]],
) -> AsyncGenerator[list[Chunk], None]:
    """Several `follow`s as one, in order of arrival; the first that fails ends them all."""
    return streams[0] if len(streams) == 1 else _interleaved(streams)


async def _interleaved(
    streams: list[AsyncGenerator[list[Chunk], None]],
) -> AsyncGenerator[list[Chunk], None]:
    # Small, so that a slow client slows the servers instead of filling memory.
    queue: asyncio.Queue[list[Chunk] | Exception | None] = asyncio.Queue(len(streams))

    async def forward(stream: AsyncGenerator[list[Chunk], None]) -> None:
        try:
            async with aclosing(stream):
                async for chunks in stream:
                    await queue.put(chunks)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(forward(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
