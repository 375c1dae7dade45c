"""Gates run over recorded rollouts: where each would have cut, and how strict a one still would.

Equal to `rules.Watch` token for token, to the last bit. Pure.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.estimate import probabilities, stream_features
from espo_gateway.stop.recorded import Recorded, recorded_regrets
from espo_gateway.stop.regret import (
    Array,
    MonitorConfig,
    RegretStatistics,
    smoothed_regret,
)
from espo_gateway.stop.rules import RULES, THRESHOLD, Gate, RuleName, Threshold

Counts = NDArray[np.int64]


def first_stops(
    gate: Gate,
    logprobs: Array,
    max_logprobs: Array,
    prompt_tokens: Array,
    *,
    completed_at: Counts | None = None,
    values: Array | None = None,
    confidences: Array | None = None,
) -> Counts:
    """The cut each rollout would have had under a gate, 0 for no stop.

    Args:
        logprobs, max_logprobs: shape [rollouts, tokens], NaN where missing or past the end
            (`monitor.pad` makes them).
        prompt_tokens: shape [rollouts].
        completed_at: length in tokens of each rollout that ended by itself, whose last token is
            exempt; 0 for the others. Shape [rollouts].
        values: V at each token where the caller has it, NaN for no answer; shape as `logprobs`.
            A critic's must be given (`Gate.success` of what it says).
        confidences: of each token, NaN where missing; shape as `logprobs`. The confidence rule
            needs them.

    Returns:
        tokens kept, shape [rollouts]: equal to `Watch.cut`.

    Raises:
        ValueError: the gate needs `values` or `confidences` that are not given.
    """
    if gate.rule == "none" or not logprobs.size:
        return np.zeros(len(logprobs), dtype=np.int64)
    replay = Replay(
        logprobs,
        max_logprobs,
        prompt_tokens,
        completed_at=completed_at,
        confidences=confidences,
    )
    scores = replay.scores(gate, values)
    name, threshold = _threshold(gate.rule)
    crossed = threshold.crossed(scores, getattr(gate, name))
    return np.where(crossed.any(axis=1), crossed.argmax(axis=1) + 1, 0)


def stop_levels(
    gate: Gate,
    logprobs: Array,
    max_logprobs: Array,
    prompt_tokens: Array,
    *,
    completed_at: Counts | None = None,
    values: Array | None = None,
    confidences: Array | None = None,
) -> Array:
    """How strict a gate would still have stopped each rollout, whatever its threshold is now.

    A rollout is stopped by those gates, alike but for the threshold, whose level (`level_of`) is
    above its own. Arguments and errors are those of `first_stops`; rule "none" is an error, too.
    When a critic's values are not given the value-gated rule takes V = ε, which max(V, ε) cannot
    undercut: a gate stops only rollouts that this says it does, but perhaps not all of them.

    Returns:
        shape [rollouts], +inf where no threshold stops the rollout.
    """
    levels = token_levels(
        gate,
        logprobs,
        max_logprobs,
        prompt_tokens,
        completed_at=completed_at,
        values=values,
        confidences=confidences,
    )
    return levels.min(axis=1, initial=np.inf)


def token_levels(
    gate: Gate,
    logprobs: Array,
    max_logprobs: Array,
    prompt_tokens: Array,
    *,
    completed_at: Counts | None = None,
    values: Array | None = None,
    confidences: Array | None = None,
) -> Array:
    """The same for each token: a gate cuts at the first whose level its own is above.

    Returns:
        shape [rollouts, tokens].
    """
    _, threshold = _threshold(gate.rule)
    if values is None and gate.rule == "value-gated" and gate.needs_critic:
        values = np.full(logprobs.shape, gate.epsilon)
    replay = Replay(
        logprobs,
        max_logprobs,
        prompt_tokens,
        completed_at=completed_at,
        confidences=confidences,
    )
    scores = replay.scores(gate, values)
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = threshold.level(scores)
    return np.where(np.isnan(levels), np.inf, levels)


def level_of(rule: RuleName, threshold: float) -> float:
    """How loose a rule's threshold is, on a scale where higher always stops more.

    -β, log p*/(1 - p*), the confidence or log hazard.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(_threshold(rule)[1].level(np.float64(threshold)))


def threshold_at(rule: RuleName, level: float) -> float:
    """The inverse of `level_of`."""
    return _threshold(rule)[1].at(level)


def _threshold(rule: RuleName) -> tuple[str, Threshold]:
    name = RULES[rule].threshold
    if name is None:
        raise ValueError(f"rule {rule!r} has no threshold")
    return name, THRESHOLD[name]


class Replay:
    """Some recorded rollouts under many gates; what gates share is worked out once.

    Arguments are those of `first_stops`.
    """

    def __init__(
        self,
        logprobs: Array,
        max_logprobs: Array,
        prompt_tokens: Array,
        *,
        completed_at: Counts | None = None,
        confidences: Array | None = None,
    ) -> None:
        # By token in memory, which is how averages run along them.
        self.logprobs = np.asfortranarray(logprobs)
        self.regrets = recorded_regrets(self.logprobs, np.asfortranarray(max_logprobs))
        self.known = ~np.isnan(self.regrets)
        self._prompt_tokens = prompt_tokens
        self._completed_at = completed_at
        self._confidences = confidences
        self._z: dict[tuple[RegretStatistics, MonitorConfig], Array] = {}

    @cached_property
    def features(self) -> Array:
        """The stream's statistics after each token, [rollouts, tokens, features]."""
        return stream_features(self.regrets, -self.logprobs, self._prompt_tokens)

    def scores(self, gate: Gate, values: Array | None = None) -> Array:
        """What the rule compares with its threshold, [rollouts, tokens]; NaN: nothing is decided.

        values: V at each token, in the place of the gate's own; a critic's must be given.

        Raises:
            ValueError: the gate needs values or confidences that there are none of.
        """
        rule = RULES[gate.rule]
        told = rule.tracks(gate, Recorded(self.logprobs, self.known, self._confidences))
        if rule.valued:
            told = values if values is not None else self._values(gate)
        z = self._smoothed(gate) if rule.compares_z or told is None else told
        scores = rule.scores(gate, z, z if told is None else told)
        known = self.known.copy(order="K")
        known[:, : gate.min_tokens - 1] = False
        if self._completed_at is not None:
            rows = np.flatnonzero(self._completed_at)
            known[rows, self._completed_at[rows] - 1] = False
        return np.where(known, scores, np.nan)

    def _smoothed(self, gate: Gate) -> Array:
        key = gate.statistics, gate.monitor
        if key not in self._z:
            self._z[key] = smoothed_regret(self.regrets, *key)
        return self._z[key]

    def _values(self, gate: Gate) -> Array:
        if gate.source == "critic":
            raise ValueError(
                "a critic's values cannot be made again: give the recorded ones as values"
            )
        if gate.source == "constant":
            return np.full_like(self.regrets, gate.constant)
        assert gate.estimator is not None
        return probabilities(gate.estimator.logits(self.features))


def crossings(rule: RuleName, scores: Array, limits: Array) -> tuple[Counts, Array]:
    """Where gates that differ only in their threshold would cut, in one look at the scores.

    Args:
        scores: as `Replay.scores` gives them, [rollouts, tokens].
        limits: thresholds from strict to loose, [limits].

    Returns:
        Tokens kept under each limit, [rollouts, limits], 0 for no stop: equal to `first_stops`.
        And how strict a gate would still have stopped each rollout, as `stop_levels`, [rollouts].
    """
    _, threshold = _threshold(rule)
    sign = 1.0 if threshold.above else -1.0
    excess = np.where(np.isnan(scores), -np.inf, sign * scores)
    highest = np.maximum.accumulate(excess, axis=1)
    # Only a score beyond all before it can be the first to cross anything.
    records = excess.copy(order="K")
    records[:, 1:] = np.where(excess[:, 1:] > highest[:, :-1], excess[:, 1:], -np.inf)
    tokens, rows = np.nonzero(~np.isneginf(records.T))
    crossed = np.searchsorted(-sign * limits, -records[rows, tokens], side="right")
    cuts = np.full((len(scores), len(limits) + 1), np.iinfo(np.int64).max)
    # Backwards, so that of many that cross the same limits the first one stays.
    cuts[rows[::-1], crossed[::-1]] = tokens[::-1] + 1
    cuts = np.minimum.accumulate(cuts, axis=1)[:, :-1]
    cuts[cuts == np.iinfo(np.int64).max] = 0
    worst = sign * highest.max(axis=1, initial=-np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = threshold.level(np.where(np.isinf(worst), np.nan, worst))
    return cuts, np.where(np.isnan(levels), np.inf, levels)
