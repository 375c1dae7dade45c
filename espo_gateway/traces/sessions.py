"""What is kept of sessions (the header X-Session-ID) from one of their requests to the next.

A session's requests are its turns. Their traces wait here until the session is over, so that they
stand together in the file, in order; and where that is wanted, a turn's monitor goes on where the
last one's ended. A session is over once it has been idle for so long; when there are too many, or
they hold too much, the one that was used least recently is over before its time. A later request
begins it anew.
"""

from __future__ import annotations

import re
import time
from array import array
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
    """One session. over: nobody looks for it any more."""

    name: str
    used: float
    turns: int = 0
    waiting: list[tuple[int, int, Line]] = field(default_factory=list)
    earlier: Earlier | None = None
    over: bool = False

    @property
    def numbers(self) -> int:
        earlier = 0 if self.earlier is None else len(self.earlier.logprobs)
        return 3 * earlier + sum(line.size for _, _, line in self.waiting)


@dataclass(frozen=True)
class Turn:
    """One request of a session, the `number`th. earlier: what its monitor goes on from.

    alone: whether it has one choice.
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
        self._idle = idle
        self._carried = carried
        #: by name, those used least recently first
        self._kept: dict[str, Kept] = {}
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, session_id: str, choices: int) -> Turn:
        """A request of a session begins; it has so many choices."""
        self.end_idle()
        name = session_id
        if not _SANE.fullmatch(name):
            name = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        kept = self._kept.pop(name, None) or Kept(name, time.monotonic())
        self._kept[name] = kept
        kept.used = time.monotonic()
        kept.turns += 1
        earlier = kept.earlier
        if earlier is not None:
            self._numbers -= kept.numbers
            kept.earlier = None  # two requests at once do not both go on from it
            self._numbers += kept.numbers
        if len(self._kept) > MAX_SESSIONS:
            self._end(next(iter(self._kept.values())))
        alone = choices == 1
        return Turn(kept, kept.turns, alone, earlier if alone else None)

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
        # Of several choices, or requests at once, nobody knows which the session goes on with.
        if self._carried and turn.alone and turn.number == kept.turns:
            kept.earlier = _carried(turn, session, columns)
        self._numbers += kept.numbers
        kept.used = time.monotonic()
        self._kept[kept.name] = self._kept.pop(kept.name)
        while self._numbers > MAX_NUMBERS:
            self._end(next(iter(self._kept.values())))

    def end_idle(self) -> None:
        """End the sessions that have been idle for too long."""
        before = time.monotonic() - self._idle
        while self._kept and (kept := next(iter(self._kept.values()))).used < before:
            self._end(kept)

    def close(self) -> None:
        """End all of them."""
        for kept in list(self._kept.values()):
            self._end(kept)

    def _end(self, kept: Kept) -> None:
        del self._kept[kept.name]
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
