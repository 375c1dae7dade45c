"""One server behind the gateway, as the pool knows it: its load, its health, its counters.

Also the questions a server is asked about itself, and the task that keeps asking.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from espo_gateway.upstream.breaker import Breaker, BreakerState
from espo_gateway.vllm_plugin.wire import ROUTE

log = logging.getLogger(__name__)

_PROBE = aiohttp.ClientTimeout(total=5.0)


def base_url(url: str) -> str:
    """A server's address, whether or not it was given with the /v1 of OpenAI's clients."""
    return url.rstrip("/").removesuffix("/v1")


class Upstream:
    """One server. All attributes are to be read by anyone, and written by the pool alone.

    url: without /v1. in_flight: requests it is working on for this gateway.
    healthy: whether it passed its last health check; true before the first.
    decides: whether it has said that it decides by itself where a request ends.
    models: what it has said it serves; None before it has said anything.
    breaker.state: "closed", "open" (left alone after failures) or "half-open" (may be tried).
    requests: tries sent to it. retries: those of them that came after another try.
    failures: those that failed (no connection, reset, timeout, or a status of a broken server).
    """

    __slots__ = (
        *("breaker", "decides", "failures", "healthy", "in_flight", "models"),
        *("requests", "retries", "url"),
    )

    def __init__(self, url: str, breaker: Breaker) -> None:
        self.url = base_url(url)
        self.breaker = breaker
        self.healthy = True
        self.decides = False
        self.models: frozenset[str] | None = None
        self.in_flight = self.requests = self.failures = self.retries = 0

    def __repr__(self) -> str:
        return f"Upstream({self.url!r}, in_flight={self.in_flight})"

    @property
    def available(self) -> bool:
        """Whether it is to be chosen, as long as any server is."""
        return self.healthy and self.breaker.ready

    def start(self, *, again: bool) -> Flight:
        """A request is about to be sent to it; again: another try came before."""
        self.in_flight += 1
        self.requests += 1
        self.retries += again
        return Flight(self)

    def checked(self, passed: bool) -> None:
        """Take the outcome of a health check."""
        if passed:
            self.breaker.lives()
        else:
            self.decides = False  # it may come back as another
        if passed != self.healthy:
            self.healthy = passed
            if passed:
                log.info("%s passes its health check again", self.url)
            else:
                log.warning(
                    "%s fails its health check; it gets no requests until it passes one", self.url
                )

    def learnt(self, decides: bool) -> None:
        """Take what it says of itself."""
        if decides != self.decides:
            self.decides = decides
            log.info("%s %s by itself", self.url, "decides" if decides else "no longer decides")


class Flight:
    """One request at one server: its outcome, told to the counters and the breaker once."""

    __slots__ = ("_failed", "_server", "_trial")

    def __init__(self, server: Upstream) -> None:
        self._server = server
        self._trial = server.breaker.start()
        self._failed = False

    def answered(self) -> None:
        """The answer has begun, and well."""
        before = self._server.breaker.state
        self._server.breaker.answered(self._trial)
        self._log(before)

    def succeeded(self) -> None:
        """The answer was had to its end, or as far as it was wanted."""
        before = self._server.breaker.state
        self._server.breaker.succeeded()
        self._log(before)

    def failed(self) -> None:
        """The server is at fault."""
        if self._failed:
            return
        self._failed = True
        self._server.failures += 1
        before = self._server.breaker.state
        self._server.breaker.failed(self._trial)
        self._log(before)

    def end(self) -> None:
        """It is over, in whatever way."""
        self._server.in_flight -= 1
        self._server.breaker.left(self._trial)

    def _log(self, before: BreakerState) -> None:
        breaker, url = self._server.breaker, self._server.url
        if breaker.state == before:
            return
        if breaker.state == "open":
            log.warning("%s failed %d times in a row; left alone for now", url, breaker.failures)
        else:
            log.info("%s serves again", url)


async def probe(session: aiohttp.ClientSession, server: Upstream) -> bool:
    """Whether the server answers at all, within a few seconds."""
    try:
        async with session.get(server.url + "/health", timeout=_PROBE) as response:
            return response.status < 500
    except (aiohttp.ClientError, OSError, ValueError):  # TimeoutError is an OSError
        return False


async def decides(
    session: aiohttp.ClientSession,
    url: str,
    headers: Mapping[str, str] | None = None,
    *,
    values: bool,
) -> bool:
    """Whether the server says that it decides by itself where a request ends.

    headers: beside the session's. values: and that it knows a critic's V.
    """
    try:
        async with session.get(url + ROUTE, timeout=_PROBE, headers=headers) as response:
            told = await response.json(content_type=None)
        needed = ("decides", "values") if values else ("decides",)
        return response.status == 200 and all(told[name] is True for name in needed)
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


async def served_models(
    session: aiohttp.ClientSession, server: Upstream, headers: Mapping[str, str] | None = None
) -> list[dict[str, Any]] | None:
    """What the server says it serves; None when it does not say. headers: beside the session's."""
    try:
        url = server.url + "/v1/models"
        async with session.get(url, timeout=_PROBE, headers=headers) as response:
            listed = await response.json(content_type=None)
        models = listed["data"] if response.status == 200 else None
        return None if models is None else [m for m in models if isinstance(m["id"], str)]
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


@asynccontextmanager
async def health_checks(
    session: aiohttp.ClientSession,
    servers: Iterable[Upstream],
    interval: float,
    passed: Callable[[Upstream], Awaitable[None]],
) -> AsyncIterator[None]:
    """Check every server every `interval` seconds, from now until the block is left; 0: never.

    passed: what more is to be known of a server that answers.
    """

    async def watch(server: Upstream) -> None:
        while True:
            server.checked(await probe(session, server))
            if server.healthy:
                await passed(server)
            await asyncio.sleep(interval)

    # A task each: a server that hangs must not hold up the checks of the others.
    tasks = [asyncio.create_task(watch(server)) for server in servers] if interval else []
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
