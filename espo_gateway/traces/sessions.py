"""What is kept of sessions (the header X-Session-ID) from one of their requests to the next.

A session's requests are its turns. Their traces wait here until the session is over, so that they
stand together in the file, in order; and where that is wanted, a turn's monitor goes on where the
last one's ended. A session is over once it has been idle for so long; when there are too many, or
they hold too much, the one that was used least recently is over before its time, those with a turn
under way last. A later request begins it anew.
"""

from __future__ import annotations

import asyncio
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b

from espo_gateway.stop.watch import Earlier
from espo_gateway.stream.session import Session
from espo_gateway.traces.recorder import Columns, Line, Recorder

#: Sessions at a time, and numbers that all of them may hold.
MAX_SESSIONS, MAX_NUMBERS = 4096, 2**22

_SANE = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(eq=False)
class Kept:
    """One session. over: nobody looks for it any more.

    turns: the number of its last turn, and sampled: of its last one that got a token. running:
    turns under way. expiry: ends it, unless a turn begins before.
    """

    name: str
    turns: int = 0
    sampled: int = 0
    running: int = 0
    waiting: list[tuple[int, int, Line]] = field(default_factory=list)
    earlier: Earlier | None = None
    expiry: asyncio.TimerHandle | None = None
    over: bool = False

    @property
    def numbers(self) -> int:
        earlier = 0 if self.earlier is None else len(self.earlier.logprobs)
        return 3 * earlier + sum(line.size for _, _, line in self.waiting)


@dataclass(frozen=True)
class Turn:
    """One request of a session, the `number`th. earlier: what its monitor goes on from.

    alone: whether it has one choice, and no other turn was under way when it began.
    """

    of: Kept
    number: int
    alone: bool
    earlier: Earlier | None


class Sessions:
    """The sessions that are not over.

    Args:
        recorder: where their traces go.
        idle: seconds without a request after which a session is over.
        carried: whether a monitor goes on from turn to turn.
    """

    def __init__(self, recorder: Recorder | None, *, idle: float, carried: bool) -> None:
        self._recorder = recorder
        self._idle_seconds = idle
        self._carried = carried
        #: by name, those used least recently first
        self._running: dict[str, Kept] = {}
        self._idle: dict[str, Kept] = {}
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._running) + len(self._idle)

    @contextmanager
    def turn(self, session_id: str, choices: int) -> Iterator[Turn]:
        """A request of a session, from its beginning to its end; it has so many choices."""
        name = session_id
        if not _SANE.fullmatch(name):
            name = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        kept = self._running.pop(name, None) or self._idle.pop(name, None) or Kept(name)
        self._running[name] = kept
        if kept.expiry is not None:
            kept.expiry.cancel()
        # Of several choices, or requests at once, nobody knows which the session goes on with.
        alone = choices == 1 and not kept.running
        kept.running += 1
        kept.turns += 1
        if len(self) > MAX_SESSIONS:
            self._end_one()
        try:
            yield Turn(kept, kept.turns, alone, kept.earlier if alone else None)
        finally:
            kept.running -= 1
            if not kept.running:
                kept.turns = kept.sampled  # a try that failed was none
                if not kept.over:
                    self._idle[name] = self._running.pop(name)
                    loop = asyncio.get_running_loop()
                    kept.expiry = loop.call_later(self._idle_seconds, self._end, kept)

    def sampled(self, turn: Turn) -> None:
        """A turn has got a token: what it went on from is no other's any more."""
        kept = turn.of
        kept.sampled = max(kept.sampled, turn.number)
        if not kept.over:
            self._numbers -= kept.numbers
            kept.earlier = None
            self._numbers += kept.numbers

    def finished(self, turn: Turn, session: Session, columns: Columns, line: Line) -> None:
        """Take a choice of a turn, which has ended. line: its trace."""
        kept = turn.of
        line.about.update(session=kept.name, turn=turn.number)
        if self._carried:
            line.about["carried"] = 0 if turn.earlier is None else len(turn.earlier.logprobs)
        if kept.over:
            if self._recorder is not None:
                self._recorder.write(*line)
            return
        self._numbers -= kept.numbers
        if self._recorder is not None:
            kept.waiting.append((turn.number, session.index, line))
        if self._carried and turn.alone and turn.number == kept.turns:
            kept.earlier = _carried(turn, session, columns)
        self._numbers += kept.numbers
        while self._numbers > MAX_NUMBERS:
            self._end_one()

    def close(self) -> None:
        """End all of them."""
        while self._idle or self._running:
            self._end_one()

    def _end_one(self) -> None:
        self._end(next(iter((self._idle or self._running).values())))

    def _end(self, kept: Kept) -> None:
        del (self._running if kept.running else self._idle)[kept.name]
        if kept.expiry is not None:
            kept.expiry.cancel()
        self._numbers -= kept.numbers
        kept.over = True
        if self._recorder is not None:
            for _, _, line in sorted(kept.waiting, key=lambda one: one[:2]):
                self._recorder.write(*line)
        kept.waiting.clear()


def _carried(turn: Turn, session: Session, columns: Columns) -> Earlier | None:
    """What the next turn's monitor goes on from; None where this one has come to a decision."""
    if session.end not in ("completed", "length") or session.record.cut is not None:
        return None
    if session.unmonitored is not None:
        return None
    before = turn.earlier or Earlier(session.prompt_tokens or 0, array("d"), array("d"), None)
    confidences = columns.confidences
    if confidences is not None and before.confidences is not None:
        confidences = before.confidences + confidences
    elif before.logprobs:
        confidences = None
    return Earlier(
        before.prompt_tokens,
        before.logprobs + columns.logprobs,
        before.max_logprobs + columns.max_logprobs,
        confidences,
    )
