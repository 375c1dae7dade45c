"""Which rollout is asked for next, and which step trains on it: the order of a run. Pure.

A step trains on the prompts that were drawn for it, all n rollouts of each, in the order of
drawing; it is done when they are. What else the engine has room for are prompts of the steps after
it: `ahead` of them are drawn, and asked for as slots come free, the oldest step's first. So no slot
waits for the longest rollout of a step, and yet which rollouts a step gets is decided before any of
them has a length: none is dropped, put off or preferred for it, and the first steps of a run are
like all others. (Taking whatever is finished first would save a little more time, when one rollout
takes longer than all of the next `ahead` steps; but its first steps are of short rollouts, and at
every moment the long ones are the stale ones.)

A rollout goes on when the weights change. As a step is drawn when the step `ahead` before it has
been trained on, none of its tokens is older than `ahead` updates when it is its turn: the bound on
staleness holds by the order alone. With ahead = 0 nothing is under way when weights change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator

from espo_rl.rollouts.batch import Batch
from espo_rl.types import Request


class BatchQueue:
    """The batches of the steps to come, the next step's first.

    ahead: how many beside that. draw: makes the batch of a step, counted from 1.
    """

    def __init__(
        self, ahead: int, draw: Callable[[int], Batch], batches: Iterable[Batch] = ()
    ) -> None:
        self.ahead = ahead
        self.batches = deque(batches)
        self._draw = draw

    def next(self, done: int, last: int) -> Batch:
        """The next step's batch, when `done` steps have been trained on; draws those `ahead`, up to
        the last step's."""
        for step in range(done + len(self.batches) + 1, min(done + self.ahead + 1, last) + 1):
            self.batches.append(self._draw(step))
        return self.batches[0]

    def wanted(self, under_way: Container[int]) -> Iterator[tuple[Batch, Request]]:
        """What is still to be asked, in order; without the seeds under way."""
        for batch in self.batches:
            for seed, request in batch.waiting.items():
                if seed not in under_way:
                    yield batch, request

    def recall_failed(self) -> None:
        """Want the errors again as they were: the server was at fault, not the requests."""
        for batch in self.batches:
            batch.recall_failed()
