"""A gateway without a trainer: it keeps the regret's statistics and β by itself. Pure.

Over windows of finished choices. The first sets the statistics. Until the warm-up ends each choice
is then judged under these statistics, by its highest score, and stopped by nothing; then β is the
quantile that would have stopped the wished share. From then on each window moves β by the paper's
controller (row 6) and the statistics (row 2). Every step is a gate of its own with a new version,
and a choice keeps the gate it began with.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from espo_gateway.errors import InvalidRequest
from espo_gateway.stop.estimate import StreamStatistics, sigmoid
from espo_gateway.stop.rules import BETA, RULES, Gate
from espo_gateway.stop.threshold_control import share_level, steered
from espo_gateway.stop.watch import Watch
from espo_gateway.stream.followers import Step

#: η of row 6.
STEP = 0.1
_BOUNDS = BETA.level(BETA.strictest), BETA.level(BETA.loosest)

Phase = Literal["statistics", "threshold", "steering"]


class Evidence:
    """What one stream tells up to its cut: the sums of its regrets, and its highest score.

    Follows a watch whose statistics are the gate's. A critic is not asked: V = 0 stands in, so that
    the score is as high as it can be.

    Args:
        scored: else the gate's rule decides by itself, and no score is needed.
    """

    def __init__(self, gate: Gate, *, scored: bool = True) -> None:
        self.gate = gate
        self.count = 0
        self.total = self.squares = 0.0
        self.highest = -math.inf
        self._scored = scored
        self._tokens = 0
        self._track = RULES[gate.rule].track(gate)
        self._value = gate.constant if gate.source == "constant" else 0.0
        self._statistics: StreamStatistics | None = None

    def begin(self, prompt_tokens: int) -> None:
        if self.gate.needs_estimator:
            self._statistics = StreamStatistics(prompt_tokens)

    def push(self, step: Step) -> None:
        if step.z is None:
            return
        self._tokens += 1
        regret = step.regret
        if regret is not None:
            self.count += 1
            self.total += regret
            self.squares += regret * regret
        if self._scored:
            self._score(step, step.z)

    def _score(self, step: Step, z: float) -> None:
        gate, statistics, compared = self.gate, self._statistics, self._value
        logprob, regret = step.logprob, step.regret
        if logprob is None or regret is None:
            if statistics is not None:
                statistics.push(None, None)
            return
        if statistics is not None:
            statistics.push(regret, -logprob)
        if self._track is not None:
            compared = self._track.push(logprob, step.confidence)
        if step.last or self._tokens < gate.min_tokens:
            return
        if statistics is not None and gate.estimator is not None:
            compared = sigmoid(gate.estimator.logit(statistics.features()))
        self.highest = max(self.highest, RULES[gate.rule].score(gate, z, compared))


@dataclass
class Window:
    """Sums over the choices finished since the last step.

    fresh: those that began under the gate in force; a step waits for enough of them, so that it
        sees what the last one did. judged, stopped: those that the gate's own β decided about.
    """

    finished: int = 0
    fresh: int = 0
    judged: int = 0
    stopped: int = 0
    count: int = 0
    total: float = 0.0
    squares: float = 0.0


class Tuning:
    """The gate that is learned.

    gate: in force; its rule is "none" during the warm-up. judging: the gate that evidence is taken
    under. share: of the last window that was stopped.

    Args:
        gate: rule and constants; rule "none" stands for "regret-only".

    Raises InvalidRequest when the rule has no β, or its estimate reads what no evidence is told.
    """

    def __init__(self, gate: Gate, *, target: float, warmup: int, window: int) -> None:
        if gate.rule == "none":
            gate = dataclasses.replace(gate, rule="regret-only")
        if RULES[gate.rule].threshold is not BETA:
            fitting = ", ".join(name for name, r in RULES.items() if r.threshold is BETA)
            raise InvalidRequest(
                f"target_share: rule {gate.rule!r} has no β to tune; use one of {fitting}, or "
                "leave --target-share out",
                param="target_share",
            )
        if gate.estimator is not None and gate.estimator.sources:
            raise InvalidRequest(
                f"target_share: the gate's estimator reads {', '.join(gate.estimator.sources)}, "
                "which β is not tuned by; use an estimator without sources, or leave "
                "--target-share out",
                param="target_share",
            )
        self.target, self.warmup, self.window_size = target, warmup, window
        self.judging = gate
        self.phase: Phase = "statistics"
        self.finished = 0
        self.levels: list[float] = []
        self.share: float | None = None
        self.window = Window()

    @property
    def gate(self) -> Gate:
        if self.phase == "steering":
            return self.judging
        return self._waiting

    @property
    def judging(self) -> Gate:
        return self._judging

    @judging.setter
    def judging(self, gate: Gate) -> None:
        self._judging = gate
        # One object a gate: a request with constants of its own is told by it.
        self._waiting = dataclasses.replace(gate, rule="none")

    def evidence(self) -> Evidence:
        """What is to follow a choice that begins now."""
        return Evidence(self.judging, scored=self.phase == "threshold")

    def take(self, evidence: Evidence, watch: Watch) -> bool:
        """Take a choice that ended by itself, by its limit or by the rule.

        Returns whether the gate in force is another now.
        """
        window, fresh = self.window, evidence.gate is self.judging
        self.finished += 1
        window.finished += 1
        window.fresh += fresh
        window.count += evidence.count
        window.total += evidence.total
        window.squares += evidence.squares
        # One with constants of its own, or from the warm-up, says nothing of the gate's β.
        if watch.gate is evidence.gate:
            window.judged += 1
            window.stopped += watch.cut is not None
        if self.phase == "threshold" and fresh:
            self.levels.append(-evidence.highest)
            if len(self.levels) < self.warmup - self.window_size:
                return False
            self._set_threshold()
        elif self.phase == "threshold" or window.fresh < self.window_size:
            return False
        else:
            self._step()
        self.window = Window()
        return True

    def _set_threshold(self) -> None:
        level = share_level(np.array(self.levels), self.target, _BOUNDS)
        self.levels = []
        self.phase = "steering"
        self._change(beta=BETA.at(level))

    def _step(self) -> None:
        window = self.window
        changes: dict[str, Any] = {}
        if window.count:
            changes["statistics"] = self.judging.statistics.moved_by(
                window.count, window.total, window.squares
            )
        if self.phase == "statistics":
            self.phase = "threshold"
        elif window.judged:
            self.share = window.stopped / window.judged
            level = BETA.level(self.judging.beta)
            changes["beta"] = BETA.at(steered(level, self.share, self.target, STEP, _BOUNDS))
        self._change(**changes)

    def _change(self, **changes: Any) -> None:
        version = self.judging.version + 1
        self.judging = dataclasses.replace(self.judging, version=version, **changes)

    def __str__(self) -> str:
        gate = self.judging
        moments = f"mean {gate.statistics.mean:.3g}, variance {gate.statistics.variance:.3g}"
        if self.phase != "steering":
            return f"warm-up, {self._warmed} of {self.warmup} finished, {moments}"
        share = "" if self.share is None else f", {self.share:.1%} stopped"
        return f"β = {gate.beta:.3g}{share}, {self.target:.1%} wished, {moments}"

    def report(self) -> dict[str, object]:
        """Where it stands, for people."""
        warm = self.phase == "steering"
        return {
            "phase": self.phase,
            "rule": self.judging.rule,
            "target_share": self.target,
            "share_last_window": self.share,
            "beta": self.judging.beta if warm else None,
            "finished": self.finished,
            "warmup": self.warmup,
            "warmup_finished": self.warmup if warm else self._warmed,
            "window": self.window_size,
            "window_finished": self.window.fresh,
            "statistics": dataclasses.asdict(self.judging.statistics),
        }

    @property
    def _warmed(self) -> int:
        if self.phase == "statistics":
            return min(self.window.fresh, self.window_size)
        return self.window_size + len(self.levels)
