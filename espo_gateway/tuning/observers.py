"""What follows the choices of a gateway beside their monitor: tuning and recording."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from espo_gateway.config import Config
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.watch import Watch
from espo_gateway.stream.followers import Follower
from espo_gateway.stream.session import Session
from espo_gateway.traces.recorder import Columns, Recorder, line_of
from espo_gateway.traces.sessions import Sessions, Turn
from espo_gateway.tuning.state import StateFile
from espo_gateway.tuning.tuner import Evidence, Tuning

log = logging.getLogger(__name__)


class Observers:
    """Tuning with its state on disk, and recording, as far as the settings want them.

    Raises InvalidRequest naming the setting.
    """

    def __init__(self, config: Config, gate: Gate, *, has_critic: bool) -> None:
        self.tuning: Tuning | None = None
        self.recorder: Recorder | None = None
        self._state: StateFile | None = None
        self._record_share = config.record_share
        if config.target_share is not None:
            self.tuning = Tuning(
                gate, target=config.target_share, warmup=config.warmup, window=config.window
            )
            if config.state is not None:
                self._state = StateFile(config.state)
                self._state.load(self.tuning, has_critic=has_critic)
        if config.record is not None:
            self.recorder = Recorder(config.record, config.record_megabytes)
        carried = config.carry_over == "session"
        self.sessions: Sessions | None = None
        if self.recorder is not None or carried:
            self.sessions = Sessions(self.recorder, idle=config.session_idle, carried=carried)
        self._record_ids = config.record_ids == "sessions"

    def turn(self, session_id: str | None, choices: int) -> AbstractContextManager[Turn | None]:
        """A request with so many choices, to its end; what it is of its session."""
        if self.sessions is None or not session_id:
            return nullcontext()
        return self.sessions.turn(session_id, choices)

    def wants_ids(self, turn: Turn | None) -> bool:
        """Whether the token ids of a request's choices are recorded."""
        return self._record_ids and turn is not None

    def followers(
        self, gate: Gate, body: Mapping[str, Any], turn: Turn | None = None
    ) -> list[Follower]:
        """What is to follow a choice that begins now, under that gate. body: of its request."""
        followers: list[Follower] = []
        # The turns of a session are recorded all, or they are none.
        sampled = self.recorder is not None and random.random() < self._record_share
        if sampled or turn is not None:
            followers.append(Columns(body, confidences=gate.top_logprobs > 1))
        if self.tuning is not None:
            followers.append(self.tuning.evidence())
        return followers

    def finished(
        self, session: Session, request_id: str | None, turn: Turn | None = None
    ) -> Gate | None:
        """Take a choice that has ended. Returns the gate to be in force, when that is another."""
        watch = session.watch
        if watch is None:
            return None
        if turn is not None and self.sessions is not None:
            self.sessions.sampled(turn)
        changed = None
        for follower in session.followers:
            if isinstance(follower, Columns):
                line = line_of(session, follower, request_id, ids=self.wants_ids(turn))
                if turn is not None and self.sessions is not None:
                    self.sessions.finished(turn, session, follower, line)
                elif self.recorder is not None:
                    self.recorder.write(*line)
            # Of a choice that was not followed to its end nobody knows what it would have done.
            elif isinstance(follower, Evidence) and session.end != "aborted":
                changed = self._tuned(follower, watch)
        return changed

    def _tuned(self, evidence: Evidence, watch: Watch) -> Gate | None:
        tuning = self.tuning
        if tuning is None or not tuning.take(evidence, watch):
            return None
        log.info("gate %d: %s", tuning.gate.version, tuning)
        if self._state is not None:
            self._state.save(tuning)
        return tuning.gate

    def report(self) -> dict[str, Any]:
        """Where they stand, for people."""
        tuning, recorder = self.tuning, self.recorder
        return {
            "tuning": tuning.report() if tuning is not None else None,
            "recording": recorder.report() if recorder is not None else None,
        }

    async def close(self) -> None:
        """Write to the files what is not there yet. May take as long as the disk does."""
        if self.sessions is not None:
            self.sessions.close()  # its timers are the event loop's
        await asyncio.to_thread(self._close_files)

    def _close_files(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
        if self._state is not None and self.tuning is not None:
            self._state.save(self.tuning)
            self._state.close()
