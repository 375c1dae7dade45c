"""What one gateway holds: its servers, the gate in force, its counters. No HTTP of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from espo_gateway.config import Config
from espo_gateway.critic import ValueServer
from espo_gateway.errors import Conflict
from espo_gateway.gates import gate_from_json
from espo_gateway.metrics import Metrics
from espo_gateway.observed import ObservedWatch
from espo_gateway.recording import Recorder
from espo_gateway.rules import Gate, Watch
from espo_gateway.session import Session
from espo_gateway.state import StateFile
from espo_gateway.tuning import Evidence, Tuning
from espo_gateway.upstream import UpstreamPool

log = logging.getLogger(__name__)


class Gateway:
    """One gateway's state. url: where it listens, once it does."""

    def __init__(
        self,
        pool: UpstreamPool,
        config: Config,
        metrics: Metrics,
        *,
        critic: ValueServer | None = None,
    ) -> None:
        self.pool = pool
        self.config = config
        self.url = ""
        self.critic = critic
        self.metrics = metrics
        self.gate = Gate()
        #: choices being generated
        self.sessions: set[Session] = set()
        self.tuning: Tuning | None = None
        self._state: StateFile | None = None
        self.recorder: Recorder | None = None
        if config.gate is not None:
            self.push_gate(config.gate)
        if config.target_share is not None:
            self._tune(config.target_share)
        if config.record is not None:
            self.recorder = Recorder(config.record, config.record_megabytes)

    def _tune(self, target: float) -> None:
        tuning = Tuning(
            self.gate, target=target, warmup=self.config.warmup, window=self.config.window
        )
        if self.config.state is not None:
            self._state = StateFile(self.config.state)
            self._state.load(tuning, has_critic=self.critic is not None)
        self.tuning = tuning
        self._enforce(tuning.gate)

    def push_gate(self, data: bytes) -> None:
        """Put a gate in force for the requests that come; raises InvalidRequest or Conflict.

        A request under way keeps the gate it started with.
        """
        if self.tuning is not None:
            raise Conflict(
                "this gateway finds its gate by itself (--target-share); start it without that to "
                "push one, or with --gate to choose the rule and its constants"
            )
        self._enforce(gate_from_json(data, has_critic=self.critic is not None))

    def _enforce(self, gate: Gate) -> None:
        self.gate = gate
        self.metrics.gate_version.set(gate.version)

    def watching(self) -> Callable[[Gate, int], Watch]:
        """What makes the watch of a choice that begins now, from its gate and prompt length."""
        if self.tuning is None and self.recorder is None:
            return Watch
        judging = None if self.tuning is None else self.tuning.judging
        return partial(ObservedWatch, judging=judging, traced=self.recorder is not None)

    def finished(self, session: Session) -> None:
        """Take a choice that has ended, in whatever way."""
        self.sessions.discard(session)
        self.metrics.count(session)
        watch = session.watch
        if not isinstance(watch, ObservedWatch):
            return
        end = session.end
        if self.recorder is not None and watch.trace is not None:
            kept = watch.cut if end == "early_stop" else None
            self.recorder.write(session.about, watch.trace.columns(kept))
        if self.tuning is not None and watch.evidence is not None and end != "aborted":
            # Of a choice that was not followed to its end nobody knows what it would have done.
            self._learn(self.tuning, watch.evidence, watch)

    def _learn(self, tuning: Tuning, evidence: Evidence, watch: Watch) -> None:
        if not tuning.take(evidence, watch):
            return
        self._enforce(tuning.gate)
        log.info("gate %d: %s", tuning.gate.version, tuning)
        if self._state is not None:
            self._state.save(tuning)

    def close(self) -> None:
        """Write to their files what is not there yet. May take as long as the disk does."""
        if self.recorder is not None:
            self.recorder.close()
        if self._state is not None and self.tuning is not None:
            self._state.save(self.tuning)
            self._state.close()
