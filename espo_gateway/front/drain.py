"""Requests under way, and whether more are taken: how a gateway ends without breaking any off."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from espo_gateway.errors import Draining


class Traffic:
    """The requests under way.

    with traffic.one():         # raises Draining once `drain` was called
        ...
    """

    def __init__(self) -> None:
        self.count = 0
        self.draining = False
        self._over, self._none = asyncio.Event(), asyncio.Event()
        self._none.set()

    @contextmanager
    def one(self) -> Iterator[None]:
        if self.draining:
            raise Draining("the gateway is stopping; send the request to another one")
        self.count += 1
        self._none.clear()
        try:
            yield
        finally:
            self.count -= 1
            self._look()

    def drain(self) -> None:
        """Take no more."""
        self.draining = True
        self._look()

    def abandon(self) -> None:
        """Wait for none either."""
        self.draining = True
        self._over.set()

    async def over(self, seconds: float) -> None:
        """Until none is under way, or they are abandoned; at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()

    async def ended(self, seconds: float) -> None:
        """Until none is under way, abandoned or not; at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._none.wait()

    def _look(self) -> None:
        if not self.count:
            self._none.set()
        if self.draining and not self.count:
            self._over.set()
