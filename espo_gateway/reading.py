"""An upstream's answer as it arrives."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import aiohttp

from espo_gateway.errors import UpstreamTimeout, UpstreamUnavailable, said
from espo_gateway.sse import SSEParser


async def read(response: aiohttp.ClientResponse) -> bytes:
    """What has arrived of an answer's body, at least a byte; nothing at its end.

    Raises:
        UpstreamUnavailable: the connection broke before the answer's end.
        UpstreamTimeout: nothing came for longer than the idle timeout.
    """
    try:
        return await response.content.readany()
    except TimeoutError as error:
        raise UpstreamTimeout("the upstream stopped sending for too long") from error
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamUnavailable(f"the upstream broke off: {said(error)}") from error


async def read_bytes(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    """All of an answer's body, piece by piece. Raises as `read`."""
    while received := await read(response):
        yield received


async def read_events(response: aiohttp.ClientResponse) -> AsyncGenerator[list[bytes], None]:
    """The data of an answer's events, as many at a time as one read brought. Raises as `read`."""
    parser = SSEParser()
    async for received in read_bytes(response):
        if events := parser.feed(received):
            yield events
