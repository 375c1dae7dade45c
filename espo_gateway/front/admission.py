"""How many generations are served at a time, and who waits. Nothing polls; nothing is HTTP."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from espo_gateway.errors import TooManyRequests

#: Weight of the latest request in the running mean of durations.
_LATEST = 0.1
#: Longest Retry-After, in seconds; clients take a longer one for none (openai's from two minutes).
_LONGEST = 60


class Admission:
    """At most `max_in_flight` slots, and a queue of at most `max_queue`, first come first served.

        async with admission.slot():
            ...

    in_flight, queued: now. refused: how many were sent away.
    clock: seconds, monotonic.
    """

    def __init__(
        self,
        max_in_flight: int,
        max_queue: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.in_flight = self.refused = 0
        self._max_in_flight, self._max_queue = max_in_flight, max_queue
        self._clock = clock
        self._duration = 0.0  # running mean, seconds
        #: Who waits, in order; a dict, as anyone may leave from the middle.
        self._queue: dict[asyncio.Future[None], None] = {}

    @property
    def queued(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A place among those served, waited for. Raises TooManyRequests at once."""
        await self._enter()
        started = self._clock()
        try:
            yield
        finally:
            taken = self._clock() - started
            self._duration += (_LATEST if self._duration else 1.0) * (taken - self._duration)
            self._leave()

    async def _enter(self) -> None:
        if self.in_flight < self._max_in_flight:  # then nobody waits, either
            self.in_flight += 1
            return
        if self.queued >= self._max_queue:
            self.refused += 1
            raise TooManyRequests(
                f"{self.in_flight} requests are being served and {self.queued} wait, as many as "
                "this gateway takes; try again later",
                headers={"Retry-After": str(self._retry_after())},
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._queue.pop(turn, None)
            else:
                self._leave()  # its turn had come in the moment it left
            raise

    def _leave(self) -> None:
        """Hand the slot to whoever has waited longest."""
        while self._queue:
            turn = next(iter(self._queue))
            del self._queue[turn]
            if not turn.done():
                turn.set_result(None)
                return
        self.in_flight -= 1

    def _retry_after(self) -> int:
        """Seconds until those who wait now will have been served, at the recent pace."""
        seconds = self._duration * (self.queued + 1) / self._max_in_flight
        return min(max(1, math.ceil(seconds)), _LONGEST)
