"""How many choices are generated at a time, and who waits. Nothing polls; nothing is HTTP."""

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
    """At most `max_in_flight` slots, and a queue of at most `max_queue` requests, in order.

        async with admission.slot(choices) as slots:
            async with slots.one():
                ...

    A request waits until it has a slot for each of its choices, or all there are: then its choices
    take turns. Whoever stands behind it waits too, so that no large one waits for ever.

    in_flight: slots taken. queued: requests that wait. refused: how many were sent away.
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
        #: Who waits for how many, in order; a dict, as anyone may leave from the middle.
        self._queue: dict[asyncio.Future[None], int] = {}

    @property
    def queued(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def slot(self, choices: int = 1) -> AsyncIterator[Slots]:
        """A place among those served, waited for. Raises TooManyRequests at once."""
        slots = Slots(self, choices, min(choices, self._max_in_flight))
        await self._enter(slots.held)
        started = self._clock()
        try:
            yield slots
        finally:
            taken = self._clock() - started
            self._duration += (_LATEST if self._duration else 1.0) * (taken - self._duration)
            self.leave(slots.held)

    async def _enter(self, count: int) -> None:
        if not self._queue and self.in_flight + count <= self._max_in_flight:
            self.in_flight += count
            return
        if self.queued >= self._max_queue:
            self.refused += 1
            raise TooManyRequests(
                f"{self.in_flight} requests are being served and {self.queued} wait, as many as "
                "this gateway takes; try again later",
                headers={"Retry-After": str(self._retry_after())},
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue[turn] = count
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._queue.pop(turn, None)
                self.leave(0)  # one that wants fewer may have stood behind it
            else:
                self.leave(count)  # its turn had come in the moment it left
            raise

    def leave(self, count: int) -> None:
        """Hand slots to those who have waited longest."""
        self.in_flight -= count
        while self._queue:
            turn, wanted = next(iter(self._queue.items()))
            if not turn.done():
                if self.in_flight + wanted > self._max_in_flight:
                    return
                self.in_flight += wanted
                turn.set_result(None)
            del self._queue[turn]

    def _retry_after(self) -> int:
        """Seconds until those who wait now will have been served, at the recent pace."""
        seconds = self._duration * (self.queued + 1) / self._max_in_flight
        return min(max(1, math.ceil(seconds)), _LONGEST)


class Slots:
    """Those of one request. held: how many; given back as fewer choices than that are left."""

    def __init__(self, admission: Admission, choices: int, held: int) -> None:
        self.held = held
        self._admission = admission
        self._left = choices
        self._turns = asyncio.Semaphore(held)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """For one choice, when it is its turn."""
        async with self._turns:
            yield
        self._left -= 1
        if self._left < self.held:
            self.held -= 1
            self._admission.leave(1)
