"""The pool of servers behind the gateway: choice, retries, timeouts, load counters.

Retries happen only while nothing of an answer has been read. Leaving `UpstreamPool.open` closes the
connection unless the answer was read to its end, and that is how a generation is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import tenacity

from espo_gateway.errors import UpstreamUnavailable
from espo_gateway.wire import Limits, Reply, request

log = logging.getLogger(__name__)

#: Statuses after which another try may succeed: overload, or a proxy that has lost its server.
RETRIED = frozenset({429, 502, 503, 504})

DEFAULT_LIMITS = Limits()
_PROBE = aiohttp.ClientTimeout(total=5.0)


class Upstream:
    """One server. in_flight: requests it is working on for this gateway."""

    __slots__ = ("in_flight", "url")

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.in_flight = 0

    def __repr__(self) -> str:
        return f"Upstream({self.url!r}, in_flight={self.in_flight})"


class _TryAgain(Exception):
    """An error status that another try may turn into an answer."""


class UpstreamPool:
    """Servers that are alike, with one client session; an async context manager.

    attempts: how often one request is tried, over all servers. headers: of the pool's own requests;
    may be changed while it runs.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        limits: Limits = DEFAULT_LIMITS,
        attempts: int = 3,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.headers = headers or {}
        self.servers = [Upstream(url) for url in urls]
        self._limits = limits
        self._attempts = attempts
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> UpstreamPool:
        self._session = aiohttp.ClientSession(
            # The servers do their own queueing; a limit here would hide it.
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def open(
        self, method: str, path: str, *, headers: Mapping[str, str], data: bytes | None = None
    ) -> AsyncIterator[Reply]:
        """Send a request to the least loaded server; the answer, of whatever status.

        Raises:
            UpstreamUnavailable: no server could be reached, in all attempts.
            UpstreamTimeout: a server took the request and sent nothing for the idle timeout.
        """
        server, response = await self._send(method, path, headers, data)
        try:
            yield response
        finally:
            # Drops the socket, and the server aborts the request.
            response.close()
            server.in_flight -= 1

    async def _send(
        self, method: str, path: str, headers: Mapping[str, str], data: bytes | None
    ) -> tuple[Upstream, Reply]:
        tried: set[Upstream] = set()
        async for attempt in tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=2.0),
            retry=tenacity.retry_if_exception_type((UpstreamUnavailable, _TryAgain)),
            reraise=True,
        ):
            with attempt:
                server = self._least_loaded(tried)
                tried.add(server)
                last = attempt.retry_state.attempt_number >= self._attempts
                return server, await self._attempt(server, method, path, headers, data, last)
        raise AssertionError("tenacity raises after the last attempt")

    async def _attempt(
        self,
        server: Upstream,
        method: str,
        path: str,
        headers: Mapping[str, str],
        data: bytes | None,
        last: bool,
    ) -> Reply:
        server.in_flight += 1
        try:
            reply = await request(server.url, method, path, headers, data, self._limits)
            if reply.status in RETRIED and not last:
                reply.close()
                log.warning("%s answered %d; trying again", server.url, reply.status)
                raise _TryAgain
            return reply
        except BaseException:
            server.in_flight -= 1
            raise

    def _least_loaded(self, tried: set[Upstream]) -> Upstream:
        fresh = [server for server in self.servers if server not in tried]
        return min(fresh or self.servers, key=lambda server: server.in_flight)

    async def probe(self, server: Upstream) -> bool:
        """Whether the server answers at all, within a few seconds."""
        assert self._session is not None, "enter the pool first"
        try:
            async with self._session.get(
                server.url + "/health", timeout=_PROBE, headers=self.headers
            ) as response:
                return response.status < 500
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def models(self, server: Upstream) -> list[dict[str, Any]] | None:
        """What the server says it serves; None when it does not say."""
        assert self._session is not None, "enter the pool first"
        try:
            async with self._session.get(
                server.url + "/v1/models", timeout=_PROBE, headers=self.headers
            ) as response:
                listed = await response.json(content_type=None)
            return listed["data"] if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError):
            return None

    async def probe_all(self) -> list[bool]:
        """`probe` of every server, at once."""
        return await asyncio.gather(*map(self.probe, self.servers))
