"""Waiting for whichever ends first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any


async def first_of(*doing: Awaitable[Any]) -> asyncio.Future[Any]:
    """The one that ends first, of several at once the foremost. The others are cancelled, and have
    ended; all are, when whoever waits is."""
    futures = [asyncio.ensure_future(one) for one in doing]
    try:
        done, _ = await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in futures:
            future.cancel()
        await asyncio.gather(*futures, return_exceptions=True)
    return next(future for future in futures if future in done)
