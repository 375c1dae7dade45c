"""The stop rules, and the `Gate` that holds all a decision depends on beside the stream.

A rule is a class here, a name in `RuleName` and a line in `RULES`; gate, live stream (`watch.py`),
replay (`replay.py`) and trainer read all else off it. A rule's score is made of z and of what it is
told beside: V, or the number that a track of its own keeps. Live and replayed scores are equal to
the last bit. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from espo_gateway.stop.estimate import SuccessEstimator, sigmoid
from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.regret import Array, MonitorConfig, RegretStatistics, moving_average
from espo_gateway.stop.tracks import (
    MeanSurprise,
    StreamChance,
    Track,
    WindowedConfidence,
    _window_means,
    stream_draws,
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
]
ValueName = Literal["constant", "stream", "critic"]


@dataclass(frozen=True)
class Threshold:
    """A field of the gate that scores are compared with.

    above: a score stops above it; else below it.
    level, at: to a scale where higher always stops more, and back.
    """

    above: bool
    level: Callable[[Any], Any]
    at: Callable[[float], float]

    def crossed(self, score: Any, limit: float) -> Any:
        """Whether a score, or each of an array, stops; NaN never does."""
        return score > limit if self.above else score < limit


def _log_odds(value: Any) -> Any:
    """Infinite where a V has left [0, 1], as a critic's may."""
    share = np.clip(value, 0.0, 1.0)
    return np.log(share) - np.log1p(-share)


THRESHOLD: dict[str, Threshold] = {
    "beta": Threshold(True, lambda x: -x, lambda x: -x),
    "p_star": Threshold(False, _log_odds, sigmoid),
    "hazard": Threshold(False, np.log, math.exp),
    "confidence": Threshold(False, lambda x: x, lambda x: x),
}


class Rule:
    """A stop rule, here the one that never stops.

    threshold: the field of `Gate` that its score is compared with. valued: it needs V.
    compares_z: it looks at z. source: where V comes from whatever the gate says.
    """

    threshold: ClassVar[str | None] = None
    valued: ClassVar[bool] = False
    compares_z: ClassVar[bool] = True
    source: ClassVar[Literal["stream"] | None] = None

    def floor(self, gate: Gate) -> float:
        """z up to which no token stops, whatever else there is; costs such a token nothing."""
        return math.inf

    def score(self, gate: Gate, z: float, told: float) -> float:
        """What is compared. told: V, or what the rule's track says."""
        return z

    def scores(self, gate: Gate, z: Array, told: Array) -> Array:
        """The same for arrays of one shape."""
        return z

    def bound(self, gate: Gate, told: float) -> float | None:
        """The threshold as it is reported: of rules that compare z, in units of z."""
        return None if self.threshold is None else getattr(gate, self.threshold)

    def track(self, gate: Gate) -> Track | None:
        """What must follow a live stream beside z."""
        return None

    def tracks(self, gate: Gate, recorded: Recorded) -> Array | None:
        """What `track` would have said, [rollouts, tokens]."""
        return None

    def alternatives(self, gate: Gate) -> int:
        """Logprobs a token that the server must be asked for, beside the sampled one's."""
        return 1


class RegretOnly(Rule):
    threshold = "beta"

    def floor(self, gate: Gate) -> float:
        return gate.beta


class ValueGated(Rule):
    threshold = "beta"
    valued = True

    def floor(self, gate: Gate) -> float:
        # max(V, ε) >= ε. A little less, as the score is a quotient and this a product.
        return gate.beta * gate.epsilon * (1.0 - 1e-9)

    def score(self, gate: Gate, z: float, told: float) -> float:
        return z / max(told, gate.epsilon)

    def scores(self, gate: Gate, z: Array, told: Array) -> Array:
        return z / np.maximum(told, gate.epsilon)

    def bound(self, gate: Gate, told: float) -> float:
        return gate.beta * max(told, gate.epsilon)


class Told(Rule):
    """Compares what it is told alone, whatever z is."""

    compares_z = False

    def floor(self, gate: Gate) -> float:
        return -math.inf

    def score(self, gate: Gate, z: float, told: float) -> float:
        return told

    def scores(self, gate: Gate, z: Array, told: Array) -> Array:
        return told


class ValueOnly(Told):
    threshold = "p_star"
    valued = True


class SuccessProbability(ValueOnly):
    source = "stream"


class Surprise(Told):
    threshold = "beta"

    def track(self, gate: Gate) -> Track:
        return MeanSurprise(gate.monitor.smoothing)

    def tracks(self, gate: Gate, recorded: Recorded) -> Array:
        surprises = np.where(recorded.known, -recorded.logprobs, np.nan)
        return moving_average(surprises, gate.monitor.smoothing)


class Confidence(Told):
    threshold = "confidence"

    def track(self, gate: Gate) -> Track:
        return WindowedConfidence(gate.confidence_window)

    def tracks(self, gate: Gate, recorded: Recorded) -> Array:
        if recorded.confidences is None:
            raise ValueError("the confidence rule needs the recorded confidences")
        usable = recorded.known & np.isfinite(recorded.confidences)
        out = np.full(recorded.confidences.shape, np.nan)
        for row, values, there in zip(out, recorded.confidences, usable, strict=True):
            row[there] = _window_means(values[there], gate.confidence_window)
        return out

    def alternatives(self, gate: Gate) -> int:
        return gate.confidence_top_k


class Random(Told):
    threshold = "hazard"

    def track(self, gate: Gate) -> Track:
        return StreamChance(gate.version)

    def tracks(self, gate: Gate, recorded: Recorded) -> Array:
        return stream_draws(gate.version, recorded.logprobs, recorded.known)


RULES: dict[RuleName, Rule] = {
    "none": Rule(),
    "value-gated": ValueGated(),
    "regret-only": RegretOnly(),
    "value-only": ValueOnly(),
    "success-probability": SuccessProbability(),
    "surprise": Surprise(),
    "confidence": Confidence(),
    "random": Random(),
}


#: The field of `Gate` that each rule compares with.
THRESHOLDS: dict[RuleName, str] = {
    name: rule.threshold for name, rule in RULES.items() if rule.threshold is not None
}


def value_source(rule: RuleName, value: ValueName) -> ValueName | None:
    """Where the V of a rule comes from; None when the rule has no V."""
    chosen = RULES[rule]
    return chosen.source or value if chosen.valued else None


@dataclass(frozen=True)
class Gate:
    """All that a decision depends on beside the stream; made by the trainer, frozen for a batch.

    rule: "none" never stops; "value-gated" is the paper's z > β·max(V, ε) (row 5); "regret-only" is
        z > β; "value-only" stops when V < p_star; "success-probability" is value-only with V from
        the stream; "surprise" stops when the average of -log p, smoothed as z is, exceeds β;
        "confidence" when the mean of the last `confidence_window` tokens' confidence over
        `confidence_top_k` alternatives is below `confidence` (`scores.token_confidence`); "random"
        stops at each token with probability `hazard`.
    value: where V, the chance of success, comes from: a constant, the stream's statistics, or a
        critic server.
    critic_wrong, critic_right: what the critic says of a wrong and of a right answer; V lies
        between them as it does between 0 and 1.
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
    p_star: float = 0.05
    confidence: float = 1.0
    confidence_window: int = 2048
    confidence_top_k: int = 20
    hazard: float = 0.0
    min_tokens: int = 4

    def __post_init__(self) -> None:
        for part in (self, self.statistics, self.monitor):
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
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
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

    def success(self, said: Any) -> Any:
        """V of what a critic says, a number or an array; it may leave [0, 1] as V does."""
        return (said - self.critic_wrong) / (self.critic_right - self.critic_wrong)

    @property
    def top_logprobs(self) -> int:
        """Alternatives a token whose logprobs the rule reads."""
        return RULES[self.rule].alternatives(self)
