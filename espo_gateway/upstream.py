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
from yarl import URL

from espo_gateway.errors import UpstreamError, UpstreamTimeout, UpstreamUnavailable, said

log = logging.getLogger(__name__)

#: Statuses after which another try may succeed: overload, or a proxy that has lost its server.
RETRIED = frozenset({429, 502, 503, 504})

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

    connect_timeout, idle_timeout: seconds; the latter between any two reads, so before the first
    token too. attempts: how often one request is tried, over all servers. headers: of the pool's
    own requests; may be changed while it runs.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        connect_timeout: float = 5.0,
        idle_timeout: float = 600.0,
        attempts: int = 3,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.headers = headers or {}
        self.servers = [Upstream(url) for url in urls]
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=connect_timeout, sock_read=idle_timeout
        )
        self._attempts = attempts
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> UpstreamPool:
        self._session = aiohttp.ClientSession(
            # The servers do their own queueing; a limit here would hide it.
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._timeout,
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def open(
        self, method: str, path: str, *, headers: Mapping[str, str], data: bytes | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request to the least loaded server; the answer, of whatever status.

        Raises:
            UpstreamUnavailable: no server could be reached, in all attempts.
            UpstreamTimeout: a server took the request and sent nothing for the idle timeout.
        """
        server, response = await self._send(method, path, headers, data)
        try:
            yield response
        finally:
            # close, not release: it drops the socket, and the server aborts the request.
            response.close()
            server.in_flight -= 1

    async def _send(
        self, method: str, path: str, headers: Mapping[str, str], data: bytes | None
    ) -> tuple[Upstream, aiohttp.ClientResponse]:
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
    ) -> aiohttp.ClientResponse:
        assert self._session is not None, "enter the pool first"
        server.in_flight += 1
        try:
            response = await self._session.request(
                method,
                # As it is: another way to write a path could be another path.
                URL(server.url + path, encoded=True),
                headers=headers,
                data=data,
                allow_redirects=False,
            )
            if response.status in RETRIED and not last:
                response.close()
                log.warning("%s answered %d; trying again", server.url, response.status)
                raise _TryAgain
            return response
        except BaseException as error:
            server.in_flight -= 1
            if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ServerDisconnectedError):
                raise UpstreamUnavailable(f"{server.url}: {said(error)}") from error
            if isinstance(error, TimeoutError):
                if isinstance(error, aiohttp.ConnectionTimeoutError):
                    raise UpstreamUnavailable(f"{server.url}: no connection in time") from error
                raise UpstreamTimeout(f"{server.url} sent nothing for too long") from error
            if isinstance(error, aiohttp.ClientOSError):
                raise UpstreamUnavailable(f"{server.url}: {said(error)}") from error
            if isinstance(error, aiohttp.ClientError):
                raise UpstreamError(f"{server.url}: {said(error)}") from error
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
