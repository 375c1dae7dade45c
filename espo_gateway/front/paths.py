"""Which paths are passed on, and which of them generate, whatever way they are spelt. Pure.

A server decodes a path, and a proxy before it may tidy it up; so what a request is, is decided on
the decoded and tidied path, and not on its spelling.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from aiohttp import web

from espo_gateway.config import TOKENS
from espo_gateway.errors import InvalidRequest

_CONTROL = frozenset(map(chr, [*range(0x20), 0x7F]))

#: The route that ends requests of vLLM's for trainers.
ABORT = "/inference/v1/abort_requests"
_OF_TRAINERS = [path.split("/")[1:] for path in (TOKENS, ABORT)]
#: What the servers answer, and not the gateway itself.
_SERVED = ("/v1/", "/inference/v1/")
#: Routes, of vLLM and of others that speak OpenAI's or Anthropic's words, that sample tokens as
#: well; a new one belongs here until it has a monitor.
_GENERATING = re.compile(
    r"/v1/(?:responses|messages|messages/batches|complete|generate|infill|batches"
    r"|(?:.+/)?completions|(?:.+/)?completions/batch"
    r"|audio/transcriptions|audio/translations|threads/runs|threads/[^/]+/runs)|" + TOKENS
)


def upstream_path(request: web.Request) -> str:
    """Path and query for the upstream, as the client wrote them.

    Raises InvalidRequest for a path that some server could read as one outside /v1/ (and what it
    has for trainers), where vLLM's own administration is.
    """
    decoded = _decoded(request)
    segments = _segments(decoded)
    inner = segments[1:-1] if segments[-1] == "" else segments[1:]
    plain = {"", ".", ".."}.isdisjoint(inner) and _CONTROL.isdisjoint(decoded)
    if segments[0] or not plain or not (inner[:1] == ["v1"] or inner in _OF_TRAINERS):
        raise InvalidRequest("the path must be a plain one under /v1/")
    return request.rel_url.raw_path_qs


def served(path: str) -> bool:
    """Whether a decoded path, or a route, is the servers' to answer."""
    return path.startswith(_SERVED)


def generating_path(request: web.Request) -> str | None:
    """The path of a route that generates, in its usual spelling; None for any other request."""
    if request.method != "POST":
        return None
    decoded = re.split("[?#]", _decoded(request))[0]
    segments = [part.strip().lower() for part in _segments(decoded)]
    path = "/" + "/".join(filter(None, segments))
    return path if _GENERATING.fullmatch(path) else None


def _decoded(request: web.Request) -> str:
    decoded = request.rel_url.raw_path
    for _ in range(3):  # as often as a chain of servers could
        decoded = unquote(decoded)
    return decoded


def _segments(decoded: str) -> list[str]:
    # Some servers take a backslash for a slash, and ignore what follows a semicolon.
    return [part.partition(";")[0] for part in decoded.replace("\\", "/").split("/")]
