"""Traces of finished choices, appended to a file as JSON lines: numbers only, never text.

A line has `request` (the id in the X-Request-Id header), `id` (the answer's), `index`, `model`,
`gate_version`, `rule`, `mode`, `prompt` (a hash of it), `prompt_tokens`, `logprobs`, `max_logprobs`
(null where missing), `confidences` (where the rule has them), `end` ("completed", "length",
"early_stop", "aborted") and `cut` (where the rule stopped it, or in shadow mode would have). One of
a session (`sessions.py`) has `session`, `turn` (from 1), `carried` (with --carry-over: tokens of
earlier turns that its monitor went on from) and, with --record-ids, `prompt_token_ids` and
`token_ids`. `calibrate` reads them.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

import msgspec

from espo_gateway.errors import InvalidRequest, said
from espo_gateway.stream.followers import Step
from espo_gateway.stream.session import Session

log = logging.getLogger(__name__)

#: Numbers that may wait for the disk; what is more than that is dropped.
MAX_WAITING = 2**23

Numbers: TypeAlias = "Mapping[str, array[Any]]"


class Columns:
    """The numbers of one choice, which they follow: 8 bytes each, NaN where missing."""

    __slots__ = ("confidences", "logprobs", "max_logprobs", "prompt")

    def __init__(self, body: Mapping[str, Any], *, confidences: bool) -> None:
        """body: of the request, which tells the prompt."""
        self.prompt = _hash(body)
        self.logprobs = array("d")
        self.max_logprobs = array("d")
        self.confidences = array("d") if confidences else None

    def begin(self, prompt_tokens: int) -> None:
        pass

    def push(self, step: Step) -> None:
        self.logprobs.append(math.nan if step.logprob is None else step.logprob)
        self.max_logprobs.append(math.nan if step.max_logprob is None else step.max_logprob)
        if self.confidences is not None:
            self.confidences.append(math.nan if step.confidence is None else step.confidence)

    def first(self, tokens: int | None) -> dict[str, array[float]]:
        """The first that many tokens' by name; None for all."""
        columns = {"logprobs": self.logprobs, "max_logprobs": self.max_logprobs}
        if self.confidences is not None:
            columns["confidences"] = self.confidences
        return {name: numbers[:tokens] for name, numbers in columns.items()}


class Line(NamedTuple):
    """One trace: what is known of the choice, and the numbers of its tokens."""

    about: dict[str, Any]
    columns: Numbers

    @property
    def size(self) -> int:
        """Numbers it has."""
        return sum(map(len, self.columns.values()))


def line_of(session: Session, columns: Columns, request_id: str | None, *, ids: bool) -> Line:
    """The trace of a choice that has ended; of one that was cut, up to there. ids: tells them."""
    record, end = session.record, session.end
    about = {
        "request": request_id,
        "id": session.head.get("id", session.head.get("request_id")),
        "index": session.index,
        "model": session.model,
        "gate_version": record.gate_version,
        "rule": record.rule,
        "mode": record.mode,
        "prompt": columns.prompt,
        "prompt_tokens": session.prompt_tokens,
        "end": end,
        "cut": record.cut,
    }
    tokens = record.cut if end == "early_stop" else None
    numbers: dict[str, array[Any]] = {**columns.first(tokens)}
    if ids:
        numbers["prompt_token_ids"] = _ids(session.prompt_token_ids)
        numbers["token_ids"] = _ids(session.token_ids[:tokens])
    return Line(about, numbers)


def _hash(body: Mapping[str, Any]) -> str:
    """The same for requests that ask the same, however they are to be sampled."""
    asked = [body.get(name) for name in ("messages", "tools", "prompt", "token_ids")]
    return blake2b(repr(asked).encode(errors="replace"), digest_size=8).hexdigest()


def _ids(told: list[int]) -> array[int]:
    try:
        return array("q", told)
    except (TypeError, OverflowError):
        return array("q")  # whatever a server sends


class Recorder:
    """Appends traces by a thread of its own. Raises InvalidRequest when the file cannot be opened.

    written: traces so far. problem: why it records no more, or None.
    """

    def __init__(self, path: Path, megabytes: float) -> None:
        self.path = path
        self.written = 0
        self.problem: str | None = None
        self._limit = megabytes * 1e6
        self._lock = Lock()
        self._waiting = 0
        self._dropped = 0
        if (why := _foreign(path)) is not None:
            raise InvalidRequest(
                f"record: {path} is there and holds no traces ({why}); choose another file",
                param="record",
            )
        try:
            # Unbuffered: a line is one write, whole in the file or the error known.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise InvalidRequest(
                f"record: cannot append to {path}: {error.strerror}", param="record"
            ) from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="espo-record")

    def write(self, about: dict[str, Any], columns: Numbers) -> None:
        """Append a trace soon, unless recording has ended."""
        if self.problem is not None:
            return
        size = sum(map(len, columns.values()))
        if self._waiting + size > MAX_WAITING:
            if not self._dropped:
                log.warning("record: %s is too slow, traces are dropped", self.path)
            self._dropped += 1
            return
        with self._lock:
            self._waiting += size
        self._writer.submit(self._append, about, columns, size)

    def close(self) -> None:
        """Write what waits, and close the file."""
        self._writer.shutdown(wait=True)
        self._file.close()
        if self._dropped:
            log.warning("record: %d traces were dropped", self._dropped)

    def report(self) -> dict[str, object]:
        """Where it stands, for people."""
        return {
            "file": str(self.path),
            "written": self.written,
            "dropped": self._dropped,
            "problem": self.problem,
        }

    def _append(self, about: dict[str, Any], columns: Numbers, size: int) -> None:
        try:
            if self.problem is None:
                # msgspec writes NaN and infinities as null.
                numbers = {name: column.tolist() for name, column in columns.items()}
                self._write(msgspec.json.encode({**about, **numbers}) + b"\n")
        except Exception as error:
            self.problem = f"cannot write: {said(error)}"
            log.error("record: %s: %s; recording no more", self.path, self.problem)
        finally:
            with self._lock:
                self._waiting -= size

    def _write(self, line: bytes) -> None:
        start = self._file.seek(0, 2)
        if start + len(line) > self._limit:
            self.problem = f"the file is at its limit of {self._limit / 1e6:g} MB"
            log.warning("record: %s: %s; recording no more", self.path, self.problem)
            return
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk is full")
        except OSError:
            with suppress(OSError):
                self._file.truncate(start)  # half a line would spoil the file
            raise
        self.written += 1


def _foreign(path: Path) -> str | None:
    """Why a file is none that traces may be appended to; None where it is one, or is not there."""
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            first = file.readline()
        if not first or "logprobs" in msgspec.json.decode(first, type=dict[str, Any]):
            return None
        return "its first line has no logprobs"
    except OSError:
        return None  # said when it is opened
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return f"its first line is no JSON object: {error}"
