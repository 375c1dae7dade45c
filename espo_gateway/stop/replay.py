"""Gates run over recorded rollouts: where each would have cut, and how strict a one still would.

Equal to `watch.Watch` token for token, to the last bit. Pure.

    cuts = first_stops(gate, Recorded(logprobs, max_logprobs, prompt_tokens))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.estimate import probabilities, rough_probabilities
from espo_gateway.stop.recorded import Counts, Recorded
from espo_gateway.stop.regret import Array, running_max, token_blocks
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
    return np.where(_decided(gate, recorded), rule.scores(gate, z, beside), np.nan)


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

    Equal to `first_stops` and `stop_levels`, of all limits at once.

    Args:
        limits: thresholds from strict to loose, [limits].
        logits: log V/(1 - V) at each token in the place of the gate's own V, [rollouts, tokens].
        looks: numbers of tokens, from 1, whose scores are wanted.
    """
    threshold = threshold_of(gate.rule)
    sign = 1.0 if threshold.above else -1.0
    rule, z, beside = _compared(gate, recorded, logits)
    decided = _decided(gate, recorded) & ~np.isnan(beside)
    worst = np.full(len(recorded), -np.inf)
    cuts = np.full((len(recorded), len(limits) + 1), _NEVER)
    looked_at = np.full((len(recorded), len(looks)), np.nan)
    for tokens in token_blocks(recorded.logprobs.shape):
        seen = beside[:, tokens]
        rough = rule.scores(
            gate, z[:, tokens], seen if logits is None else rough_probabilities(seen)
        )
        excess = np.where(decided[:, tokens], sign * rough, -np.inf)
        for k, token in enumerate(looks):
            if tokens.start < token <= tokens.start + excess.shape[1]:
                looked_at[:, k] = -excess[:, token - 1 - tokens.start]
        # Only a score beyond all before it can be the first to cross anything; few rollouts have
        # one in a block. What is rough may be a hair beyond, so that no such score is missed.
        rows = np.flatnonzero(excess.max(axis=1) > _hair_below(worst))
        part = excess[rows]
        before = running_max(np.column_stack([worst[rows], part[:, :-1]]))
        at, token = np.nonzero(part > _hair_below(before))
        rows, token = rows[at], token + tokens.start
        exact = beside[rows, token]
        if logits is not None:
            exact = probabilities(exact)
        found = sign * rule.scores(gate, z[rows, token], exact)
        np.maximum.at(worst, rows, found)
        crossed = np.searchsorted(-sign * limits, -found, side="right")
        new = cuts[rows, crossed] == _NEVER
        # Backwards, so that of many that cross the same limits the first one stays.
        cuts[rows[new][::-1], crossed[new][::-1]] = token[new][::-1] + 1
    cuts = np.minimum.accumulate(cuts, axis=1)[:, :-1]
    cuts[cuts == _NEVER] = 0
    levels = _levels(threshold, np.where(np.isinf(worst), np.nan, sign * worst))
    return Crossings(cuts, levels, np.where(np.isinf(looked_at), np.nan, looked_at))


def _hair_below(numbers: Array) -> Array:
    return numbers - 1e-12 * np.abs(numbers)


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


def _decided(gate: Gate, recorded: Recorded) -> NDArray[np.bool_]:
    """Where something is decided, [rollouts, tokens]."""
    decided = recorded.known.copy(order="K")
    decided[:, : gate.min_tokens - 1] = False
    if recorded.completed_at is not None:
        rows = np.flatnonzero(recorded.completed_at)
        decided[rows, recorded.completed_at[rows] - 1] = False
    return decided


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
    return probabilities(gate.estimator.logits(recorded.features))


def _levels(threshold: Threshold, scores: Array) -> Array:
    levels = threshold.level(scores)
    return np.where(np.isnan(levels), np.inf, levels)
