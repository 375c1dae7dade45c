"""The log: lines to read or JSON, the request's id on each, and one line for a finished request.

What a client sent (bodies, keys, query strings) is never logged.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from pythonjsonlogger.json import JsonFormatter

from espo_gateway.stream.session import Session

REQUEST_ID = "X-Request-Id"
_SANE = re.compile(r"[\x21-\x7e]{1,128}")
#: Asked every few seconds, by machines and by the live page.
_QUIET = frozenset({"/health", "/ready", "/metrics", "/espo/live"})

log = logging.getLogger("espo_gateway.access")
#: For aiohttp's server.
http_log = logging.getLogger("espo_gateway.http")


@dataclass
class AccessEntry:
    """What is known of a request under way.

    given: whether the client chose the id. response: once its head has been sent.
    tokens, stopped: of the choices that have ended; the rules that stopped any.
    """

    request_id: str
    given: bool
    started: float = field(default_factory=time.monotonic)
    response: web.StreamResponse | None = None
    tokens: int = 0
    stopped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, request: web.Request) -> AccessEntry:
        """With the client's id where that is fit for a log and a header, else a new one."""
        given = request.headers.get(REQUEST_ID, "")
        if _SANE.fullmatch(given):
            return cls(given, True)
        return cls(uuid.uuid4().hex, False)

    def count(self, session: Session) -> None:
        """Take a choice that has ended."""
        record = session.record
        self.tokens += record.tokens
        if record.stopped:
            self.stopped.append(session.gate.rule)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def write(self, request: web.Request, route: str, status: str) -> None:
        """The line of a request that has ended."""
        # As it was sent, so still encoded: no line break gets into the log.
        path = request.rel_url.raw_path[:200]
        stopped = f", stopped by {', '.join(sorted(set(self.stopped)))}" if self.stopped else ""
        log.log(
            logging.DEBUG if route in _QUIET else logging.INFO,
            "%s %s %s in %.3f s, %d tokens%s",
            *(request.method, path, status, self.seconds, self.tokens, stopped),
            extra={
                "method": request.method,
                "route": route,
                "path": path,
                "status": int(status),
                "seconds": round(self.seconds, 6),
                "tokens": self.tokens,
                "stopped": self.stopped,
            },
        )


#: The request that the running code serves.
current: ContextVar[AccessEntry | None] = ContextVar("current", default=None)


class _WithRequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if (entry := current.get()) is not None:
            record.request_id = entry.request_id
        return True


class _WithoutExcerpt(logging.Filter):
    """What is no HTTP is told in a word: aiohttp would quote it, with the keys in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg, record.args = "refused what is no HTTP request: %s", (type(error).__name__,)
            record.exc_info = record.exc_text = None
        return True


http_log.addFilter(_WithoutExcerpt())


def configure(level: str, style: str) -> None:
    """Send the log to stderr; for the command, not for who embeds a gateway."""
    handler = logging.StreamHandler()
    handler.addFilter(_WithRequestId())
    handler.setFormatter(_json() if style == "json" else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _json() -> logging.Formatter:
    return JsonFormatter(
        ["levelname", "name", "message"],
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
        timestamp="time",
    )


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        request_id: Any = getattr(record, "request_id", None)
        return line if request_id is None else f"{line} [{request_id}]"
