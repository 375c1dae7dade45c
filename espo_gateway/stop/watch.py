"""One live stream under a gate: the decision, token by token.

A decision is a function of the stream's tokens and values alone, never of timing, so a replay of
recorded rollouts (`replay.py`) gives the decisions that a live stream had. Pure.

    watch = Watch(Gate(rule="value-gated", beta=2.0), prompt_tokens=12)
    for logprob, max_logprob in stream:
        if watch.push(logprob, max_logprob) is Verdict.STOP:
            break   # the rollout ends at token watch.cut
"""

from __future__ import annotations

import enum
import math
from array import array
from typing import NamedTuple

from espo_gateway.stop.estimate import StreamStatistics, sigmoid
from espo_gateway.stop.regret import MISSING_LOGPROB
from espo_gateway.stop.rules import RULES, Gate
from espo_gateway.stop.told import Answers, told_features


class Verdict(enum.Enum):
    """What a token leads to."""

    GO = "go"
    STOP = "stop"
    #: Only V can tell, and it must be asked for: answer with `Watch.settle`.
    ASK = "ask"


_GO = Verdict.GO


class Earlier(NamedTuple):
    """The turns of a rollout before this one, which a watch goes on from.

    prompt_tokens: of the first. The others: of all tokens sampled since, NaN where missing.
    """

    prompt_tokens: int
    logprobs: array[float]
    max_logprobs: array[float]
    confidences: array[float] | None


class Watch:
    """One stream under a gate. After a stop, further tokens are counted and change nothing."""

    __slots__ = (
        "_alone",
        "_asked_throughout",
        "_asks_estimate",
        "_before",
        "_clip",
        "_deviations",
        "_due",
        "_floor",
        "_follows",
        "_history",
        "_keep",
        "_limit",
        "_mean",
        "_min_tokens",
        "_move",
        "_rule",
        "_source",
        "_threshold",
        "_track",
        "_unsettled",
        "cut",
        "gate",
        "missing",
        "regret",
        "statistics",
        "threshold",
        "tokens",
        "told",
        "value",
        "z",
    )

    def __init__(
        self,
        gate: Gate,
        prompt_tokens: int,
        *,
        decides: bool = True,
        history: float | None = None,
        asks: bool = True,
        audited: bool = False,
        earlier: Earlier | None = None,
    ) -> None:
        """
        prompt_tokens: with earlier turns, the first one's stands.
        decides: else it follows the stream to its end and stops nothing.
        history: what the source of that name tells of the prompt.
        asks: whether there is a source to ask on the gate's schedule. audited: it goes on to its
            end whatever is decided, and all of the schedule is asked about: else an estimate that
            asks would be fitted only where the one that does not leaves it a decision.
        earlier: turns that belong to the same rollout, in which all has been decided. Tokens, and
            the cut, are counted from here on; all else is as if it were one stream.
        """
        self.gate = gate
        self.tokens = 0
        #: tokens whose logprobs were missing or no numbers
        self.missing = 0
        #: number of tokens kept: the decision token is the last of them; None while going on
        self.cut: int | None = None
        self.z = 0.0
        self.threshold: float | None = None
        self.value: float | None = None
        #: g of the last token; None when it is missing
        self.regret: float | None = None
        #: by token that was asked about: z, and the stream's features where an estimate waits;
        #: None where nothing is decided by the answers, which are only to be recorded
        self._unsettled: dict[int, tuple[float, tuple[float, ...]] | None] = {}
        self._min_tokens = gate.min_tokens
        # Of rows 3 and 4.
        self._mean = gate.statistics.mean
        self._deviations = 1.0 / math.sqrt(gate.statistics.variance + gate.monitor.delta)
        self._clip = gate.monitor.clip
        self._keep = gate.monitor.smoothing
        self._move = 1.0 - gate.monitor.smoothing
        self._rule = rule = RULES[gate.rule]
        self._source = gate.source
        self._floor = rule.floor(gate) if decides else math.inf
        self._threshold = threshold = rule.threshold
        self._limit = 0.0 if threshold is None else threshold.of(gate)
        if earlier is not None:
            prompt_tokens = earlier.prompt_tokens
        self.statistics = StreamStatistics(prompt_tokens) if self._source == "stream" else None
        self._track = rule.track(gate)
        self._history: Answers = {} if history is None else {"history": (history,)}
        self._asks_estimate = gate.asks_estimate
        self._asked_throughout = audited or not self._asks_estimate
        #: the estimate that asks nobody, and what it is told, which is known from the start
        self._alone = gate.free if self._asks_estimate else gate.estimator
        self.told = told_features(self._alone.sources, self._history, 0) if self._alone else []
        #: the next token of the schedule
        self._due = gate.schedule.after(0) if asks and decides else 0
        self._follows = bool(self.statistics or self._track or self._due)
        #: tokens of earlier turns
        self._before = 0
        if earlier is not None:
            self._go_on_from(earlier)

    def _go_on_from(self, earlier: Earlier) -> None:
        _, logprobs, max_logprobs, confidences = earlier
        for token, (logprob, largest) in enumerate(zip(logprobs, max_logprobs, strict=True)):
            confidence = None if confidences is None else confidences[token]
            self.push(logprob, largest, last=True, confidence=confidence)
        self._before = before = self.tokens
        self._min_tokens -= before
        self._due -= before if self._due else 0
        self.tokens = self.missing = 0

    def _next_due(self, token: int) -> int:
        return self.gate.schedule.after(self._before + token) - self._before

    def push(
        self,
        logprob: float | None,
        max_logprob: float | None,
        *,
        last: bool = False,
        confidence: float | None = None,
    ) -> Verdict:
        """Take the next token's logprob and the largest logprob at its position.

        last: the token completes the rollout, so stopping there would save nothing, and turn a
            finished rollout into a failure: no decision is taken.
        confidence: the position's, for the rule that needs it; None where it is not known.
        """
        self.tokens = token = self.tokens + 1
        if self.cut is not None:
            return self._asked_on() if token == self._due else _GO
        # Rows 1, 3 and 4 written out: as calls they would cost more than all the rest of a token
        # that does not stop.
        if (
            logprob is None
            or max_logprob is None
            or not MISSING_LOGPROB < logprob < math.inf
            or not MISSING_LOGPROB < max_logprob < math.inf
        ):
            self.missing += 1
            self.regret = None
            if self.statistics is not None:
                self.statistics.push(None, None)
            if token == self._due:
                self._due = self._next_due(token)
            return _GO
        regret = max_logprob - logprob
        if regret < 0.0:
            regret = 0.0
        self.regret = regret
        step = (regret - self._mean) * self._deviations
        clip = self._clip
        if step > clip:
            step = clip
        elif step < -clip:
            step = -clip
        self.z = z = self._keep * self.z + self._move * step
        if self._follows:
            return self._follow(token, z, logprob, regret, confidence, last)
        if z <= self._floor or last or token < self._min_tokens:
            return _GO
        return self._decide(token, z, self._before + token, False)

    def _follow(
        self,
        token: int,
        z: float,
        logprob: float,
        regret: float,
        confidence: float | None,
        last: bool,
    ) -> Verdict:
        """For the rules that look at more than z."""
        v: float = self._before + token
        if self.statistics is not None:
            self.statistics.push(regret, -logprob)
        if self._track is not None:
            v = self._track.push(logprob, confidence)
        due = token == self._due
        verdict = _GO
        if not (z <= self._floor or last or token < self._min_tokens):
            verdict = self._decide(token, z, v, due)
        if due:
            self._due = self._next_due(token)
            if verdict is _GO and not last and self._asked_throughout:
                self._unsettled[token] = None
                return Verdict.ASK
        return verdict

    def _asked_on(self) -> Verdict:
        """Past the cut, where an audit goes on to the end: what is answered is only recorded."""
        self._due = self._next_due(self.tokens)
        self._unsettled[self.tokens] = None
        return Verdict.ASK

    def _decide(self, token: int, z: float, v: float, due: bool) -> Verdict:
        source = self._source
        if source is None:
            return self._compare(token, z, v, None)
        if self._asks_estimate:
            if not due:
                return _GO
            if self._alone is not None:
                free = self._alone_value()
                if not free < self.gate.schedule.below:
                    return self._compare(token, z, free, free)
            assert self.statistics is not None
            self._unsettled[token] = z, self.statistics.features()
            return Verdict.ASK
        if source != "critic":
            value = self._known_value()
            return self._compare(token, z, value, value)
        # Asked lazily: if V = 0 would not stop the stream, no V does.
        if not self._crossed(self._rule.score(self.gate, z, 0.0)):
            return _GO
        self._unsettled[token] = z, ()
        return Verdict.ASK

    @property
    def due(self) -> int:
        """The next token that a source is to be asked about; 0: none."""
        return self._due

    def valued(self, token: int, answers: Answers) -> float | None:
        """V at a token that was asked about, of what the sources have answered; None: unknown."""
        if self._source == "critic" and "critic" in answers:
            [said] = answers["critic"]
            value: float = self.gate.success(said)
            return value
        unsettled, estimator = self._unsettled[token], self.gate.estimator
        if unsettled is None or not unsettled[1] or estimator is None:
            return None
        features = unsettled[1]
        told = told_features(estimator.sources, {**self._history, **answers}, self._before + token)
        value = sigmoid(estimator.logit(features, told))
        return None if math.isnan(value) else value

    @property
    def settled(self) -> bool:
        """Whether no value is outstanding that could still move the cut forward."""
        return self.cut is None or not any(token < self.cut for token in self._unsettled)

    def settle(self, token: int, value: float | None) -> Verdict:
        """Answer an ASK: V at that token, or None when no answer could be had (then no stop).

        Answers may come late and out of order; the cut is the first token that says stop, so it is
        known once `settled`.
        """
        unsettled = self._unsettled.pop(token)
        if unsettled is None or value is None:
            return _GO
        return self._compare(token, unsettled[0], value, value)

    def look(self) -> tuple[float | None, float, float | None, float | None]:
        """g, z, threshold and V at the last token, or at the cut; made only when asked for.

        g is None when it is missing. The threshold is that of the record (in units of z where the
        rule compares z); None under rule "none". V is None where the rule has none and where only
        a critic knows it: the threshold is then the least it could be.
        """
        if self.cut is not None:
            return self.regret, self.z, self.threshold, self.value
        value = self.estimate
        return self.regret, self.z, self._rule.bound(self.gate, value or 0.0), value

    @property
    def estimate(self) -> float | None:
        """V at the last token; None where the rule has none, or it must be asked for."""
        asked = self._source in (None, "critic") or self._asks_estimate
        return None if asked else self._known_value()

    def _crossed(self, score: float) -> bool:
        # Written out, as the call is most of its cost.
        threshold = self._threshold
        assert threshold is not None
        return score > self._limit if threshold.above else score < self._limit

    def _compare(self, token: int, z: float, v: float, value: float | None) -> Verdict:
        if not self._crossed(self._rule.score(self.gate, z, v)):
            return _GO
        if self.cut is None or token < self.cut:
            self.cut, self.z, self.value = token, z, value
            self.threshold = self._rule.bound(self.gate, v)
        return Verdict.STOP

    def _known_value(self) -> float:
        if self._source == "constant":
            return self.gate.constant
        return self._alone_value()

    def _alone_value(self) -> float:
        """V by what costs nothing."""
        assert self.statistics is not None
        assert self._alone is not None
        return sigmoid(self._alone.logit(self.statistics.features(), self.told))
