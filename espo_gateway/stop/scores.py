"""The stop rules: what each compares with which threshold, in a live stream and over recorded ones.

A rule is a class here, a name in `RuleName` and a line in `RULES`; gate, live stream, replay and
trainer read all else off it. A rule's score is made of z and of what it is told beside: V, or the
number that a track of its own keeps. Live and replayed scores are equal to the last bit. Pure.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.estimate import sigmoid
from espo_gateway.stop.regret import MISSING_LOGPROB, Array, moving_average
from espo_gateway.stop.tracks import StreamChance, stream_draws

if TYPE_CHECKING:
    from espo_gateway.stop.rules import Gate

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


class Track(Protocol):
    """What a rule follows in a live stream beside z."""

    def push(self, logprob: float, confidence: float | None) -> float:
        """Take the next token and return the score; NaN where there is nothing to decide by."""


@dataclass(frozen=True)
class Recorded:
    """Rollouts to replay, shape [rollouts, tokens]; known: where g is a number."""

    logprobs: Array
    known: NDArray[np.bool_]
    confidences: Array | None


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


class MeanSurprise:
    """Exponential average of -log p of the sampled tokens, from 0."""

    __slots__ = ("_decay", "_mean")

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._mean = 0.0

    def push(self, logprob: float, confidence: float | None) -> float:
        self._mean = self._decay * self._mean + (1.0 - self._decay) * -logprob
        return self._mean


class WindowedConfidence:
    """Mean of the last tokens' confidence (DeepConf, arXiv 2508.15260).

    Keeps running sums, so that a token costs the same whatever the window, and the rounding error
    does not build up.
    """

    __slots__ = ("_sums", "_total")

    def __init__(self, window: int) -> None:
        self._total = 0.0
        self._sums = deque([0.0], maxlen=window + 1)

    def push(self, logprob: float, confidence: float | None) -> float:
        if confidence is None or not -math.inf < confidence < math.inf:
            return math.nan
        self._total += confidence
        self._sums.append(self._total)
        return (self._total - self._sums[0]) / (len(self._sums) - 1)


def _window_means(values: Array, window: int) -> Array:
    """`WindowedConfidence` of a whole stream, shape [tokens]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def token_confidence(alternatives: Sequence[float | None], top_k: int) -> float | None:
    """C_t = -(1/k) Σ log P of the k likeliest alternatives at a position, in nats (DeepConf).

    Args:
        alternatives: their logprobs in any order; the sampled token may be one of them.

    Returns:
        None when there are fewer than k, or one is missing, a placeholder or no number.
    """
    if len(alternatives) < top_k:
        return None
    numbers = []
    for logprob in alternatives:
        if logprob is None or not MISSING_LOGPROB < logprob < math.inf:
            return None
        numbers.append(logprob)
    numbers.sort(reverse=True)
    return -math.fsum(numbers[:top_k]) / top_k
