"""When a server that keeps failing is left alone, and when it is tried again. Pure.

No library: those there are (aiobreaker, purgatory) wrap a call that ends when it returns. Here the
call is an answer that stays open for minutes, and a health check has a say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

BreakerState = Literal["closed", "open", "half-open"]


class Breaker:
    """Opens after `limit` failures in a row; after `timeout` seconds lets one request try.

        trial = breaker.start()     # of the request: whether everything hangs on it
        breaker.answered(trial)     # its answer has begun well
        breaker.succeeded()         # ... and has ended well
        breaker.failed(trial)       # or: it failed
        breaker.left(trial)         # last, always: nothing hangs on it any more

    failures: how many there were in a row. clock: seconds, monotonic.
    """

    __slots__ = ("_clock", "_limit", "_retry_at", "_timeout", "_trial", "failures")

    def __init__(self, limit: int, timeout: float, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._timeout = timeout
        self._clock = clock
        self.failures = 0
        self._retry_at: float | None = None  # None: closed
        self._trial: object | None = None

    @property
    def state(self) -> BreakerState:
        if self._retry_at is None:
            return "closed"
        return "open" if self._clock() < self._retry_at else "half-open"

    @property
    def ready(self) -> bool:
        """Whether a request may be sent."""
        state = self.state
        return state == "closed" or (state == "half-open" and self._trial is None)

    def start(self) -> object | None:
        """A request is sent, ready or not; what its outcome must be told with."""
        if self.state != "half-open" or self._trial is not None:
            return None
        self._trial = object()
        return self._trial

    def answered(self, trial: object | None) -> None:
        """The trial's answer has begun, which may take minutes to end: others may come."""
        if self._is(trial):
            # On probation: a server that hangs may well send headers.
            self._retry_at, self.failures = None, self._limit - 1
            self._trial = None

    def succeeded(self) -> None:
        """An answer has come whole; in whatever state, that closes."""
        self._retry_at, self._trial, self.failures = None, None, 0

    def failed(self, trial: object | None) -> None:
        """One more failure. Those of requests from before it opened do not hold off a trial."""
        self.failures += 1
        if self.failures >= self._limit if self._retry_at is None else self._is(trial):
            self._retry_at = self._clock() + self._timeout

    def left(self, trial: object | None) -> None:
        """The request is over, also one that told nothing, as its client left: another may try."""
        if self._is(trial):
            self._trial = None

    def lives(self) -> None:
        """The server passed a health check: a better reason for a trial than the clock."""
        if self._retry_at is not None:
            self._retry_at = min(self._retry_at, self._clock())

    def _is(self, trial: object | None) -> bool:
        return trial is not None and trial is self._trial
