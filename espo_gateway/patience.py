"""How long an answer may take: until its first bytes, between any two reads, and altogether."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import aiohttp


@dataclass(frozen=True)
class Limits:
    """In seconds. total: 0 for none."""

    first: float = 600.0
    idle: float = 600.0
    total: float = 0.0


class Patience:
    """Closes an answer that takes too long, which ends whoever reads it; a context manager.

    One timer a stream, however many reads: a timer for each would cost as much as parsing it.

    expired: what took too long, in words; None while nothing has.
    """

    def __init__(self, response: aiohttp.ClientResponse, limits: Limits) -> None:
        self.expired: str | None = None
        self._response = response
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._begun = self._last = self._loop.time()
        self._heard = False
        self._timer: asyncio.TimerHandle | None = None

    def heard(self) -> None:
        """Note that something has arrived."""
        self._heard = True
        self._last = self._loop.time()

    def __enter__(self) -> Self:
        self._look()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        limits = self._limits
        if self._heard:
            silence, problem = limits.idle, f"sent nothing for {limits.idle:g} s"
        else:
            silence, problem = limits.first, f"sent no first token within {limits.first:g} s"
        due = self._last + silence
        if limits.total and self._begun + limits.total < due:
            due, problem = self._begun + limits.total, f"took more than {limits.total:g} s"
        if self._loop.time() < due:
            self._timer = self._loop.call_at(due, self._look)
            return
        self.expired = problem
        self._response.close()
