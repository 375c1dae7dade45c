"""One single request upstream, followed by its session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import aiohttp
import msgspec

from espo_gateway.critic import Inquiry, ValueServer
from espo_gateway.errors import (
    UpstreamError,
    UpstreamProtocolError,
    UpstreamStatusError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from espo_gateway.patience import Limits, Patience
from espo_gateway.reading import read, read_bytes
from espo_gateway.request import Single, upstream_body
from espo_gateway.session import Output, Session
from espo_gateway.signals import decode_chunk
from espo_gateway.sse import SSEParser
from espo_gateway.upstream import UpstreamPool

#: Takes what is ready of a choice, the finished chunk last.
Deliver = Callable[[list[Output]], Awaitable[None]]

#: How much of an unreadable answer an error quotes.
_EXCERPT = 200


async def follow(
    pool: UpstreamPool,
    path: str,
    headers: Mapping[str, str],
    single: Single,
    session: Session,
    deliver: Deliver,
    limits: Limits,
    critic: ValueServer | None = None,
) -> None:
    """Deliver one choice to its client.

    The upstream's request is over, cancelled if need be, before the last chunk is delivered.
    Raises the kinds of `UpstreamError`.
    """
    chat = path.endswith("/chat/completions")
    body = upstream_body(single, chat=chat, token_ids=session.wants_ids)
    inquiry = Inquiry(critic, session) if critic is not None and session.wants_ids else None
    try:
        async with pool.open(
            "POST", path, headers=headers, data=msgspec.json.encode(body)
        ) as response:
            await check_stream(response)
            await _relay(response, session, deliver, inquiry, limits)
            if inquiry is not None:
                await inquiry.conclude()
    finally:
        if inquiry is not None:
            inquiry.close()
    await deliver([*session.drain(), session.finish()])


async def _relay(
    response: aiohttp.ClientResponse,
    session: Session,
    deliver: Deliver,
    inquiry: Inquiry | None,
    limits: Limits,
) -> None:
    """Until the answer's end, or until nothing more of it is needed."""
    parser = SSEParser()
    done = False
    with Patience(response, limits) as patience:
        while not done and not session.ended:
            try:
                received = await read(response)
            except UpstreamUnavailable:
                if patience.expired is None:
                    raise
                received = b""
            if patience.expired is not None:
                raise UpstreamTimeout(f"the upstream {patience.expired}")
            if not received:
                return
            patience.heard()
            failure = None
            try:
                done = _take(session, parser.feed(received))
            except UpstreamError as error:
                failure = error  # what came before it is still the client's
            if inquiry is not None:
                await inquiry.proceed()
            if outputs := session.drain():
                await deliver(outputs)
            if failure is not None:
                raise failure


def _take(session: Session, events: list[bytes]) -> bool:
    """Whether the stream is done."""
    for data in events:
        if data == b"[DONE]":
            return True
        session.receive(data)
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
