"""Rollouts come for as long as something takes: a batch's last one, the grading, an update.

The servers have each batch's gate and the current weights before anything is asked. Those that fall
meanwhile are brought back with both, and what was under way is asked again.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import Any

from espo_rl.rollouts.in_flight import InFlight
from espo_rl.rollouts.queue import BatchQueue
from espo_rl.servers.fleet import Fleet
from espo_rl.servers.served_models import ServedModels


class Sampler:
    """What keeps the servers busy with what a queue wants."""

    def __init__(
        self, queue: BatchQueue, flight: InFlight, fleet: Fleet, served: ServedModels
    ) -> None:
        self._queue, self._flight, self._fleet, self._served = queue, flight, fleet, served

    async def until(
        self,
        over: Callable[[], bool],
        clock: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Let rollouts come until it is over, which is asked after each.

        Args:
            clock: runs while they do, and not while a server is brought back.

        Raises:
            ServerError, WeightSyncError: a server cannot be brought back, or refuses the weights.
        """
        while not over():
            await self._served.attempt(self._push_gates)
            with clock():
                trouble = await self._trouble(over)
            if trouble is not None:
                await self._flight.recall()
                waiting = sum(len(batch.waiting) for batch in self._queue.batches)
                await self._served.heal(f"{trouble}\n{waiting} rollouts are asked again")

    @asynccontextmanager
    async def meanwhile(self) -> AsyncIterator[None]:
        """Let them come while the block runs, if any are wanted by now."""
        if not any(self._queue.wanted(())):
            yield
            return
        over = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.until(over.is_set))
                yield
                over.set()
                self._flight.changed.set()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _trouble(self, over: Callable[[], bool]) -> str | None:
        """Keep the servers busy until it is over, or one falls: then what happened to it."""
        fallen = asyncio.ensure_future(self._fleet.failure())
        waits: set[asyncio.Future[Any]] = {fallen}
        try:
            with self._flight.filled():
                while not over():
                    changed = asyncio.ensure_future(self._flight.until_changed())
                    waits = {fallen, changed}
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    if fallen.done():
                        return fallen.result()
                    changed.result()
                    failed, self._flight.failed = self._flight.failed, None
                    if failed is not None and await self._fleet.down():
                        return failed.error
                return None
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _push_gates(self) -> None:
        """The next step's first: what names none has the newest."""
        await self._served.catch_up()
        for batch in self._queue.batches:
            batch.gate = dataclasses.replace(batch.gate, weights_version=self._served.version)
            await self._fleet.push_gate(batch.gate)
