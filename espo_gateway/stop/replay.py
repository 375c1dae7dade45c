"""Gates run over recorded rollouts: where each would have cut, and how strict a one still would.

Equal to `watch.Watch` token for token, to the last bit. Pure.

    cuts = first_stops(gate, Recorded(logprobs, max_logprobs, prompt_tokens))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.estimate import SuccessEstimator, probabilities, rough_probabilities
from espo_gateway.stop.recorded import Counts, Recorded
from espo_gateway.stop.regret import Array, token_blocks
from espo_gateway.stop.rules import RULES, Gate, Rule, Threshold, threshold_of

_NEVER = np.iinfo(np.int64).max


def scores(gate: Gate, recorded: Recorded, values: Array | None = None) -> Array:
    """What the rule compares with its threshold, [rollouts, tokens]; NaN: nothing is decided.

    Args:
        values: V at each token in the place of the gate's own, NaN for no answer,
            [rollouts, tokens].

    Raises:
        ValueError: the gate needs a critic's values, or confidences, that were not recorded.
    """
    rule, z, beside = _compared(gate, recorded, values)
    return np.where(decisive(gate, recorded), rule.scores(gate, z, beside), np.nan)


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


@dataclass(frozen=True)
class Crossings:
    """What gates that differ only in their threshold would do; see `crossings`.

    cuts: tokens kept under each limit, 0 for no stop, [rollouts, limits].
    levels: how strict a gate would still have stopped each rollout, [rollouts].
    looked_at: the score at each token that was asked for, negative where the rule stops above its
        threshold, so that lower is worse; NaN where nothing is decided, [rollouts, asked for].
    """

    cuts: Counts
    levels: Array
    looked_at: Array


def crossings(
    gate: Gate,
    recorded: Recorded,
    limits: Array,
    logits: Array | None = None,
    looks: Sequence[int] = (),
) -> Crossings:
    """Where gates that differ only in their threshold would cut, in one look at the scores.

    Equal to `first_stops` of all limits at once; levels are those of `stop_levels` but for the last
    bits of an estimate.

    Args:
        limits: thresholds from strict to loose, [limits].
        logits: log V/(1 - V) at each token in the place of the gate's own V, [rollouts, tokens].
        looks: numbers of tokens, from 1, whose scores are wanted.
    """
    threshold = threshold_of(gate.rule)
    sign = 1.0 if threshold.above else -1.0
    rule, z, beside = _compared(gate, recorded, logits)
    decided = decisive(gate, recorded)
    worst = np.full(len(recorded), -np.inf)
    cuts = np.full((len(recorded), len(limits)), _NEVER)
    looked_at = np.full((len(recorded), len(looks)), np.nan)
    # From loose to strict; how many of them each rollout has crossed, and from where on a rough
    # score may be beyond the next.
    ahead = sign * limits[::-1]
    near = np.append(ahead - 1e-12 * np.abs(ahead), np.inf)
    reached = np.zeros(len(recorded), dtype=np.int64)
    for tokens in token_blocks(recorded.logprobs.shape):
        seen = beside[:, tokens]
        if logits is not None:
            seen = rough_probabilities(seen)
        excess = sign * rule.scores(gate, z[:, tokens], seen)
        excess = np.where(decided[:, tokens] & (excess == excess), excess, -np.inf)
        for k, token in enumerate(looks):
            if tokens.start < token <= tokens.stop:
                looked_at[:, k] = -excess[:, token - 1 - tokens.start]
        highest = excess.max(axis=1)
        np.maximum(worst, highest, out=worst)
        # The first token beyond the next limit, then that beyond the one after it, ...
        rows = np.flatnonzero(highest > near[reached])
        while rows.size:
            beyond = excess[rows] > near[reached[rows], None]
            rows, beyond = rows[there := beyond.any(axis=1)], beyond[there]
            place = beyond.argmax(axis=1)
            token = tokens.start + place
            exact = beside[rows, token]
            if logits is not None:
                exact = probabilities(exact)
            found = sign * rule.scores(gate, z[rows, token], exact)
            crossed = np.searchsorted(ahead, found)
            new = crossed > reached[rows]
            cuts[rows[new], len(limits) - crossed[new]] = token[new] + 1
            reached[rows[new]] = crossed[new]
            # What is near it may not be beyond it.
            excess[rows, place] = -np.inf
    cuts = np.minimum.accumulate(cuts, axis=1)
    cuts[cuts == _NEVER] = 0
    levels = _levels(threshold, np.where(np.isinf(worst), np.nan, sign * worst))
    return Crossings(cuts, levels, np.where(np.isinf(looked_at), np.nan, looked_at))


def _compared(gate: Gate, recorded: Recorded, values: Array | None) -> tuple[Rule, Array, Array]:
    """The rule and what its scores are made of: z where it looks at it, and what stands beside."""
    rule = RULES[gate.rule]
    beside = rule.tracks(gate, recorded)
    if rule.valued:
        beside = _values(gate, recorded) if values is None else values
    if rule.compared == "z" or beside is None:
        z = recorded.z(gate.statistics, gate.monitor)
        return rule, z, z if beside is None else beside
    return rule, beside, beside


def decisive(gate: Gate, recorded: Recorded) -> NDArray[np.bool_]:
    """Where something is decided, [rollouts, tokens]."""
    decided = recorded.known.copy(order="K")
    decided[:, : gate.min_tokens - 1] = False
    if recorded.completed_at is not None:
        ends = np.atleast_2d(recorded.completed_at.T).T
        rows, turns = np.nonzero(ends)
        decided[rows, ends[rows, turns] - 1] = False
    if gate.asks_estimate:
        scheduled = np.zeros(decided.shape[1], dtype=bool)
        scheduled[gate.schedule.tokens(decided.shape[1]) - 1] = True
        decided &= scheduled
    return decided


def estimated(estimator: SuccessEstimator, recorded: Recorded) -> Array:
    """log P/(1-P) at each token, [rollouts, tokens]; NaN where a source has not answered."""
    told = recorded.told(estimator.sources)
    logits = np.empty(recorded.logprobs.shape, order="F")
    for tokens, features in recorded.feature_blocks():
        beside = None if told is None else told[:, tokens]
        logits[:, tokens] = estimator.logits(features, beside)
    return logits


def gate_logits(gate: Gate, recorded: Recorded) -> Array:
    """log V/(1-V) of a gate's estimate at each token, [rollouts, tokens].

    Where the free one leaves no decision to the one that asks, it stands.
    """
    assert gate.estimator is not None
    logits = estimated(gate.estimator, recorded)
    if gate.free is None or not gate.estimator.asks:
        return logits
    free = estimated(gate.free, recorded)
    return np.where(probabilities(free) < gate.schedule.below, logits, free)


def _values(gate: Gate, recorded: Recorded) -> Array:
    if gate.source == "constant":
        return np.full_like(recorded.regrets, gate.constant)
    if gate.source == "critic":
        if recorded.critic is None:
            raise ValueError(
                "a critic's values cannot be made again: give the recorded ones as values"
            )
        return gate.success(recorded.critic)
    return probabilities(gate_logits(gate, recorded))


def _levels(threshold: Threshold, scores: Array) -> Array:
    levels = threshold.level(scores)
    return np.where(np.isnan(levels), np.inf, levels)
