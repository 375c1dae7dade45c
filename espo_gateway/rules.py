"""When to stop: a `Gate` (rule, constants, state) and a `Watch` that applies it to one stream.

A rule's decision is a function of the stream's tokens and values alone, never of timing, so
`first_stops`, which replays recorded rollouts, gives the decisions a live stream had. Pure.

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

import numpy as np
from numpy.typing import NDArray

from espo_gateway.monitor import (
    MISSING_LOGPROB,
    Array,
    MonitorConfig,
    RegretMonitor,
    RegretStatistics,
    smoothed_regret,
    surrogate_regret,
)
from espo_gateway.values import (
    StreamStatistics,
    SuccessEstimator,
    probabilities,
    sigmoid,
    stream_features,
)

RuleName = Literal[
    "none", "value-gated", "regret-only", "value-only", "success-probability", "random"
]
ValueName = Literal["constant", "stream", "critic"]


@dataclass(frozen=True)
class Gate:
    """All that a decision depends on beside the stream; made by the trainer, frozen for a batch.

    rule: "none" never stops; "value-gated" is the paper's z > β·max(V, ε) (row 5); "regret-only" is
        z > β; "success-probability" stops when the estimated P(success) falls under p_star.
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
    min_tokens: int = 4

    def __post_init__(self) -> None:
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
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, not {self.min_tokens}")
        if self.needs_estimator and self.estimator is None:
            raise ValueError(f"rule {self.rule!r} with value {self.value!r} needs an estimator")

    @property
    def needs_estimator(self) -> bool:
        """Whether a decision uses the stream's estimated success probability."""
        return self.rule == "success-probability" or (
            self.rule == "value-gated" and self.value == "stream"
        )

    @property
    def logit_star(self) -> float:
        """log p*/(1-p*): comparing logits spares an exponential a token."""
        return math.log(self.p_star / (1.0 - self.p_star))


class Verdict(enum.Enum):
    """What a token leads to."""

    GO = "go"
    STOP = "stop"
    #: Only V can tell, and it must be asked for: answer with `Watch.settle`.
    ASK = "ask"


class Watch:
    """One stream under a gate. After a stop, further tokens are counted and change nothing."""

    __slots__ = (
        "_logit_star",
        "_monitor",
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
        self._monitor = RegretMonitor(gate.statistics, gate.monitor)
        self._statistics = StreamStatistics(prompt_tokens) if gate.needs_estimator else None
        self._logit_star = gate.logit_star
        self._unsettled: dict[int, float] = {}

    def push(self, logprob: float | None, max_logprob: float | None) -> Verdict:
        """Take the next token's logprob and the largest logprob at its position."""
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
        if self.tokens < self.gate.min_tokens:
            return Verdict.GO
        return self._decide(z)

    def _decide(self, z: float) -> Verdict:
        gate = self.gate
        if gate.rule == "none":
            return Verdict.GO
        if gate.rule == "success-probability":
            logit = self._logit()
            if logit < self._logit_star:
                return self._stop(self.tokens, z, gate.p_star, sigmoid(logit))
            return Verdict.GO
        if gate.rule == "regret-only":
            return self._stop(self.tokens, z, gate.beta, None) if z > gate.beta else Verdict.GO
        # max(V, ε) >= ε, so below β·ε no V can stop the stream: V is asked for lazily.
        if z <= gate.beta * gate.epsilon:
            return Verdict.GO
        if gate.value == "critic":
            self._unsettled[self.tokens] = z
            return Verdict.ASK
        value = gate.constant if gate.value == "constant" else sigmoid(self._logit())
        return self._gate(self.tokens, z, value)

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
        return self._gate(token, z, value)

    def _gate(self, token: int, z: float, value: float) -> Verdict:
        threshold = self.gate.beta * max(value, self.gate.epsilon)
        return self._stop(token, z, threshold, value) if z > threshold else Verdict.GO

    def _stop(self, token: int, z: float, threshold: float, value: float | None) -> Verdict:
        if self.cut is None or token < self.cut:
            self.cut, self.z, self.threshold, self.value = token, z, threshold, value
        return Verdict.STOP

    def _logit(self) -> float:
        assert self._statistics is not None
        assert self.gate.estimator is not None
        return self.gate.estimator.logit(self._statistics.features())


def first_stops(
    gate: Gate, logprobs: Array, max_logprobs: Array, prompt_tokens: Array
) -> NDArray[np.int64]:
    """Replay a gate over many recorded rollouts: the cut each would have had, 0 for no stop.

    Args:
        logprobs, max_logprobs: shape [rollouts, tokens], NaN where missing or past the end
            (`monitor.pad` makes them).
        prompt_tokens: shape [rollouts].

    Returns:
        tokens kept, shape [rollouts]: equal to `Watch.cut`, token for token.
    """
    regrets = recorded_regrets(logprobs, max_logprobs)
    if gate.rule == "none" or not regrets.size:
        return np.zeros(len(regrets), dtype=np.int64)
    z = smoothed_regret(regrets, gate.statistics, gate.monitor)
    logits = None
    if gate.needs_estimator:
        assert gate.estimator is not None
        logits = gate.estimator.logits(stream_features(regrets, -logprobs, prompt_tokens))
    if gate.rule == "success-probability":
        assert logits is not None
        crossed = logits < gate.logit_star
    elif gate.rule == "regret-only":
        crossed = z > gate.beta
    elif gate.value == "critic":
        raise ValueError(
            "a critic's values are not recorded: replay needs value 'constant' or 'stream'"
        )
    else:
        values = gate.constant if logits is None else probabilities(logits)
        crossed = z > gate.beta * np.maximum(values, gate.epsilon)
    crossed = crossed & ~np.isnan(regrets)
    crossed[:, : gate.min_tokens - 1] = False
    return np.where(crossed.any(axis=1), crossed.argmax(axis=1) + 1, 0)


def recorded_regrets(logprobs: Array, max_logprobs: Array) -> Array:
    """g of recorded rollouts, NaN where `surrogate_regret` has no number; same shape."""
    with np.errstate(invalid="ignore"):
        known = [(rows > MISSING_LOGPROB) & (rows < np.inf) for rows in (logprobs, max_logprobs)]
        return np.where(known[0] & known[1], np.maximum(max_logprobs - logprobs, 0.0), np.nan)
