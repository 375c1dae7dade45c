"""Headers as they are handed on: the client's to a server, and a server's to the client.

What belongs to one connection stays on it. A server's redirects lead to the gateway, and what it
lets pages of other origins read, they may read of the gateway's own answers too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from urllib.parse import urljoin, urlsplit

from aiohttp import web
from multidict import CIMultiDict, MultiMapping

from espo_gateway.config import MONITORED
from espo_gateway.errors import GatewayError, said
from espo_gateway.front.auth import Keys
from espo_gateway.stream.request import Body
from espo_gateway.telemetry.logs import REQUEST_ID, current
from espo_gateway.upstream.pool import UpstreamPool

log = logging.getLogger(__name__)

#: What the server that was asked has told in its head; none of it replaces the gateway's own words.
ANSWERED = web.RequestKey("answered", CIMultiDict)

#: Headers that belong to one connection (RFC 9110, 7.6.1), not to the message.
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
#: Written anew for the upstream, or said by nobody: a client must not pass itself off as a proxy.
_NOT_FORWARDED = _HOP_BY_HOP | {
    "accept-encoding",
    "content-encoding",  # the body has been decoded
    "content-length",
    "expect",
    "forwarded",
    "host",
    "x-real-ip",
    "x-request-id",
}
#: Of the bytes of an answer, or of who wrote them; not of an answer that is written anew.
_OF_THE_BODY = frozenset({"accept-ranges", "date", "digest", "etag", "last-modified", "server"})
#: Those that lead somewhere.
_LEADING = frozenset({"location", "content-location"})

#: What a page must be told to read an answer; the first says that it may.
_CROSS_ORIGIN = (
    *("Access-Control-Allow-Origin", "Access-Control-Allow-Credentials"),
    *("Access-Control-Expose-Headers", "Vary"),
)
#: Seconds for asking a server what it lets other origins read, and for believing it.
_PATIENCE, _BELIEVED = 2.0, 60.0
#: Origins remembered.
_MOST = 256


def forwarded_headers(keys: Keys, request: web.Request, *, json: bool = False) -> CIMultiDict[str]:
    """The client's headers for the upstream; `json` when the gateway writes the body anew."""
    skipped = _NOT_FORWARDED | _connection_headers(request.headers)
    if json:
        skipped |= {"content-type"}
    if not keys.pass_clients:
        skipped |= {"authorization"}
    headers = CIMultiDict(
        (name, value)
        for name, value in request.headers.items()
        if name.lower() not in skipped and not name.lower().startswith(("x-forwarded-", "x-espo-"))
    )
    headers.update(keys.upstream_headers)
    headers["Accept-Encoding"] = "identity"
    if json:
        headers["Content-Type"] = "application/json"
    if (entry := current.get()) is not None:
        headers[REQUEST_ID] = entry.request_id
    return headers


def generation_headers(
    headers: CIMultiDict[str], body: Body, index: int | None = None
) -> CIMultiDict[str]:
    """Of one upstream request for a generation; with the choice's index where there are several.

    A `request_id` of the body stays the server's name for it: vLLM would prefer the header.
    """
    entry = current.get()
    if entry is None:
        return headers
    headers = headers.copy()
    if not entry.given and body.get("request_id") is not None:
        del headers[REQUEST_ID]
    elif index is not None:
        headers[REQUEST_ID] = f"{entry.request_id}-{index}"
    return headers


def answered_headers(
    headers: MultiMapping[str], servers: Iterable[str], *, anew: bool
) -> CIMultiDict[str]:
    """A server's headers for the client; `anew` when the gateway writes the body.

    servers: the addresses of all of them, to which no client is led.
    """
    skipped = _HOP_BY_HOP | _connection_headers(headers)
    if anew:
        skipped |= _OF_THE_BODY
    found: CIMultiDict[str] = CIMultiDict()
    for name, value in headers.items():
        lower = name.lower()
        if lower in _LEADING:
            value = _led_here(value, servers)
        if lower not in skipped and not (anew and lower.startswith("content-")):
            found.add(name, value)
    return found


def _led_here(location: str, servers: Iterable[str]) -> str:
    """An address at a server, or one under /v1/ anywhere, as a path of the gateway."""
    location = location.strip().replace("\\", "/")
    try:
        address = urlsplit(location)
    except ValueError:
        return "/"  # nobody could follow it
    if not (address.scheme or address.netloc or location.startswith("/")):
        return location  # relative to what the client has asked for
    bases = {urlsplit(url).hostname: urlsplit(url).path for url in servers}
    path = address.path or "/"
    # A server may know itself by another name than the gateway knows it by.
    if address.netloc and address.hostname not in bases and not path.startswith("/v1/"):
        return location
    for base in [bases.get(address.hostname, ""), *bases.values()]:
        if base and path.startswith(base + "/"):
            path = path.removeprefix(base)
            break
    query = f"?{address.query}" if address.query else ""
    return "/" + path.lstrip("/") + query


def leads_back(headers: MultiMapping[str], request: web.Request) -> bool:
    """Whether an answer to the client would send it to where it has asked already."""
    target = request.rel_url.raw_path_qs
    location = headers.get("Location")
    return location is not None and urljoin(target, location) == target


def _connection_headers(headers: MultiMapping[str]) -> frozenset[str]:
    """Those that the sender names as meant for this connection only."""
    named = ",".join(headers.getall("Connection", []))
    return frozenset(name.strip().lower() for name in named.split(","))


class CrossOrigin:
    """What pages of other origins may read of the servers' answers (CORS), asked of the servers.

    For answers that no server has had a part in, as a wrong key or a full queue: a browser shows
    its page none of them unless it is told that it may.
    """

    def __init__(self, pool: UpstreamPool) -> None:
        self._pool = pool
        self._known: dict[str, tuple[float, CIMultiDict[str]]] = {}

    async def headers(self, keys: Keys, request: web.Request) -> CIMultiDict[str]:
        """For an answer to this request, which has an Origin; none where no server says any."""
        origin = request.headers["Origin"]
        asked, known = self._known.get(origin, (float("-inf"), CIMultiDict[str]()))
        if time.monotonic() - asked < _BELIEVED:
            return known
        headers = CIMultiDict(keys.upstream_headers)
        headers["Origin"] = origin
        headers["Access-Control-Request-Method"] = request.method
        path = request.path if request.path in MONITORED else "/v1/models"
        try:
            async with (
                asyncio.timeout(_PATIENCE),
                self._pool.open("OPTIONS", path, headers=headers) as reply,
            ):
                self.learn(origin, reply.headers)
        except (GatewayError, TimeoutError) as error:
            log.debug("cross-origin headers for %s: %s", origin, said(error))
            return known
        return self._known[origin][1]

    def learn(self, origin: str, headers: MultiMapping[str]) -> None:
        """Take what a server has told this origin."""
        found: CIMultiDict[str] = CIMultiDict()
        if _CROSS_ORIGIN[0] in headers:
            for name in _CROSS_ORIGIN:
                for value in headers.getall(name, []):
                    found.add(name, value)
        self._known.pop(origin, None)
        while len(self._known) >= _MOST:
            del self._known[next(iter(self._known))]
        self._known[origin] = time.monotonic(), found
