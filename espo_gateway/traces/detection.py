"""How well stop rules find failures, counted from where each threshold cuts recorded rollouts.

Intervals are of a bootstrap over prompts: rollouts of one prompt are alike, so one that draws
rollouts would be too sure. A single prompt has none. Pure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.regret import Array
from espo_gateway.stop.threshold_control import Bound

#: Resamplings worked on at once; bounds the memory.
_BLOCK = 20
#: Shares of right rollouts lost at which savings are told, and how many right ones that takes: with
#: fewer the share is not known to be so small even where none is lost, and the most that any
#: threshold saves there is chance.
RIGHT_LOST = {lost: math.ceil(Bound(limit=lost).needed) for lost in (0.05, 0.1)}


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; NaN where there is nothing to count."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: Array) -> Estimate:
        usable = draws[np.isfinite(draws)]
        if not np.isfinite(value) or not usable.size:
            return cls(float(value), np.nan, np.nan)
        low, high = np.quantile(usable, [0.025, 0.975])
        return cls(float(value), float(low), float(high))


@dataclass(frozen=True)
class Judged:
    """Rollouts of known outcome; all of shape [rollouts].

    prompts: number of each one's prompt, from 0. weights: how many rollouts each stands for.
    sessions: whose turns share an outcome, 0 for one of its own; None: all have their own.
    """

    prompts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    prompt_tokens: Array
    correct: NDArray[np.bool_]
    weights: Array
    sessions: NDArray[np.uint32] | None = None

    def where(self, rows: NDArray[np.bool_]) -> Judged:
        prompts = np.unique(self.prompts[rows], return_inverse=True)[1]
        return Judged(
            prompts=prompts,
            lengths=self.lengths[rows],
            prompt_tokens=self.prompt_tokens[rows],
            correct=self.correct[rows],
            weights=self.weights[rows],
        )

    @property
    def success(self) -> Array:
        """The success rate of each prompt, [prompts]."""
        right = np.bincount(self.prompts, self.weights * self.correct)
        return right / np.bincount(self.prompts, self.weights)


@dataclass(frozen=True)
class Curve:
    """What each threshold does, from strict to loose; shape [thresholds, 3]: value, low, high.

    saved: share of all tokens. false: of the stopped rollouts, the share that would have been
    right. false_positive_rate: of the right ones, the share stopped. recall: of the failures, the
    share stopped. position: mean cut as a share of the full length. before_end: mean tokens that
    a stop spares, whatever was asked. saved_at: by the share of right rollouts lost, the most that
    any threshold saves at that or less; NaN where too few are right to tell (`RIGHT_LOST`).
    """

    stopped: Array
    saved: Array
    false: Array
    false_positive_rate: Array
    recall: Array
    position: Array
    before_end: Array
    saved_at: dict[str, Estimate] = field(default_factory=dict)


def curve(
    judged: Judged,
    cuts: NDArray[np.int32],
    cost: Array | None = None,
    *,
    draws: int,
    seed: int = 0,
) -> Curve:
    """Count where thresholds cut.

    Args:
        cuts: tokens kept under each threshold, 0 for no stop, [rollouts, thresholds].
        cost: of the questions asked by then, in tokens, which what is saved is less of; as cuts.
        draws: resamplings of the bootstrap.
    """
    weights = judged.weights
    lengths = np.maximum(judged.lengths, 1)

    def by_prompt(numbers: NDArray[Any]) -> Array:
        return np.bincount(judged.prompts, weights * numbers).astype(float)

    ones: NDArray[Any] = np.ones(len(weights))
    totals = np.stack(
        [by_prompt(n) for n in (ones, lengths, judged.correct, ~judged.correct)], axis=1
    )
    sums = np.empty((totals.shape[0], 5, cuts.shape[1]))
    for k, cut in enumerate(cuts.T):
        stopped = cut > 0
        sums[:, 0, k] = by_prompt(stopped)
        sums[:, 1, k] = by_prompt(stopped & judged.correct)
        sums[:, 2, k] = by_prompt(np.where(stopped, lengths - cut, 0))
        sums[:, 3, k] = by_prompt(np.where(stopped, cut / lengths, 0))
        sums[:, 4, k] = 0.0 if cost is None else by_prompt(cost[:, k])
    whole = _rates(totals.sum(axis=0)[None], sums.sum(axis=0)[None])[:, 0]
    resampled = [
        _rates(block @ totals, np.tensordot(block, sums, axes=1).astype(float))
        for block in _resampled(totals.shape[0], draws, seed)
    ]
    drawn = np.concatenate(resampled, axis=1)
    out = np.full((*whole.shape, 3), np.nan)
    out[..., 0] = whole
    for name, number in np.ndindex(*whole.shape):
        estimate = Estimate.of(float(whole[name, number]), drawn[name, :, number])
        out[name, number, 1:] = estimate.low, estimate.high
    right = int(judged.correct.sum())
    found = dataclasses.replace(Curve(*out), saved_at=_saved_at(whole, drawn, right))
    if len(totals) == 1:
        return found
    # Where none was seen a resampling sees none either: the exact bound, of prompts.
    for k in np.flatnonzero(found.false[:, 0] == 0.0):
        found.false[k, 2] = 1.0 - 0.025 ** (1.0 / np.count_nonzero(sums[:, 0, k]))
    for k in np.flatnonzero(found.false_positive_rate[:, 0] == 0.0):
        found.false_positive_rate[k, 2] = 1.0 - 0.025 ** (1.0 / np.count_nonzero(totals[:, 2]))
    return found


def _saved_at(whole: Array, drawn: Array, right: int) -> dict[str, Estimate]:
    def most(rates: Array, lost: float) -> Array:
        saved, share = rates[1], rates[3]
        found = np.where(share <= lost, saved, 0.0).max(axis=-1)
        return np.where(np.isnan(share).any(axis=-1) | (right < RIGHT_LOST[lost]), np.nan, found)

    return {
        f"{lost:.2f}": Estimate.of(float(most(whole, lost)), most(drawn, lost))
        for lost in RIGHT_LOST
    }


def _rates(totals: Array, sums: Array) -> Array:
    """[draws, 4] and [draws, 5, thresholds] to the fields of `Curve`, [7, draws, thresholds]."""
    rollouts, tokens, right, failed = (totals[:, i, None] for i in range(4))
    stopped, false, spared, position, cost = (sums[:, i] for i in range(5))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack(
            [
                stopped / rollouts,
                (spared - cost) / tokens,
                false / stopped,
                false / right,
                (stopped - false) / failed,
                position / stopped,
                spared / stopped,
            ]
        )


def area(judged: Judged, levels: Array, *, draws: int, seed: int = 0) -> Estimate:
    """Area under the ROC curve of each rollout's worst score as a detector of failure.

    levels: as `stop_levels`: lower is worse, [rollouts].
    """
    order = np.argsort(levels, kind="stable")
    prompts, weights = judged.prompts[order], judged.weights[order]
    correct = judged.correct[order]
    first, after = _ties(levels[order])

    def of(weights: Array) -> Array:
        right = np.where(correct, weights, 0.0)
        sums = np.zeros((len(weights), weights.shape[1] + 1))
        np.cumsum(right, axis=1, out=sums[:, 1:])
        total = sums[:, -1:]
        # What a failure is beaten by: the right ones above it, and half of those beside it.
        beaten = total - 0.5 * (sums[:, first] + sums[:, after])
        failed = weights - right
        with np.errstate(invalid="ignore"):
            return (failed * beaten).sum(axis=1) / (failed.sum(axis=1) * total[:, 0])

    count = int(judged.prompts.max(initial=-1)) + 1
    drawn = [of(weights * block[:, prompts]) for block in _resampled(count, draws, seed)]
    # Pairs that share no prompt are independent.
    apart = min(count // 2, *(np.unique(prompts[rows]).size for rows in (correct, ~correct)))
    return _of_pairs(float(of(weights[None])[0]), np.concatenate(drawn), apart)


def _of_pairs(value: float, drawn: Array, apart: int) -> Estimate:
    """apart: how many of the pairs, at least, are independent."""
    found = Estimate.of(value, drawn)
    if value not in (0.0, 1.0) or math.isnan(found.low):
        return found
    # Where all are in order they are so in a resampling, too: the exact bound.
    tail = 0.025 ** (1.0 / apart)
    return Estimate(1.0, tail, 1.0) if value else Estimate(0.0, 0.0, 1.0 - tail)


def _ties(*keys: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of sorted rows, where the run of those that are alike begins for each, and where it ends."""
    count = len(keys[0])
    new = np.zeros(count, dtype=bool)
    for key in keys:
        new[1:] |= key[1:] != key[:-1]
    new[:1] = True
    starts = np.flatnonzero(new)
    run = np.cumsum(new) - 1
    return starts[run], np.append(starts[1:], count)[run]


def area_within(judged: Judged, levels: Array, *, draws: int, seed: int = 0) -> Estimate:
    """`area` over pairs of rollouts of one prompt: does it tell the rollout, or only the problem?

    NaN where no prompt has both right and wrong rollouts.
    """
    won, pairs = pairs_within(judged.prompts, judged.correct, judged.weights, levels)
    with np.errstate(invalid="ignore"):
        drawn = [block @ won / (block @ pairs) for block in _resampled(len(won), draws, seed)]
        value = float(won.sum() / pairs.sum())
        return _of_pairs(value, np.concatenate(drawn), int((pairs > 0).sum()))


def pairs_within(
    prompts: NDArray[np.int64], correct: NDArray[np.bool_], weights: Array, levels: NDArray[Any]
) -> tuple[Array, Array]:
    """Of each prompt's pairs of a right and a wrong rollout, those told apart, and all.

    Args:
        prompts: numbers of them; levels: at which each would be stopped. All [rollouts].

    Returns:
        [prompts] each, weighted.
    """
    # By prompt, and by level within it: a right one beats the wrong ones that come before.
    order = np.lexsort((levels, prompts))
    prompts, levels = prompts[order], levels[order]
    right, weights = correct[order], weights[order]
    count = int(prompts.max(initial=-1)) + 1
    starts = np.searchsorted(prompts, np.arange(count))
    sums = np.concatenate([[0.0], np.cumsum(weights * ~right)])
    before = sums[starts][prompts]
    first, after = _ties(prompts, levels)
    lower = sums[first] - before
    ties = sums[after] - before - lower
    mine, theirs, won = (
        np.bincount(prompts, each, count).astype(float)
        for each in (weights * right, weights * ~right, weights * right * (lower + 0.5 * ties))
    )
    return won, mine * theirs


def _resampled(prompts: int, draws: int, seed: int) -> Iterator[Array]:
    """How often each prompt was drawn, [draws, prompts] in blocks; the same for all rules.

    NaN where there is but one: nothing tells how much another would differ.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, draws, _BLOCK):
        size = min(_BLOCK, draws - start)
        drawn = rng.integers(0, prompts, (size, prompts))
        if prompts == 1:
            yield np.full((size, 1), np.nan)
            continue
        yield np.stack([np.bincount(row, minlength=prompts) for row in drawn]).astype(float)


def difficulty(judged: Judged) -> list[tuple[str, NDArray[np.bool_]]]:
    """Bins by the prompt's own success rate, or by its length where prompts have one rollout."""
    rollouts = np.bincount(judged.prompts)
    if np.mean(rollouts > 1) >= 0.5:
        rates = judged.success[judged.prompts]
        bins = [
            ("never right", rates == 0.0),
            ("right up to 1/3", (rates > 0.0) & (rates <= 1 / 3)),
            ("1/3 to 2/3", (rates > 1 / 3) & (rates <= 2 / 3)),
            ("over 2/3", (rates > 2 / 3) & (rates < 1.0)),
            ("always right", rates == 1.0),
        ]
    else:
        tokens = judged.prompt_tokens
        low, high = np.nanquantile(tokens, [1 / 3, 2 / 3])
        bins = [
            (f"prompt up to {low:.0f} tokens", tokens <= low),
            (f"prompt up to {high:.0f}", (tokens > low) & (tokens <= high)),
            (f"prompt over {high:.0f}", tokens > high),
        ]
    return [(name, rows) for name, rows in bins if rows.any()]
