"""How the threshold of a stop rule moves between batches. Pure.

Works on levels (`espo_gateway.replay`): -β, log p*/(1 - p*) or log hazard, where higher always
stops more, and where each rollout has a level of its own, above which a gate stops it. So one
controller serves every rule.

`ShareThreshold` steers the share of rollouts stopped: the paper's controller (row 6), or with step
0 a quantile taken once or a fixed number. `AuditThreshold` bounds the false positives: of the
stopped rollouts, the share that would have been right.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espo_gateway.optional import needed

Array = NDArray[np.float64]

#: Each candidate threshold stops so many times as many of the known rollouts as the one before.
_RATIO = 1.1


@dataclass(frozen=True)
class Outcomes:
    """Rollouts of one batch whose outcome is known; all of shape [rollouts].

    levels: as `stop_levels` gives them under a gate that has not seen the batch, so that an
        estimator which flatters itself does so here as it does when it gates.
    weights: how many rollouts of the batch each stands for: one, and one over the audit share if
        it was stopped and audited.
    """

    levels: NDArray[np.float32]
    correct: NDArray[np.bool_]
    weights: NDArray[np.float32]


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
        self.bound: float | None = None
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

    Of the rollouts stopped at the threshold at most a share `limit` would have been right, with a
    stated confidence; without such a threshold stopping is off, and the full rollouts that follow
    are evidence again.

    Evidence are the rollouts of the last batches whose outcome is known: those never stopped, and
    of the stopped ones the audited. Each says by its level at which thresholds it would have been
    stopped. For each of a row of candidates the bound is Clopper and Pearson's (Biometrika 26,
    1934) for the effective number of outcomes (Kish: (Σw)²/Σw²) in each batch; the loosest
    candidate that holds is taken, and that on the last batch would not have been too loose for the
    next batch's gate. Rollouts are taken to be independent, and the last batches to speak for the
    next: until, with the same confidence at each look, the audits of what was really stopped say
    that too much of it was right. Then all that was known before is forgotten.

    Looser thresholds have more false positives where levels mean anything, so that candidates are
    nearly one test; tests/gateway/stop/test_thresholds.py simulates that the confidence holds.

    level: in force; None when no candidate holds. bound: the upper bound of the false share there
    (or the smallest of any candidate). known: the effective number of outcomes it rests on;
    false: of these, the ones that would have been right.
    """

    learns = True

    def __init__(
        self, *, limit: float, confidence: float, window: int, low: float, high: float
    ) -> None:
        """window: batches that evidence is kept for. low, high: bounds of the level."""
        if not low < high:
            raise ValueError(f"need low < high, not {low} and {high}")
        self.level: float | None = None
        self.bound: float | None = None
        self.known: float | None = None
        self.false: float | None = None
        self.reason = "no outcomes known yet"
        self._limit = limit
        self._confidence = confidence
        self._range = low, high
        self._evidence: deque[Outcomes | None] = deque(maxlen=window)
        self._audits: deque[tuple[int, int]] = deque(maxlen=window)
        #: outcomes that it takes to hold the bound without a single false one
        self.needed = math.log1p(-confidence) / math.log1p(-limit)

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
        self._audits.append(audits)
        refuted = self._refuted()
        if refuted:
            self._evidence.clear()
            self._audits.clear()
        self._evidence.append(outcomes)
        batches = [batch for batch in self._evidence if batch is not None]
        total = sum(batch.levels.size for batch in batches)
        candidates = self._candidates(batches)
        false, known = _pooled(batches, candidates)
        upper = upper_bound(false, known, self._confidence)
        holds = upper <= self._limit
        if rehearsal is not None:
            # Evidence is of earlier estimators. The one to come may say of every rollout, right at
            # its start, what an earlier one said of failures only.
            would_be_false, would_stop = _pooled([rehearsal], candidates)
            holds &= would_be_false <= self._limit * would_stop
        holding = np.flatnonzero(holds)
        best = int(holding[-1]) if holding.size else int(upper.argmin())
        self.level = float(candidates[best]) if holding.size else None
        self.bound, self.known = float(upper[best]), float(known[best])
        self.false = float(false[best])
        if self.level is not None:
            self.reason = (
                f"at most {self.bound:.1%} false positives with {self._confidence:.0%} confidence "
                f"({self.known:.0f} known outcomes)"
            )
        else:
            self.reason = (
                f"no threshold keeps false positives under {self._limit:.0%} with "
                f"{self._confidence:.0%} confidence: {total} known outcomes, of which the best "
                f"stops {self.known:.0f} with at most {self.bound:.1%} false"
            )
        self.reason += refuted

    def _refuted(self) -> str:
        """What the last audits tell against the bound; empty if nothing."""
        audited, false = np.sum(self._audits, axis=0)
        # That so few are false is the complement of the bound that so few are not.
        lower = 1.0 - float(upper_bound(audited - false, audited, self._confidence))
        if lower <= self._limit:
            return ""
        return f"; {false} of the last {audited} audits were false, so what was known is forgotten"

    def _candidates(self, batches: list[Outcomes]) -> Array:
        """Levels from strict to loose, shape [candidates]; none depends on whether it was right."""
        low, high = self._range
        levels = np.sort(np.concatenate([np.empty(0), *(batch.levels for batch in batches)]))
        levels = levels[levels < high]
        ranks = [math.ceil(self.needed)]
        while ranks[-1] < levels.size:
            ranks.append(math.ceil(ranks[-1] * _RATIO))
        chosen = [_below(levels[rank]) for rank in ranks if rank < levels.size]
        return np.unique([*np.clip(chosen, low, high), high])


def upper_bound(false: Array, known: Array, confidence: float) -> Array:
    """One-sided Clopper-Pearson bound of a share, for counts that need not be whole numbers.

    Raises ImportError without SciPy.
    """
    betaincinv = needed("scipy.special").betaincinv
    rest = known - false
    some = rest > 1e-9
    return np.where(some, betaincinv(false + 1.0, np.where(some, rest, 1.0), confidence), 1.0)


def _pooled(batches: list[Outcomes], candidates: Array) -> tuple[Array, Array]:
    """Effective number of false and of all outcomes that each candidate stops, [candidates].

    Weights compare rollouts of one batch. Batches are added by what they know, not by what they
    stand for: else a few audited rollouts would outweigh a whole batch that was never stopped.
    """
    false, known = np.zeros(len(candidates)), np.zeros(len(candidates))
    for batch in batches:
        order = np.argsort(batch.levels)
        weights = batch.weights[order].astype(np.float64)
        sums = np.cumsum([weights, weights**2, weights * batch.correct[order]], axis=1)
        stopped = np.searchsorted(batch.levels[order], candidates, side="left")
        total, squares, right = np.hstack([np.zeros((3, 1)), sums])[:, stopped]
        some = total > 0.0
        effective = np.divide(total**2, squares, out=np.zeros_like(total), where=some)
        known += effective
        false += effective * np.divide(right, total, out=np.zeros_like(total), where=some)
    return false, known


def _below(level: Any) -> float:
    """The next stricter level that a float32 can hold.

    Rollouts of one prompt tie where V is least before they part. Made from their very level, a
    threshold would stop all of them or none as it is rounded; from this one, none.
    """
    return float(np.nextafter(np.float32(level), np.float32(-np.inf)))


def _clipped(level: float, low: float, high: float) -> float:
    return min(max(level, low), high)
