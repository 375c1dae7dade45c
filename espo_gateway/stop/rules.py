"""The stop rules, and the `Gate` that holds all a decision depends on beside the stream.

A rule is a class here, a name in `RuleName` and a line in `RULES`; gate, live stream (`watch.py`),
replay (`replay.py`) and trainer read all else off it. A rule's score is made of z and of what it is
told beside: V, or the number that a track of its own keeps. Live and replayed scores are equal to
the last bit. Pure.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from espo_gateway.stop.estimate import SuccessEstimator, sigmoid
from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.regret import (
    MOST_TOKENS,
    Array,
    MonitorConfig,
    RegretStatistics,
    moving_average,
)
from espo_gateway.stop.told import ASKED, Schedule, SourceName
from espo_gateway.stop.tracks import (
    MeanSurprise,
    StreamChance,
    Track,
    WindowedConfidence,
    stream_draws,
    windowed_confidences,
)

RuleName = Literal[
    "none",
    "value-gated",
    "regret-only",
    "value-only",
    "success-probability",
    "surprise",
    "confidence",
    "random",
    "length",
]
ValueName = Literal["constant", "stream", "critic"]


@dataclass(frozen=True)
class Threshold:
    """A field of the gate that scores are compared with, and all that is particular to it.

    name: of the field. symbol: as people write it. above: a score stops above it; else below it.
    strictest, loosest: beyond these no controller and no recommendation goes by itself.
    grid: what a replay tries, from strict to loose.
    """

    name: str
    symbol: str
    above: bool
    strictest: float
    loosest: float
    grid: Array = field(repr=False, compare=False)
    _level: Callable[[Any], Any]
    _at: Callable[[float], float]

    def of(self, gate: Gate) -> float:
        """Its value in a gate."""
        return getattr(gate, self.name)

    def set(self, gate: Gate, value: float) -> Gate:
        """The gate with another value of it."""
        changes: dict[str, Any] = {self.name: value}
        return dataclasses.replace(gate, **changes)

    def crossed(self, score: Any, limit: Any) -> Any:
        """Whether a score, or each of an array, stops; NaN never does."""
        return score > limit if self.above else score < limit

    def level(self, value: Any) -> Any:
        """How loose a threshold or a score is, or each of an array: higher always stops more.

        -β, log p*/(1 - p*), the confidence, log hazard or minus the logarithm of a length.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._level(value)

    def at(self, level: float) -> float:
        """The inverse of `level`."""
        return self._at(level)


def _log_odds(value: Any) -> Any:
    """Infinite where a V has left [0, 1], as a critic's may."""
    share = np.clip(value, 0.0, 1.0)
    return np.log(share) - np.log1p(-share)


def _shortness(tokens: Any) -> Any:
    return -np.log(tokens)


def _length(shortness: float) -> float:
    return math.exp(-shortness)


_POINTS = 121
BETA = Threshold(
    *("beta", "β", True, 50.0, 0.05),
    grid=np.geomspace(20.0, 0.1, _POINTS),
    _level=operator.neg,
    _at=operator.neg,
)
P_STAR = Threshold(
    *("p_star", "p*", False, 1e-6, 0.5),
    grid=1.0 / (1.0 + np.exp(np.linspace(13.8, -6.9, _POINTS))),
    _level=_log_odds,
    _at=sigmoid,
)
CONFIDENCE = Threshold(
    *("confidence", "confidence", False, 1e-3, 1e3),
    grid=np.geomspace(1e-3, 1e3, _POINTS),
    _level=operator.pos,
    _at=operator.pos,
)
HAZARD = Threshold(
    *("hazard", "hazard", False, 1e-9, 0.5),
    grid=np.geomspace(1e-6, 0.5, _POINTS),
    _level=np.log,
    _at=math.exp,
)
#: β again, in tokens.
LENGTH = Threshold(
    *("beta", "β", True, 2.0**20, 1.0),
    grid=np.unique(np.geomspace(1.0, 2.0**17, 139).round())[::-1],
    _level=_shortness,
    _at=_length,
)


class Rule:
    """Never stops: plain PPO. Also what all rules have in common.

    threshold: what its score is compared with; None for no stop at all.
    valued: it needs V. source: where V comes from whatever the gate says.
    compared: which of z and V people see held against the threshold, if any.
    """

    threshold: ClassVar[Threshold | None] = None
    valued: ClassVar[bool] = False
    source: ClassVar[Literal["stream"] | None] = None
    compared: ClassVar[Literal["z", "value"] | None] = None

    def floor(self, gate: Gate) -> float:
        """z up to which no token stops, whatever else there is; costs such a token nothing."""
        return math.inf

    def score(self, gate: Gate, z: float, v: float) -> float:
        """What is compared. v: V, or what the rule's track gives in its place, or else the token's
        number, from 1."""
        return z

    def scores(self, gate: Gate, z: Array, v: Array) -> Array:
        """The same for arrays of one shape."""
        return z

    def bound(self, gate: Gate, v: float) -> float | None:
        """The threshold as it is reported: of rules that compare z, in units of z."""
        return None if self.threshold is None else self.threshold.of(gate)

    def track(self, gate: Gate) -> Track | None:
        """What must follow a live stream beside z."""
        return None

    def tracks(self, gate: Gate, recorded: Recorded) -> Array | None:
        """V apart, what `score` would have got beside z, [rollouts, tokens]; None: nothing."""
        return None

    def alternatives(self, gate: Gate) -> int:
        """Logprobs a token that the server must be asked for, beside the sampled one's."""
        return 1


class RegretOnly(Rule):
    """z > β: the paper's ablation "regret-only stop" (arXiv 2605.29860)."""

    threshold = BETA
    compared = "z"

    def floor(self, gate: Gate) -> float:
        return gate.beta


class ValueGated(Rule):
    """z > β · max(V, ε): the paper's rule (arXiv 2605.29860, row 5)."""

    threshold = BETA
    valued = True
    compared = "z"

    def floor(self, gate: Gate) -> float:
        # max(V, ε) >= ε. A little less, as the score is a quotient and this a product.
        return gate.beta * gate.epsilon * (1.0 - 1e-9)

    def score(self, gate: Gate, z: float, v: float) -> float:
        return z / max(v, gate.epsilon)

    def scores(self, gate: Gate, z: Array, v: Array) -> Array:
        return z / np.maximum(v, gate.epsilon)

    def bound(self, gate: Gate, v: float) -> float:
        return gate.beta * max(v, gate.epsilon)


class WithoutRegret(Rule):
    """Looks at v alone, whatever z is."""

    def floor(self, gate: Gate) -> float:
        return -math.inf

    def score(self, gate: Gate, z: float, v: float) -> float:
        return v

    def scores(self, gate: Gate, z: Array, v: Array) -> Array:
        return v


class ValueOnly(WithoutRegret):
    """V < p*: the paper's ablation "value-only stop" (arXiv 2605.29860)."""

    threshold = P_STAR
    valued = True
    compared = "value"


class SuccessProbability(ValueOnly):
    """P(success) < p*, by the stream's own statistics (`estimate.py`); ours, not the paper's."""

    source = "stream"


class Surprise(WithoutRegret):
    """Smoothed -log p of the sampled tokens > β: the simple rival of every comparison."""

    threshold = BETA

    def track(self, gate: Gate) -> Track:
        return MeanSurprise(gate.monitor.smoothing)

    def tracks(self, gate: Gate, recorded: Recorded) -> Array:
        surprises = np.where(recorded.known, -recorded.logprobs, np.nan)
        return moving_average(surprises, gate.monitor.smoothing)


class Confidence(WithoutRegret):
    """Mean confidence of the last tokens < a bound: DeepConf's windowed one (arXiv 2508.15260)."""

    threshold = CONFIDENCE

    def track(self, gate: Gate) -> Track:
        return WindowedConfidence(gate.confidence_window)

    def tracks(self, gate: Gate, recorded: Recorded) -> Array:
        if recorded.confidences is None:
            raise ValueError("the confidence rule needs the recorded confidences")
        usable = recorded.known & np.isfinite(recorded.confidences)
        return windowed_confidences(recorded.confidences, usable, gate.confidence_window)

    def alternatives(self, gate: Gate) -> int:
        return gate.confidence_top_k


class Random(WithoutRegret):
    """A coin at each token, heads with probability `hazard`: the paper's "random stop"."""

    threshold = HAZARD

    def track(self, gate: Gate) -> Track:
        return StreamChance(gate.version)

    def tracks(self, gate: Gate, recorded: Recorded) -> Array:
        return stream_draws(gate.version, recorded.logprobs, recorded.known)


class Length(WithoutRegret):
    """More than β tokens, whatever they are: what a detector must beat."""

    threshold = LENGTH

    def tracks(self, gate: Gate, recorded: Recorded) -> Array:
        shape = recorded.logprobs.shape
        return np.broadcast_to(np.arange(1.0, shape[1] + 1.0), shape)


RULES: dict[RuleName, Rule] = {
    "none": Rule(),
    "value-gated": ValueGated(),
    "regret-only": RegretOnly(),
    "value-only": ValueOnly(),
    "success-probability": SuccessProbability(),
    "surprise": Surprise(),
    "confidence": Confidence(),
    "random": Random(),
    "length": Length(),
}


def threshold_of(rule: RuleName) -> Threshold:
    """What a rule's score is compared with. Raises ValueError for the rule that has none."""
    threshold = RULES[rule].threshold
    if threshold is None:
        raise ValueError(f"rule {rule!r} has no threshold")
    return threshold


def value_source(rule: RuleName, value: ValueName) -> ValueName | None:
    """Where the V of a rule comes from; None when the rule has no V."""
    chosen = RULES[rule]
    return chosen.source or value if chosen.valued else None


@dataclass(frozen=True)
class Gate:
    """All that a decision depends on beside the stream; made by the trainer, frozen for a batch.

    rule: see the class that `RULES` names.
    value: where V, the chance of success, comes from: a constant, the stream's statistics, or a
        critic server.
    critic_wrong, critic_right: what the critic says of a wrong and of a right answer; V lies
        between them as it does between 0 and 1.
    estimator: of V, where it is "stream". free: the same without the sources that must be asked.
    schedule: when those are asked.
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
    critic_wrong: float = 0.0
    critic_right: float = 1.0
    estimator: SuccessEstimator | None = None
    free: SuccessEstimator | None = None
    schedule: Schedule = field(default_factory=Schedule)
    p_star: float = 0.05
    confidence: float = 1.0
    confidence_window: int = 2048
    confidence_top_k: int = 20
    hazard: float = 0.0
    min_tokens: int = 4

    def __post_init__(self) -> None:
        for part in (self, self.statistics, self.monitor, self.schedule):
            for name, value in vars(part).items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{name} must be a finite number, not {value}")
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {get_args(RuleName)}, not {self.rule!r}")
        if self.value not in get_args(ValueName):
            raise ValueError(f"value must be one of {get_args(ValueName)}, not {self.value!r}")
        for name in ("beta", "epsilon", "confidence"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not self.critic_wrong < self.critic_right:
            raise ValueError(
                f"critic_wrong must be below critic_right, not {self.critic_wrong} and "
                f"{self.critic_right}"
            )
        if not 0.0 < self.p_star < 1.0:
            raise ValueError(f"p_star must lie between 0 and 1, not {self.p_star}")
        if not 0.0 <= self.hazard <= 1.0:
            raise ValueError(f"hazard must lie in [0, 1], not {self.hazard}")
        for name in ("confidence_window", "confidence_top_k", "min_tokens"):
            if not 1 <= getattr(self, name) <= MOST_TOKENS:
                raise ValueError(
                    f"{name} must lie between 1 and {MOST_TOKENS}, not {getattr(self, name)}"
                )
        if self.needs_estimator and self.estimator is None:
            raise ValueError(f"rule {self.rule!r} with value {self.value!r} needs an estimator")
        if self.free is not None and self.free.asks:
            raise ValueError("free must read no source that must be asked")
        if self.asks_estimate and not self.schedule.every:
            raise ValueError(
                "schedule.every must be at least 1 for an estimator that asks "
                f"{' and '.join(self.estimator.sources if self.estimator else ())}"
            )

    @property
    def source(self) -> ValueName | None:
        """Where the V of this gate's rule comes from; None when the rule has no V."""
        return value_source(self.rule, self.value)

    @property
    def needs_estimator(self) -> bool:
        """Whether a decision uses the stream's estimated success probability."""
        return self.source == "stream"

    @property
    def asks_estimate(self) -> bool:
        """Whether V is an estimate that is known only where its sources were asked."""
        return self.needs_estimator and bool(self.asks)

    @property
    def asks(self) -> frozenset[SourceName]:
        """The sources that a decision asks while the stream goes on."""
        if self.source == "critic":
            return frozenset({"critic"})
        if self.needs_estimator and self.estimator is not None:
            return ASKED.intersection(self.estimator.sources)
        return frozenset()

    @property
    def needs_critic(self) -> bool:
        """Whether a critic is asked."""
        return "critic" in self.asks

    def success(self, said: Any) -> Any:
        """V of what a critic says, a number or an array; it may leave [0, 1] as V does."""
        return (said - self.critic_wrong) / (self.critic_right - self.critic_wrong)

    @property
    def top_logprobs(self) -> int:
        """Alternatives a token whose logprobs the rule reads."""
        return RULES[self.rule].alternatives(self)
