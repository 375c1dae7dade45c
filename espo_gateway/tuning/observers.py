"""What follows the choices of a gateway beside their monitor: tuning and recording."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from espo_gateway.config import Config
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.watch import Verdict, Watch
from espo_gateway.stream.session import Session
from espo_gateway.traces.recorder import Recorder, Trace
from espo_gateway.tuning.state import StateFile
from espo_gateway.tuning.tuner import Evidence, Tuning

log = logging.getLogger(__name__)


class ObservedWatch(Watch):
    """Decides as any watch; what it is told goes on to `evidence`, up to a cut, and to `trace`.

    judging: the gate that evidence is taken under.
    """

    __slots__ = ("evidence", "trace")

    def __init__(
        self, gate: Gate, prompt_tokens: int, *, judging: Gate | None = None, traced: bool = False
    ) -> None:
        super().__init__(gate, prompt_tokens)
        self.evidence = None if judging is None else Evidence(judging, prompt_tokens)
        self.trace = Trace(confidences=gate.top_logprobs > 1) if traced else None

    def push(
        self,
        logprob: float | None,
        max_logprob: float | None,
        *,
        last: bool = False,
        confidence: float | None = None,
    ) -> Verdict:
        if self.trace is not None:
            self.trace.push(logprob, max_logprob, confidence)
        if self.evidence is not None and self.cut is None:
            self.evidence.push(logprob, max_logprob, last=last, confidence=confidence)
        return super().push(logprob, max_logprob, last=last, confidence=confidence)


class Observers:
    """Tuning with its state on disk, and recording, as far as the settings want them.

    Raises InvalidRequest naming the setting.
    """

    def __init__(self, config: Config, gate: Gate, *, has_critic: bool) -> None:
        self.tuning: Tuning | None = None
        self.recorder: Recorder | None = None
        self._state: StateFile | None = None
        if config.target_share is not None:
            self.tuning = Tuning(
                gate, target=config.target_share, warmup=config.warmup, window=config.window
            )
            if config.state is not None:
                self._state = StateFile(config.state)
                self._state.load(self.tuning, has_critic=has_critic)
        if config.record is not None:
            self.recorder = Recorder(config.record, config.record_megabytes)

    def watching(self) -> Callable[[Gate, int], Watch]:
        """What makes the watch of a choice that begins now, from its gate and prompt length."""
        if self.tuning is None and self.recorder is None:
            return Watch
        judging = None if self.tuning is None else self.tuning.judging
        return partial(ObservedWatch, judging=judging, traced=self.recorder is not None)

    def finished(self, session: Session, request_id: str | None) -> Gate | None:
        """Take a choice that has ended. Returns the gate to be in force, when that is another."""
        watch = session.watch
        if not isinstance(watch, ObservedWatch):
            return None
        if self.recorder is not None and watch.trace is not None:
            kept = watch.cut if session.end == "early_stop" else None
            about = {"request": request_id, **session.about}
            self.recorder.write(about, watch.trace.columns(kept))
        # Of a choice that was not followed to its end nobody knows what it would have done.
        if self.tuning is None or watch.evidence is None or session.end == "aborted":
            return None
        if not self.tuning.take(watch.evidence, watch):
            return None
        log.info("gate %d: %s", self.tuning.gate.version, self.tuning)
        if self._state is not None:
            self._state.save(self.tuning)
        return self.tuning.gate

    def report(self) -> dict[str, Any]:
        """Where they stand, for people."""
        tuning, recorder = self.tuning, self.recorder
        return {
            "tuning": tuning.report() if tuning is not None else None,
            "recording": recorder.report() if recorder is not None else None,
        }

    def close(self) -> None:
        """Write to the files what is not there yet. May take as long as the disk does."""
        if self.recorder is not None:
            self.recorder.close()
        if self._state is not None and self.tuning is not None:
            self._state.save(self.tuning)
            self._state.close()
