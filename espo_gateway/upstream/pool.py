"""The pool of servers behind the gateway: choice and retries.

Retries happen only while nothing of an answer has been given out. Leaving `UpstreamPool.open`
closes the connection unless the answer was read to its end, and that is how a generation is
cancelled. `Upstream` (server.py) holds what is known of each server.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import aiohttp
import tenacity

from espo_gateway.errors import UpstreamError, UpstreamProtocolError, UpstreamUnavailable
from espo_gateway.upstream.affinity import Affinity, choose
from espo_gateway.upstream.breaker import Breaker
from espo_gateway.upstream.catalogue import Catalogue
from espo_gateway.upstream.connection import Data, Limits, Reply, request
from espo_gateway.upstream.server import (
    Flight,
    Upstream,
    decides,
    health_checks,
    probe,
    served_models,
)

log = logging.getLogger(__name__)

#: Statuses after which another try may succeed: overload, or a proxy that has lost its server.
RETRIED = frozenset({429, 502, 503, 504})
#: Longest Retry-After of a server, in seconds, that is waited for here and not by the client.
LONGEST_WAIT = 5.0

DEFAULT_LIMITS = Limits()
_BROKEN = RETRIED - {429}
_BACKOFF = tenacity.wait_random_exponential(multiplier=0.05, max=2.0)


class _TryAgain(Exception):
    """An error status that another try, after so many seconds, may turn into an answer."""

    def __init__(self, wait: float) -> None:
        self.wait = wait


class UpstreamPool:
    """Servers, alike or each with models of its own; an async context manager.

    Args:
        attempts: how often one request is tried, over all servers.
        health_interval: seconds between two health checks of a server; 0 for none.
        breaker_failures, breaker_timeout: after so many failures in a row a server is left alone
            for so many seconds.
        affinity: for `affinity.affinity_key`; the pool itself only knows keys.
        clock: the breakers', in seconds, monotonic.
        headers: of the pool's own requests; may be changed while it runs.
        asks_who_decides: whether servers are asked if they decide by themselves.
        needs_values: only such that know a critic's V count as deciding.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        limits: Limits = DEFAULT_LIMITS,
        attempts: int = 3,
        health_interval: float = 0.0,
        breaker_failures: int = 5,
        breaker_timeout: float = 10.0,
        affinity: Affinity = "none",
        clock: Callable[[], float] = time.monotonic,
        headers: Mapping[str, str] | None = None,
        asks_who_decides: bool = False,
        needs_values: bool = False,
    ) -> None:
        self._headers = dict(headers or {})
        self.servers = [
            Upstream(url, Breaker(breaker_failures, breaker_timeout, clock)) for url in urls
        ]
        self._catalogue = Catalogue(self.servers, self.models, clock)
        self.affinity = affinity
        self._limits = limits
        self._attempts = attempts
        self._asks_who_decides = asks_who_decides
        self._needs_values = needs_values
        self._health_interval = health_interval
        # By then a server that is back has been noticed.
        self._retry_after = str(max(1, math.ceil(health_interval or breaker_timeout)))
        self._session: aiohttp.ClientSession | None = None
        self._stack = AsyncExitStack()

    @property
    def headers(self) -> Mapping[str, str]:
        """Of the pool's own requests."""
        return self._headers

    @headers.setter
    def headers(self, headers: Mapping[str, str]) -> None:
        self._headers = dict(headers)
        if self._session is not None:
            self._session.headers.clear()
            self._session.headers.update(headers)

    async def __aenter__(self) -> UpstreamPool:
        self._session = aiohttp.ClientSession(
            # The servers do their own queueing; a limit here would hide it.
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
        )
        await self._stack.enter_async_context(self._session)
        await self._stack.enter_async_context(
            health_checks(self._session, self.servers, self._health_interval, self._passed)
        )
        self._stack.callback(self._catalogue.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @asynccontextmanager
    async def open(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        data: Data | None = None,
        key: bytes | None = None,
        model: object = None,
        server: Upstream | None = None,
        whole: bool = False,
    ) -> AsyncIterator[Reply]:
        """Send a request to a server; the answer, of whatever status.

        A timeout, a lost connection or an error status that the block raises counts against the
        server.

        Args:
            key: requests with the same one go to the same server, as far as its load allows.
            model: it goes to a server that has this one, where any says so.
            server: it goes there, and nowhere else.
            whole: its answer is not streamed, so it begins when all of it is there: however late.

        Raises:
            UpstreamUnavailable: no server could be reached, in all attempts.
            UpstreamTimeout: a server took the request, and its answer did not begin in time.
        """
        servers = [server] if server else await self._catalogue.serving(model, headers)
        flight, reply = await self._send(servers, method, path, headers, data, key, whole)
        try:
            yield reply
            if _shows_work(method, reply):
                flight.succeeded()
        except UpstreamError as error:
            # A malformed answer may be the request's fault.
            if error.status >= 500 and not isinstance(error, UpstreamProtocolError):
                flight.failed()
            raise
        finally:
            # Drops the socket, and the server aborts the request.
            reply.close()
            flight.end()

    async def _send(
        self,
        servers: Sequence[Upstream],
        method: str,
        path: str,
        headers: Mapping[str, str],
        data: Data | None,
        key: bytes | None,
        whole: bool,
    ) -> tuple[Flight, Reply]:
        tried: set[Upstream] = set()
        limits = replace(self._limits, first=math.inf) if whole else self._limits

        def wait(state: tenacity.RetryCallState) -> float:
            if _untried(servers, tried):
                return 0.0
            assert state.outcome is not None
            return max(_BACKOFF(state), getattr(state.outcome.exception(), "wait", 0.0))

        async for attempt in tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=wait,
            retry=tenacity.retry_if_exception_type((UpstreamUnavailable, _TryAgain)),
            reraise=True,
        ):
            with attempt:
                server = _choose(servers, tried, key)
                flight = server.start(again=bool(tried))
                tried.add(server)
                try:
                    reply = await request(server.url, method, path, headers, data, limits)
                    # From here to the `yield` of `open` nothing waits: no departure gets between.
                    if reply.status in _BROKEN or (
                        # Of other endpoints it says little: they may have any fault of their own.
                        reply.status == 500 and path.endswith("/completions")
                    ):
                        flight.failed()
                    elif _shows_work(method, reply):
                        flight.answered()
                    if (
                        reply.status in RETRIED
                        and attempt.retry_state.attempt_number < self._attempts
                    ):
                        asked = _retry_after(reply.headers)
                        if asked <= LONGEST_WAIT or _untried(servers, tried):
                            reply.close()
                            log.info("%s answered %d; trying again", server.url, reply.status)
                            raise _TryAgain(min(asked, LONGEST_WAIT))
                    return flight, reply
                except BaseException as error:
                    if isinstance(error, UpstreamError):
                        flight.failed()
                    if isinstance(error, UpstreamUnavailable):
                        error.headers = {**error.headers, "Retry-After": self._retry_after}
                    flight.end()
                    raise
        raise AssertionError("tenacity raises after the last attempt")

    @property
    def urls(self) -> list[str]:
        """The servers' addresses."""
        return [server.url for server in self.servers]

    async def probe(self, server: Upstream) -> bool:
        """Whether the server answers at all, within a few seconds."""
        assert self._session is not None, "enter the pool first"
        return await probe(self._session, server)

    async def models(
        self, server: Upstream, headers: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]] | None:
        """What the server says it serves; None when it does not say.

        headers: a client's; of them only a key matters.
        """
        assert self._session is not None, "enter the pool first"
        key = {n: v for n, v in (headers or {}).items() if n.lower() == "authorization"}
        return await served_models(self._session, server, key)

    @property
    def decides(self) -> bool:
        """Whether every server that a request may go to has said that it decides by itself."""
        available = [server for server in self.servers if server.available]
        return bool(available) and all(server.decides for server in available)

    async def ask_who_decides(self, patience: float) -> None:
        """Ask every server, as long as it may take; what is silent is asked again later."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await asyncio.gather(*map(self._ask_who_decides, self.servers))

    async def _ask_who_decides(self, server: Upstream) -> None:
        assert self._session is not None, "enter the pool first"
        if self._asks_who_decides:
            server.learnt(await decides(self._session, server.url, values=self._needs_values))

    async def _passed(self, server: Upstream) -> None:
        await self._ask_who_decides(server)
        if len(self.servers) > 1:
            await self._catalogue.learn(server, {})

    async def probe_all(self) -> list[bool]:
        """`probe` of every server, at once."""
        return await asyncio.gather(*map(self.probe, self.servers))

    def states(self) -> list[dict[str, Any]]:
        """Every server: url (without a password), healthy, breaker's state, in_flight, retries,
        whether it decides.
        """
        return [
            {
                "url": re.sub(r"//[^/]*@", "//", server.url),
                "healthy": server.healthy,
                "breaker": server.breaker.state,
                "in_flight": server.in_flight,
                "retries": server.retries,
                "decides": server.decides,
            }
            for server in self.servers
        ]


def _untried(servers: Sequence[Upstream], tried: set[Upstream]) -> list[Upstream]:
    """The available servers that are not in `tried`."""
    return [s for s in servers if s.available and s not in tried]


def _choose(servers: Sequence[Upstream], tried: set[Upstream], key: bytes | None) -> Upstream:
    if available := _untried(servers, tried) or _untried(servers, set()):
        return choose(available, key)
    # What is known of servers is always a little old, and one that was restarted a moment ago
    # serves. So when all seem down, the least bad is asked and none is refused unasked.
    return min(servers, key=lambda s: (s in tried, not s.healthy, s.breaker.failures, s.in_flight))


def _shows_work(method: str, response: Reply) -> bool:
    """Whether the server has done what it is there for: it may list its models and yet hang."""
    return method == "POST" and response.status < 400


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, from a number or a date; 0 when there is none that can be read."""
    value = headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
