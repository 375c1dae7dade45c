"""The rollouts under way: as many as the engine likes, whatever the run does meanwhile.

Owns the tasks. They put their rollouts into their batches as they come, and outlive whoever waits
for them; which comes next is the queue's to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Self

from espo_rl.rollouts.batch import Batch
from espo_rl.rollouts.queue import BatchQueue
from espo_rl.types import EndReason, Request, Rollout


class InFlight:
    """An async context manager, which gives up what is under way at its end.

    Args:
        ask: for a rollout; one that failed is a rollout, too.
        most: under way at a time.

    changed: set whenever a rollout has come. failed: the last one that did not.
    """

    def __init__(
        self, queue: BatchQueue, ask: Callable[[Request], Awaitable[Rollout]], most: int
    ) -> None:
        self.changed = asyncio.Event()
        self.failed: Rollout | None = None
        self._queue, self._ask, self._most = queue, ask, most
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by seed
        self._fault: BaseException | None = None
        self._filled = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.recall()

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Begin the next as soon as there is room. After it what is under way goes on, but nothing
        new begins."""
        self._filled = True
        self._fill()
        try:
            yield
        finally:
            self._filled = False

    async def until_changed(self) -> None:
        """Wait for the next rollout; raises what asking for one has raised."""
        await self.changed.wait()
        self.changed.clear()
        if self._fault is not None:
            raise self._fault

    async def recall(self) -> None:
        """Give up what is under way, and forget what failed: all of it is wanted again."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()
        self.failed = None
        self._queue.recall_failed()

    def _fill(self) -> None:
        room = self._most - len(self._tasks)
        if not self._filled or room <= 0:
            return
        for batch, request in self._queue.wanted(self._tasks):
            self._tasks[request.seed] = asyncio.create_task(self._one(batch, request))
            room -= 1
            if not room:
                return

    async def _one(self, batch: Batch, request: Request) -> None:
        try:
            rollout = await self._ask(request)
            batch.put(rollout)
            if rollout.end is EndReason.ERROR:
                self.failed = rollout
        except Exception as error:
            self._fault = error
        del self._tasks[request.seed]
        self.changed.set()
        self._fill()
