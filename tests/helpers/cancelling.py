"""Cancels a coroutine at a chosen point, so that a test can do it at every one."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any


@types.coroutine
def _cancelled_at(work: Coroutine[Any, Any, object], point: int) -> Generator[Any, Any, bool]:
    """Whether the work still waited when it waited for the point-th time (from 0)."""
    step: Callable[[Any], Any] = work.send
    argument: Any = None
    while True:
        try:
            future = step(argument)
        except StopIteration:
            return False
        except asyncio.CancelledError:
            return True
        if point == 0:
            if future is not None:
                future.cancel()
            yield None  # its callbacks come first, as when a task is cancelled
            step, argument = work.throw, asyncio.CancelledError()
        else:
            try:
                step, argument = work.send, (yield future)
            except BaseException as error:
                step, argument = work.throw, error
        point -= 1


async def cancel_everywhere(
    work: Callable[[], Coroutine[Any, Any, object]], check: Callable[[], Awaitable[None]]
) -> int:
    """Run `work` again and again, cancelled at its first wait, its second, and so on, `check` after
    each; until it waits no more before its end. How many points there were.
    """
    point = 0
    while await _cancelled_at(work(), point):
        await check()
        point += 1
    await check()
    return point
