"""How the threshold of a stop rule moves between batches. Pure.

Works on levels (`rules.Threshold.level`): -β, log p*/(1 - p*) or log hazard, where higher always
stops more, and where each rollout has a level of its own, above which a gate stops it. So one
controller serves every rule.

`ShareThreshold` steers the share of rollouts stopped: the paper's controller (row 6), or with step
0 a quantile taken once or a fixed number. `AuditThreshold` keeps what stopping costs under a
`Bound`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from espo_gateway.optional import needed

Array = NDArray[np.float64]

#: Each candidate threshold stops so many times as many of the known rollouts as the one before.
_RATIO = 1.1


@dataclass(frozen=True)
class Bound:
    """What stopping may cost at most, with stated confidence.

    of: "right-lost", the share of right rollouts that are stopped: what RL learns from. Or
        "false-positives", the paper's: of the stopped rollouts, the share that would have been
        right. Where few are right the latter lets a rule stop most of these few.
    """

    of: Literal["right-lost", "false-positives"] = "right-lost"
    limit: float = 0.05
    confidence: float = 0.9

    @classmethod
    def chosen(cls, right_lost: float, false_positives: float | None, confidence: float) -> Bound:
        """From settings: a share of false positives, when given, stands in the other's place."""
        if false_positives is not None:
            return cls("false-positives", false_positives, confidence)
        return cls("right-lost", right_lost, confidence)

    @property
    def needed(self) -> float:
        """Known outcomes (of right rollouts, or of stopped ones) that hold it if none is bad."""
        return math.log1p(-self.confidence) / math.log1p(-self.limit)

    @property
    def cost(self) -> str:
        """What is bounded, in words."""
        return "right rollouts lost" if self.of == "right-lost" else "false positives"

    def __str__(self) -> str:
        return f"{self.cost} under {100 * self.limit:.3g}% with {self.confidence:.0%} confidence"


@dataclass(frozen=True)
class Outcomes:
    """Rollouts of one batch whose outcome is known; arrays of shape [rollouts].

    levels: as `stop_levels` gives them under a gate that has not seen the batch, so that an
        estimator which flatters itself does so here as it does when it gates.
    weights: how many rollouts of the batch each stands for: one, and one over the audit share if
        it was stopped and audited.
    known_share: of the rollouts that its gate stops, the share whose outcome gets known; 1 of a
        batch without a gate. Not by what it happened to stop: else a batch would count for the
        more, the less was stopped in it.
    prompts: which rollouts are of one prompt, [rollouts]; None: each is of its own.
    """

    levels: NDArray[np.float32]
    correct: NDArray[np.bool_]
    weights: NDArray[np.float32]
    known_share: float = 1.0
    prompts: NDArray[np.int64] | None = None

    @property
    def right(self) -> Array:
        """How many right rollouts, that would show if they were stopped, each right one stands for.

        Those that audits pass by do not show. Shape [right rollouts].
        """
        return self.known_share * self.weights[self.correct].astype(np.float64)


def independent(batches: Sequence[Outcomes], limit: float) -> Array:
    """How many independent right rollouts each right one stands for, [right rollouts of all].

    Where levels go with the prompt, its right rollouts are lost together or not at all. So a prompt
    with m of them counts for m/(1 + (m - 1)·ρ): the design effect of samples in clusters (Kish,
    Survey Sampling, 1965), with ρ the correlation of being lost within prompts where a share
    `limit` of all is.
    """
    clusters, before = [np.empty(0, dtype=np.int64)], 0
    for batch in batches:
        own = np.arange(batch.levels.size) if batch.prompts is None else batch.prompts
        clusters.append(before + np.unique(own, return_inverse=True)[1][batch.correct])
        before += batch.levels.size
    prompts = np.concatenate(clusters)
    right = np.concatenate([np.empty(0), *(batch.right for batch in batches)])
    levels = np.concatenate([np.empty(0), *(batch.levels[batch.correct] for batch in batches)])
    others = np.maximum(np.bincount(prompts, right)[prompts] - 1.0, 0.0)
    return right / (1.0 + others * tail_correlation(correlation(levels, prompts), limit))


def tail_correlation(levels: float, share: float) -> float:
    """The correlation within prompts of lying among the lowest `share`.

    It is less than that of normal `levels` themselves: those that are alike are seldom together so
    far out. As of a probit model with random effects: by the variance over prompts of the chance to
    lie there.
    """
    if not 0.0 < levels < 1.0:
        return levels
    special = needed("scipy.special")
    prompts = special.ndtri((np.arange(2_000) + 0.5) / 2_000)
    lowest = special.ndtri(share) - math.sqrt(levels) * prompts
    chance = special.ndtr(lowest / math.sqrt(1.0 - levels))
    return float(chance.var() / (share * (1.0 - share)))


def correlation(levels: NDArray[Any], prompts: NDArray[np.int64]) -> float:
    """Intraclass correlation of the levels' ranks, in [0, 1]: how alike those of one prompt are.

    1 where nothing tells: all are of one prompt, or all alike.

    Args:
        levels, prompts: [rollouts]; prompts are numbers.
    """
    ordered, count = np.sort(levels), levels.size
    ranks = np.searchsorted(ordered, levels) + np.searchsorted(ordered, levels, "right") - count
    sums, members = np.bincount(prompts, ranks), np.bincount(prompts)
    # Mean products of two of one prompt, and of two of different ones; ranks have the mean 0.
    pairs = float((members * (members - 1)).sum())
    squares, rest = float((ranks**2).sum()), count * (count - 1) - pairs
    if not pairs:
        return 0.0
    if not rest or not squares:
        return 1.0
    alike = float((sums**2).sum()) - squares
    apart = (-squares - alike) / rest
    return _clipped((alike / pairs - apart) / (squares / count - apart), 0.0, 1.0)


def steered(
    level: float, share: float, target: float, step: float, bounds: tuple[float, float]
) -> float:
    """Row 6: β ← clip(β + η·(share stopped - target)), of any rule's level."""
    return _clipped(level - step * (share - target), *bounds)


def share_level(levels: NDArray[Any], target: float, bounds: tuple[float, float]) -> float:
    """The level that stops about a share of the rollouts whose own levels are given."""
    # A rollout is stopped by what is above its level, so the quantile stops the wished share.
    return _clipped(_below(np.quantile(levels, target, method="nearest")), *bounds)


class ShareThreshold:
    """Toward a wished share of stopped rollouts.

    level: in force; None until calibrated. reason: where it comes from, or why there is none.
    """

    def __init__(
        self,
        *,
        target: float,
        step: float,
        low: float,
        high: float,
        start: float | None,
        window: int = 20,
    ) -> None:
        """step: of the level, for a share that misses its target by 1 (η of row 6; 0: fixed).

        low, high: bounds of the level. start: None to calibrate on the last `window` batches that
        were sampled while nothing was stopped.
        """
        if not 0.0 <= target <= 1.0:
            raise ValueError(f"target must lie in [0, 1], not {target}")
        if not low < high:
            raise ValueError(f"need low < high, not {low} and {high}")
        self.level = None if start is None else _clipped(start, low, high)
        self.reason = "as given" if start is not None else "not calibrated yet"
        self.upper: float | None = None
        self.known: float | None = None
        self._target = target
        self._step = step
        self._range = low, high
        self._full: deque[NDArray[np.float32]] = deque(maxlen=window)

    @property
    def learns(self) -> bool:
        """Whether it still makes use of outcomes."""
        return self.level is None

    def update(
        self,
        outcomes: Outcomes | None,
        stop_share: float | None,
        *,
        ready: bool,
        rehearsal: Outcomes | None = None,
        audits: tuple[int, int] = (0, 0),
    ) -> None:
        """Take note of a finished batch.

        Args:
            outcomes: None when its levels are not known.
            stop_share: share of its rollouts that were stopped; None when stopping was off.
            ready: the warm-up is over, so there is nothing more to wait for.
            rehearsal: the same rollouts under the next batch's gate; only `AuditThreshold` looks at
                it, and at audits: how many of its stopped rollouts were audited, and how many of
                these were right.
        """
        if self.level is not None:
            if stop_share is not None and self._step:
                self.level = steered(self.level, stop_share, self._target, self._step, self._range)
                self.reason = f"{stop_share:.0%} stopped, {self._target:.0%} wished"
            return
        if outcomes is not None and outcomes.levels.size:
            self._full.append(outcomes.levels)
        if ready and self._full:
            levels = np.concatenate(self._full)
            self.level = share_level(levels, self._target, self._range)
            self.reason = f"would have stopped {self._target:.0%} of {levels.size} full rollouts"
            self._full.clear()
        elif ready:
            self.reason = "not calibrated yet: no full rollout has been judged"


class AuditThreshold:
    """As loose as known outcomes allow.

    What the threshold costs stays under a bound with stated confidence; without such a threshold
    stopping is off, and the full rollouts that follow are evidence again.

    Evidence are the rollouts of the last batches whose outcome is known: those never stopped, and
    of the stopped ones the audited. Each says by its level at which thresholds it would have been
    stopped. For each of a row of candidates the bound is Clopper and Pearson's (Biometrika 26,
    1934) for the effective number of outcomes in each batch: of stopped rollouts Kish's
    (Σw)²/Σw², of right ones the `independent` that audits would show if they were lost. The loosest
    candidate that holds is taken, and that on the last batch does not speak against the next
    batch's gate. Prompts are taken to be independent, and the last batches to speak for the next:
    until, with the same confidence at each look, the audits of what was really stopped say
    that the bound is broken. Then all that was known before is forgotten.

    Looser thresholds cost more where levels mean anything, so that candidates are nearly one test;
    tests/gateway/stop/test_threshold_control.py simulates that the confidence holds.

    level: in force; None when no candidate holds. upper: the upper bound of the cost there (or the
    smallest of any candidate). known: the effective number of outcomes it rests on; bad: of these,
    the right rollouts that are stopped.
    """

    learns = True

    def __init__(self, bound: Bound, *, window: int, low: float, high: float) -> None:
        """window: batches that evidence is kept for. low, high: bounds of the level."""
        if not low < high:
            raise ValueError(f"need low < high, not {low} and {high}")
        self.bound = bound
        self.level: float | None = None
        self.upper: float | None = None
        self.known: float | None = None
        self.bad: float | None = None
        self.reason = "no outcomes known yet"
        self._range = low, high
        self._evidence: deque[Outcomes | None] = deque(maxlen=window)
        #: of each batch: outcomes that could have spoken against the bound, and those that did
        self._audits: deque[tuple[float, float]] = deque(maxlen=window)

    def update(
        self,
        outcomes: Outcomes | None,
        stop_share: float | None,
        *,
        ready: bool,
        rehearsal: Outcomes | None = None,
        audits: tuple[int, int] = (0, 0),
    ) -> None:
        """Take note of a finished batch; arguments as of `ShareThreshold.update`."""
        audited, false = audits
        lost = self.bound.of == "right-lost"
        right = 0.0
        if outcomes is not None and stop_share is not None:
            right = float(outcomes.right.sum())
        self._audits.append((right if lost else audited, false))
        refuted = self._refuted()
        if refuted:
            self._evidence.clear()
            self._audits.clear()
        self._evidence.append(outcomes)
        batches = [batch for batch in self._evidence if batch is not None]
        candidates = self._candidates(batches)
        bad, known = (
            _right(batches, independent(batches, self.bound.limit), candidates)
            if lost
            else _stopped(batches, candidates)
        )
        upper = upper_bound(bad, known, self.bound.confidence)
        holds = allowed = upper <= self.bound.limit
        if rehearsal is not None:
            holds = allowed & self._rehearsed(rehearsal, candidates)
        holding = np.flatnonzero(holds)
        best = int(holding[-1]) if holding.size else int(upper.argmin())
        self.level = float(candidates[best]) if holding.size else None
        self.upper, self.known, self.bad = float(upper[best]), float(known[best]), float(bad[best])
        of = "right rollouts" if lost else "outcomes"
        if self.level is not None:
            self.reason = (
                f"at most {self.upper:.1%} {self.bound.cost} with {self.bound.confidence:.0%} "
                f"confidence ({self.known:.0f} known {of})"
            )
        elif allowed.any():
            self.reason = (
                f"thresholds would keep {self.bound}, but on the last batch the estimate to come "
                "speaks against all of them"
            )
        else:
            total = sum(batch.levels.size for batch in batches)
            self.reason = (
                f"no threshold keeps {self.bound}: {total} known outcomes, of which "
                + (
                    f"{self.known:.0f} tell of right rollouts"
                    if lost
                    else f"the best stops {self.known:.0f}"
                )
                + f", with at most {self.upper:.1%} {'lost' if lost else 'false'}"
            )
            if lost and self.known < self.bound.needed:
                more = math.ceil(self.bound.needed - self.known)
                self.reason += f"; at least {more} more right ones are needed"
        self.reason += refuted

    def _refuted(self) -> str:
        """What the last audits tell against the bound; empty if nothing."""
        trials, bad = np.sum(self._audits, axis=0)
        if _lower_bound(bad, trials, self.bound.confidence) <= self.bound.limit:
            return ""
        if self.bound.of == "right-lost":
            what = f"{bad:.0f} right rollouts were lost of {trials:.0f} that audits would show"
        else:
            what = f"{bad} of the last {trials} audits were false"
        return f"; {what}, so what was known is forgotten"

    def _rehearsed(self, rehearsal: Outcomes, candidates: Array) -> NDArray[np.bool_]:
        """Which candidates the last batch, under the next batch's gate, does not speak against.

        Evidence is of earlier estimators. The one to come may say of every rollout, right at its
        start, what an earlier one said of failures only.
        """
        if self.bound.of == "false-positives":
            bad, known = _stopped([rehearsal], candidates)
            return bad <= self.bound.limit * known
        bad, known = _right([rehearsal], rehearsal.right, candidates)
        # A batch may have a handful of right ones: one of them lost says nothing yet.
        return _lower_bound(bad, known, self.bound.confidence) <= self.bound.limit

    def _candidates(self, batches: list[Outcomes]) -> Array:
        """Levels from strict to loose, shape [candidates]; none depends on whether it was right."""
        low, high = self._range
        levels = np.sort(np.concatenate([np.empty(0), *(batch.levels for batch in batches)]))
        levels = levels[levels < high]
        ranks = [1 if self.bound.of == "right-lost" else math.ceil(self.bound.needed)]
        while ranks[-1] < levels.size:
            ranks.append(math.ceil(ranks[-1] * _RATIO))
        chosen = [_below(levels[rank]) for rank in ranks if rank < levels.size]
        return np.unique([*np.clip(chosen, low, high), high])


def _right(batches: Sequence[Outcomes], worth: Array, candidates: Array) -> tuple[Array, Array]:
    """Right rollouts that each candidate stops, and all of them, [candidates].

    worth: how many each stands for, [right rollouts of all batches]. Batches are added by what they
    know, not by what they stand for: else a few audited rollouts would outweigh a whole batch that
    was never stopped.
    """
    levels = np.concatenate([np.empty(0), *(batch.levels[batch.correct] for batch in batches)])
    order = np.argsort(levels)
    sums = np.concatenate([[0.0], np.cumsum(worth[order])])
    bad = sums[np.searchsorted(levels[order], candidates, side="left")]
    return bad, np.full(len(candidates), sums[-1])


def _stopped(batches: Sequence[Outcomes], candidates: Array) -> tuple[Array, Array]:
    """Effective number of right ones among those that each candidate stops, and of these,
    [candidates]; weights compare rollouts of one batch, and batches are added as in `_right`.
    """
    bad, known = np.zeros(len(candidates)), np.zeros(len(candidates))
    for batch in batches:
        order = np.argsort(batch.levels)
        weights = batch.weights[order].astype(np.float64)
        sums = np.cumsum([weights, weights**2, weights * batch.correct[order]], axis=1)
        stopped = np.searchsorted(batch.levels[order], candidates, side="left")
        total, squares, right = np.hstack([np.zeros((3, 1)), sums])[:, stopped]
        some = total > 0.0
        effective = np.divide(total**2, squares, out=np.zeros_like(total), where=some)
        known += effective
        bad += effective * np.divide(right, total, out=np.zeros_like(total), where=some)
    return bad, known


def upper_bound(bad: Any, known: Any, confidence: float) -> Array:
    """One-sided Clopper-Pearson bound of a share, for counts that need not be whole numbers.

    Raises ImportError without SciPy.
    """
    betaincinv = needed("scipy.special").betaincinv
    rest = np.asarray(known, float) - bad
    some = rest > 1e-9
    return np.where(some, betaincinv(bad + 1.0, np.where(some, rest, 1.0), confidence), 1.0)


def _lower_bound(bad: Any, known: Any, confidence: float) -> Array:
    # That so few are bad is the complement of the bound that so few are not.
    return 1.0 - upper_bound(np.maximum(np.asarray(known, float) - bad, 0.0), known, confidence)


def _below(level: Any) -> float:
    """The next stricter level that a float32 can hold.

    Rollouts of one prompt tie where V is least before they part. Made from their very level, a
    threshold would stop all of them or none as it is rounded; from this one, none.
    """
    return float(np.nextafter(np.float32(level), np.float32(-np.inf)))


def _clipped(level: float, low: float, high: float) -> float:
    return min(max(level, low), high)
