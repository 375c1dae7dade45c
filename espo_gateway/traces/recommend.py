"""The threshold that judged traces recommend: for a share of stops, or a bound on errors. Pure.

A trace's level says at which thresholds it would have been stopped (`replay.stop_levels`). One that
was cut is evidence up to there: a threshold that would have cut it by then is known to, a stricter
one is not, and there the trace is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.regret import Array
from espo_gateway.stop.replay import level_of
from espo_gateway.stop.rules import RULES, Gate
from espo_gateway.stop.thresholds import AuditThreshold, Outcomes, upper_bound

#: The strictest and the loosest threshold that is recommended, by field of the gate.
_RANGES = {"beta": (50.0, 0.05), "p_star": (1e-6, 0.5), "confidence": (1e-3, 1e3)}


class CalibrationError(ValueError):
    """The traces do not carry a recommendation; the message says what would."""


@dataclass
class Sample:
    """All traces, judged; arrays of shape [traces]."""

    levels: Array
    cut: NDArray[np.bool_]
    spared: NDArray[np.bool_]
    correct: Array  # NaN: unknown
    rehearsed: Array | None  # levels by the final estimator
    explained_variance: float | None = None

    @property
    def known(self) -> NDArray[np.bool_]:
        return ~np.isnan(self.correct)

    @property
    def weights(self) -> Array:
        """Those that were spared a cut stand for all that a rule would have cut."""
        return np.where(self.spared, spared_weight(self.cut.sum(), self.spared.sum()), 1.0)

    def outcomes(self, levels: Array) -> Outcomes:
        known = self.known
        return Outcomes(
            levels=levels[known].astype(np.float32),
            correct=self.correct[known].astype(bool),
            weights=self.weights[known].astype(np.float32),
        )

    def shares(self, levels: Array) -> tuple[Array, NDArray[np.int64]]:
        """Share stopped at each of some levels, and how many are undecided there."""
        below = np.searchsorted(np.sort(self.levels), levels, side="left")
        cut_below = np.searchsorted(np.sort(self.levels[self.cut]), levels, side="left")
        undecided = self.cut.sum() - cut_below
        return below / np.maximum(self.levels.size - undecided, 1), undecided


def level_for_share(sample: Sample, gate: Gate, share: float) -> float:
    """The level whose share of stopped traces is nearest to a wished one."""
    low, high = _range(gate)
    levels = np.unique(sample.levels[np.isfinite(sample.levels)])
    candidates = np.array([low, *(levels[:-1] + levels[1:]) / 2.0, high])
    candidates = np.unique(np.clip(candidates, low, high))
    shares, _ = sample.shares(candidates)
    return float(candidates[np.abs(shares - share).argmin()])


def level_for_bound(
    sample: Sample, gate: Gate, *, false_positives: float, confidence: float
) -> tuple[float, str]:
    """The loosest level with at most so many false positives, and why.

    Raises:
        CalibrationError: no threshold holds the bound; says how many more outcomes would do.
    """
    check_spared(int(sample.cut.sum()), int(sample.spared.sum()), sample.cut.size)
    return bounded_level(
        sample.outcomes(sample.levels),
        None if sample.rehearsed is None else sample.outcomes(sample.rehearsed),
        gate,
        false_positives=false_positives,
        confidence=confidence,
    )


def bounded_level(
    outcomes: Outcomes,
    rehearsal: Outcomes | None,
    gate: Gate,
    *,
    false_positives: float,
    confidence: float,
) -> tuple[float, str]:
    """`level_for_bound` of rollouts whose outcome is known; rehearsal: by the final estimator."""
    low, high = _range(gate)
    audit = AuditThreshold(
        limit=false_positives, confidence=confidence, window=1, low=low, high=high
    )
    audit.update(outcomes, None, ready=True, rehearsal=rehearsal)
    if audit.level is None:
        known = outcomes.levels.size
        raise CalibrationError(
            f"{known} outcomes are known, and no threshold keeps false positives under "
            f"{false_positives:.1%} with {confidence:.0%} confidence: "
            + _missing(audit, known, false_positives, confidence)
        )
    return audit.level, audit.reason


def _range(gate: Gate) -> tuple[float, float]:
    name = RULES[gate.rule].threshold
    assert name is not None
    strict, loose = _RANGES[name]
    return level_of(gate.rule, strict), level_of(gate.rule, loose)


def _missing(audit: AuditThreshold, known: int, limit: float, confidence: float) -> str:
    """How many more outcomes would do, if they are like those there are."""
    stopped, false = audit.known or 0.0, audit.false or 0.0
    if not stopped:
        return f"at least {math.ceil(audit.needed)} outcomes of traces that it stops are needed"
    share = false / stopped
    if share >= limit:
        return (
            f"of those stopped by the best one {share:.1%} would have been right, so more "
            "outcomes alone will not do; allow more false positives, or use another rule"
        )
    enough = stopped
    while upper_bound(np.array(share * enough), np.array(enough), confidence) > limit:
        enough *= 1.02
    more = math.ceil(known * (enough / stopped - 1.0))
    return (
        f"the best one stops {stopped:.0f} of them, with at most {audit.bound:.1%} false; about "
        f"{max(more, 1):,} more outcomes are needed"
    )


def check_spared(cut: int, spared: int, traces: int) -> None:
    """Raises CalibrationError when the traces that rules cut are known by none: what is left is no
    fair sample."""
    if cut and not spared:
        raise CalibrationError(
            f"{cut} of {traces} traces were cut and none of those that a rule would have cut was "
            "spared, so nothing is known of false positives: record with "
            '"espo": {"mode": "shadow"} or {"audit": 0.1} in the requests, or train with '
            "stopping.audit_share above 0"
        )


def spared_weight(cut: int, spared: int) -> float:
    """How many traces each spared one stands for."""
    return (cut + spared) / spared if spared else 1.0
