"""Gates run over recorded rollouts: where each would have cut, and how strict a one still would.

Equal to `watch.Watch` token for token, to the last bit. Pure.

    cuts = first_stops(gate, Recorded(logprobs, max_logprobs, prompt_tokens))
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.estimate import SuccessEstimator, probabilities
from espo_gateway.stop.recorded import Counts, Recorded
from espo_gateway.stop.regret import Array
from espo_gateway.stop.rules import RULES, Gate, Threshold, threshold_of


def scores(gate: Gate, recorded: Recorded, values: Array | None = None) -> Array:
    """What the rule compares with its threshold, [rollouts, tokens]; NaN: nothing is decided.

    Args:
        values: V at each token in the place of the gate's own, NaN for no answer,
            [rollouts, tokens].

    Raises:
        ValueError: the gate needs a critic's values, or confidences, that were not recorded.
    """
    rule = RULES[gate.rule]
    beside = rule.tracks(gate, recorded)
    if rule.valued:
        beside = _values(gate, recorded) if values is None else values
        if gate.asks_estimate:
            beside = np.where(_asked(gate, recorded), beside, np.nan)
    if rule.compared == "z" or beside is None:
        z = recorded.z(gate.statistics, gate.monitor)
        found = rule.scores(gate, z, z if beside is None else beside)
    else:
        found = rule.scores(gate, beside, beside)
    decided = recorded.known.copy(order="K")
    decided[:, : gate.min_tokens - 1] = False
    if recorded.completed_at is not None:
        rows = np.flatnonzero(recorded.completed_at)
        decided[rows, recorded.completed_at[rows] - 1] = False
    return np.where(decided, found, np.nan)


def first_stops(gate: Gate, recorded: Recorded, values: Array | None = None) -> Counts:
    """The cut each rollout would have had under a gate, 0 for no stop.

    Arguments and errors are those of `scores`.

    Returns:
        tokens kept, [rollouts]: equal to `Watch.cut`.
    """
    if gate.rule == "none" or not recorded.logprobs.size:
        return np.zeros(len(recorded), dtype=np.int64)
    threshold = threshold_of(gate.rule)
    crossed = threshold.crossed(scores(gate, recorded, values), threshold.of(gate))
    return np.where(crossed.any(axis=1), crossed.argmax(axis=1) + 1, 0)


def token_levels(gate: Gate, recorded: Recorded, values: Array | None = None) -> Array:
    """How strict a gate would still have stopped at each token, whatever its threshold is now.

    A gate cuts at the first token whose level its own (`Threshold.level`) is above. Arguments and
    errors are those of `scores`; rule "none" is an error, too. Where a critic's values were not
    recorded the value-gated rule takes V = ε, which max(V, ε) cannot undercut: a gate stops only
    rollouts that this says it does, but perhaps not all of them.

    Returns:
        [rollouts, tokens], +inf where no threshold stops.
    """
    threshold = threshold_of(gate.rule)
    unknown = values is None and recorded.critic is None
    if unknown and gate.rule == "value-gated" and gate.needs_critic:
        values = np.full(recorded.logprobs.shape, gate.epsilon)
    return _levels(threshold, scores(gate, recorded, values))


def stop_levels(gate: Gate, recorded: Recorded, values: Array | None = None) -> Array:
    """The least of `token_levels` of each rollout, [rollouts]: those above it stop it."""
    return token_levels(gate, recorded, values).min(axis=1, initial=np.inf)


def crossings(threshold: Threshold, scores: Array, limits: Array) -> tuple[Counts, Array]:
    """Where gates that differ only in their threshold would cut, in one look at the scores.

    Args:
        scores: as `scores` gives them, [rollouts, tokens].
        limits: thresholds from strict to loose, [limits].

    Returns:
        Tokens kept under each limit, [rollouts, limits], 0 for no stop: equal to `first_stops`.
        And how strict a gate would still have stopped each rollout, as `stop_levels`, [rollouts].
    """
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
    return cuts, _levels(threshold, np.where(np.isinf(worst), np.nan, worst))


def _values(gate: Gate, recorded: Recorded) -> Array:
    if gate.source == "constant":
        return np.full_like(recorded.regrets, gate.constant)
    if gate.source == "critic":
        if recorded.critic is None:
            raise ValueError(
                "a critic's values cannot be made again: give the recorded ones as values"
            )
        return gate.success(recorded.critic)
    assert gate.estimator is not None
    return probabilities(estimated(gate.estimator, recorded))


def estimated(estimator: SuccessEstimator, recorded: Recorded) -> Array:
    """log P/(1-P) at each token, [rollouts, tokens]; NaN where a source has not answered."""
    return estimator.logits(recorded.features, recorded.told(estimator.sources))


def _asked(gate: Gate, recorded: Recorded) -> NDArray[np.bool_]:
    """Where the gate's sources are asked, [rollouts, tokens]."""
    asked = np.zeros(recorded.logprobs.shape, dtype=bool)
    asked[:, gate.schedule.tokens(asked.shape[1]) - 1] = True
    if gate.free is not None:
        asked &= probabilities(estimated(gate.free, recorded)) < gate.schedule.below
    return asked


def _levels(threshold: Threshold, scores: Array) -> Array:
    levels = threshold.level(scores)
    return np.where(np.isnan(levels), np.inf, levels)
