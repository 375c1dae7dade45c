"""When to stop: a `Gate` (rule, constants, state) and a `Watch` that applies it to one stream.

A rule's decision is a function of the stream's tokens and values alone, never of timing, so a
replay of recorded rollouts (`replay.py`) gives the decisions a live stream had. Pure.

    watch = Watch(Gate(rule="value-gated", beta=2.0), prompt_tokens=12)
    for logprob, max_logprob in stream:
        if watch.push(logprob, max_logprob) is Verdict.STOP:
            break   # the rollout ends at token watch.cut
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from espo_gateway.chance import StreamChance
from espo_gateway.monitor import MonitorConfig, RegretMonitor, RegretStatistics, surrogate_regret
from espo_gateway.values import StreamStatistics, SuccessEstimator, sigmoid

RuleName = Literal[
    "none", "value-gated", "regret-only", "value-only", "success-probability", "random"
]
ValueName = Literal["constant", "stream", "critic"]

#: The field of `Gate` that each rule compares with; "beta" is exceeded, the others undercut.
THRESHOLDS: dict[RuleName, str] = {
    "value-gated": "beta",
    "regret-only": "beta",
    "value-only": "p_star",
    "success-probability": "p_star",
    "random": "hazard",
}


def value_source(rule: RuleName, value: ValueName) -> ValueName | None:
    """Where the V of a rule comes from; None when the rule has no V."""
    if rule == "success-probability":
        return "stream"
    return value if rule in ("value-gated", "value-only") else None


@dataclass(frozen=True)
class Gate:
    """All that a decision depends on beside the stream; made by the trainer, frozen for a batch.

    rule: "none" never stops; "value-gated" is the paper's z > β·max(V, ε) (row 5); "regret-only" is
        z > β; "value-only" stops when V < p_star; "success-probability" is value-only with V from
        the stream; "random" stops at each token with probability `hazard`.
    value: where V comes from: a constant, the stream's statistics, or a critic server.
    min_tokens: no stop before this many tokens; a prompt is never skipped outright.
    """

    version: int = 0
    weights_version: str = ""
    rule: RuleName = "none"
    statistics: RegretStatistics = field(default_factory=RegretStatistics)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    beta: float = 7.0
    epsilon: float = 0.2
    value: ValueName = "constant"
    constant: float = 1.0
    estimator: SuccessEstimator | None = None
    p_star: float = 0.05
    hazard: float = 0.0
    min_tokens: int = 4

    def __post_init__(self) -> None:
        for part in (self, self.statistics, self.monitor):
            for name, value in vars(part).items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{name} must be a finite number, not {value}")
        if self.rule not in get_args(RuleName):
            raise ValueError(f"rule must be one of {get_args(RuleName)}, not {self.rule!r}")
        if self.value not in get_args(ValueName):
            raise ValueError(f"value must be one of {get_args(ValueName)}, not {self.value!r}")
        if not self.beta > 0.0:
            raise ValueError(f"beta must be positive, not {self.beta}")
        if not self.epsilon > 0.0:
            raise ValueError(f"epsilon must be positive, not {self.epsilon}")
        if not 0.0 < self.p_star < 1.0:
            raise ValueError(f"p_star must lie between 0 and 1, not {self.p_star}")
        if not 0.0 <= self.hazard <= 1.0:
            raise ValueError(f"hazard must lie in [0, 1], not {self.hazard}")
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, not {self.min_tokens}")
        if self.needs_estimator and self.estimator is None:
            raise ValueError(f"rule {self.rule!r} with value {self.value!r} needs an estimator")

    @property
    def source(self) -> ValueName | None:
        """Where the V of this gate's rule comes from; None when the rule has no V."""
        return value_source(self.rule, self.value)

    @property
    def needs_estimator(self) -> bool:
        """Whether a decision uses the stream's estimated success probability."""
        return self.source == "stream"

    @property
    def needs_critic(self) -> bool:
        """Whether a critic server is asked, who reads token ids."""
        return self.source == "critic"


class Verdict(enum.Enum):
    """What a token leads to."""

    GO = "go"
    STOP = "stop"
    #: Only V can tell, and it must be asked for: answer with `Watch.settle`.
    ASK = "ask"


class Watch:
    """One stream under a gate. After a stop, further tokens are counted and change nothing."""

    __slots__ = (
        "_chance",
        "_monitor",
        "_source",
        "_statistics",
        "_unsettled",
        "cut",
        "gate",
        "missing",
        "threshold",
        "tokens",
        "value",
        "z",
    )

    def __init__(self, gate: Gate, prompt_tokens: int) -> None:
        self.gate = gate
        self.tokens = 0
        #: tokens whose logprobs were missing or no numbers
        self.missing = 0
        #: number of tokens kept: the decision token is the last of them; None while going on
        self.cut: int | None = None
        self.z = 0.0
        self.threshold: float | None = None
        self.value: float | None = None
        self._source = gate.source
        self._monitor = RegretMonitor(gate.statistics, gate.monitor)
        self._statistics = StreamStatistics(prompt_tokens) if gate.needs_estimator else None
        self._chance = StreamChance(gate.version) if gate.rule == "random" else None
        self._unsettled: dict[int, float] = {}

    def push(
        self, logprob: float | None, max_logprob: float | None, *, last: bool = False
    ) -> Verdict:
        """Take the next token's logprob and the largest logprob at its position.

        last: the token completes the rollout, so stopping there would save nothing, and turn a
            finished rollout into a failure: no decision is taken.
        """
        self.tokens += 1
        if self.cut is not None:
            return Verdict.GO
        regret = surrogate_regret(logprob, max_logprob)
        z = self.z = self._monitor.push(regret)
        if self._statistics is not None:
            self._statistics.push(regret, None if regret is None else -logprob)  # type: ignore[operator]
        if regret is None:
            self.missing += 1
            return Verdict.GO
        draw = 1.0 if self._chance is None else self._chance.push(logprob)  # type: ignore[arg-type]
        if last or self.tokens < self.gate.min_tokens:
            return Verdict.GO
        return self._decide(z, draw)

    def _decide(self, z: float, draw: float) -> Verdict:
        gate, token = self.gate, self.tokens
        if gate.rule == "none":
            return Verdict.GO
        if gate.rule == "random":
            return self._stop(token, z, gate.hazard, None) if draw < gate.hazard else Verdict.GO
        if gate.rule == "regret-only":
            return self._stop(token, z, gate.beta, None) if z > gate.beta else Verdict.GO
        # max(V, ε) >= ε, so up to β·ε no V can stop the stream: V is asked for lazily.
        if gate.rule == "value-gated" and z / gate.epsilon <= gate.beta:
            return Verdict.GO
        if self._source == "critic":
            self._unsettled[token] = z
            return Verdict.ASK
        return self._compare(token, z, self._estimate())

    @property
    def settled(self) -> bool:
        """Whether no value is outstanding that could still move the cut forward."""
        return self.cut is None or not any(token < self.cut for token in self._unsettled)

    def settle(self, token: int, value: float | None) -> Verdict:
        """Answer an ASK: V at that token, or None when no answer could be had (then no stop).

        Answers may come late and out of order; the cut is the first token that says stop, so it is
        known once `settled`.
        """
        z = self._unsettled.pop(token)
        if value is None:
            return Verdict.GO
        return self._compare(token, z, value)

    def _compare(self, token: int, z: float, value: float) -> Verdict:
        gate = self.gate
        if gate.rule == "value-gated":
            bound = max(value, gate.epsilon)
            if z / bound > gate.beta:
                return self._stop(token, z, gate.beta * bound, value)
            return Verdict.GO
        return self._stop(token, z, gate.p_star, value) if value < gate.p_star else Verdict.GO

    def _stop(self, token: int, z: float, threshold: float, value: float | None) -> Verdict:
        if self.cut is None or token < self.cut:
            self.cut, self.z, self.threshold, self.value = token, z, threshold, value
        return Verdict.STOP

    @property
    def estimate(self) -> float | None:
        """V at the last token; None where the rule has none, or a critic must be asked."""
        return None if self._source in (None, "critic") else self._estimate()

    def _estimate(self) -> float:
        if self._source == "constant":
            return self.gate.constant
        assert self._statistics is not None
        assert self.gate.estimator is not None
        return sigmoid(self.gate.estimator.logit(self._statistics.features()))
