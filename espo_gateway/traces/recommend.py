"""What thresholds do to recorded traces, and which one they recommend: for a share of stops, or a
bound on errors.

A trace's level says at which thresholds it would have been stopped (`replay.stop_levels`). One that
was cut is evidence up to there: a threshold that would have cut it by then is known to, a stricter
one is not, and there the trace is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.fit import Variance
from espo_gateway.stop.regret import Array
from espo_gateway.stop.replay import stop_levels, token_levels
from espo_gateway.stop.rules import RULES, Gate, threshold_of
from espo_gateway.stop.threshold_control import AuditThreshold, Bound, Outcomes, upper_bound
from espo_gateway.traces.cross_fit import (
    CalibrationError,
    CrossFit,
    Read,
    check_spared,
    spared_weight,
)
from espo_gateway.traces.reader import Traces, itself


@dataclass
class JudgedTraces:
    """All traces under a gate; arrays of shape [traces]."""

    levels: Array
    cut: NDArray[np.bool_]
    spared: NDArray[np.bool_]
    correct: Array  # NaN: unknown
    rehearsed: Array | None  # levels by the final estimator
    sessions: NDArray[np.uint32]  # that share an outcome; 0: of its own
    keys: NDArray[np.uint32]  # of their prompts
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
        outcomes = Outcomes(
            levels=levels[known].astype(np.float32),
            correct=self.correct[known].astype(bool),
            weights=self.weights[known].astype(np.float32),
            known_share=1.0 / spared_weight(int(self.cut.sum()), int(self.spared.sum())),
            prompts=self.keys[known].astype(np.int64),
        )
        return by_session(outcomes, self.sessions[known])

    def shares(self, levels: Array) -> tuple[Array, NDArray[np.int64]]:
        """Share stopped at each of some levels, and how many are undecided there."""
        below = np.searchsorted(np.sort(self.levels), levels, side="left")
        cut_below = np.searchsorted(np.sort(self.levels[self.cut]), levels, side="left")
        undecided = self.cut.sum() - cut_below
        return below / np.maximum(self.levels.size - undecided, 1), undecided


def by_session(outcomes: Outcomes, sessions: NDArray[np.uint32]) -> Outcomes:
    """Turns that share an outcome as one rollout, which is lost where any of them is stopped."""
    if not sessions.any():
        return outcomes
    alone = -1 - np.arange(sessions.size)
    units, first, unit = np.unique(
        np.where(sessions, sessions.astype(np.int64), alone), return_index=True, return_inverse=True
    )
    levels = np.full(units.size, np.inf, np.float32)
    np.minimum.at(levels, unit, outcomes.levels)
    return dataclasses.replace(
        outcomes,
        levels=levels,
        correct=outcomes.correct[first],
        weights=outcomes.weights[first],
        prompts=None if outcomes.prompts is None else outcomes.prompts[first],
    )


def _share(some: NDArray[np.bool_], weights: NDArray[Any]) -> float | None:
    return float(np.average(some, weights=weights)) if some.size else None


@dataclass(frozen=True)
class Row:
    """What a threshold would have done to the traces.

    stopped: share of those that can tell. undecided: traces that were cut before it can be known.
    saved: share of the tokens, of traces that were not cut. lost: of those known to be right, the
    share that is stopped. false: of the stopped ones of known outcome, the share that would have
    been right. Both None when none is known.
    """

    threshold: float
    stopped: float
    undecided: int
    saved: float
    lost: float | None
    false: float | None


def judge(read: Read, learnt: CrossFit) -> JudgedTraces:
    """The levels of all traces: one pass."""
    columns: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("levels", "cut", "spared", "correct", "rehearsed", "sessions", "keys")
    }
    variance, rest = Variance(), Variance()
    for traces in read(itself):
        _check_confidences(learnt.gate, traces)
        unseen, final = learnt.values(traces)
        columns["levels"].append(stop_levels(learnt.gate, traces.recorded, unseen))
        for name in ("cut", "spared", "correct", "sessions", "keys"):
            columns[name].append(getattr(traces, name))
        if unseen is not None:
            columns["rehearsed"].append(stop_levels(learnt.gate, traces.recorded, final))
            known = traces.recorded.known & ~np.isnan(traces.correct)[:, None]
            outcomes = np.broadcast_to(traces.correct[:, None], known.shape)[known]
            variance.add(outcomes)
            rest.add(outcomes - unseen[known])
    joined = {name: np.concatenate(parts) for name, parts in columns.items() if parts}
    return JudgedTraces(
        levels=joined["levels"],
        cut=joined["cut"],
        spared=joined["spared"],
        correct=joined["correct"],
        rehearsed=joined.get("rehearsed"),
        sessions=joined["sessions"],
        keys=joined["keys"],
        explained_variance=1.0 - rest.value / variance.value if variance.value else None,
    )


def rows_at(
    read: Read, learnt: CrossFit, judged: JudgedTraces, levels: Sequence[float]
) -> list[Row]:
    """What each of some levels would have done: one pass."""
    saved, total = np.zeros(len(levels)), 0.0
    weight = spared_weight(int(judged.cut.sum()), int(judged.spared.sum()))
    for traces in read(itself):
        whole = ~traces.cut
        lengths = traces.lengths[whole]
        weights = np.where(traces.spared[whole], weight, 1.0)
        total += float(weights @ lengths)
        unseen, _ = learnt.values(traces)
        tokens = token_levels(learnt.gate, traces.recorded, unseen)[whole]
        for k, level in enumerate(levels):
            crossed = tokens < level
            cuts = np.where(crossed.any(axis=1), crossed.argmax(axis=1) + 1, lengths)
            saved[k] += weights @ (lengths - cuts)
    shares, undecided = judged.shares(np.array(levels))
    threshold = threshold_of(learnt.gate.rule)
    rows, known = [], judged.outcomes(judged.levels)
    right = known.correct
    for k, level in enumerate(levels):
        below = known.levels < level
        rows.append(
            Row(
                threshold=threshold.at(level),
                stopped=float(shares[k]),
                undecided=int(undecided[k]),
                saved=float(saved[k] / total) if total else math.nan,
                lost=_share(below[right], known.weights[right]),
                false=_share(right[below], known.weights[below]),
            )
        )
    return rows


def add_bound(parser: argparse.ArgumentParser) -> None:
    """The arguments that `bound_of` reads."""
    cost = parser.add_mutually_exclusive_group()
    for name, default, meaning in (
        ("--right-lost", 0.05, "of the right ones at most this share is stopped (default: 0.05)"),
        (
            "--false-positives",
            None,
            "in its place: of the stopped ones at most this share is right",
        ),
    ):
        cost.add_argument(name, type=share, default=default, metavar="SHARE", help=meaning)
    parser.add_argument(
        "--confidence",
        type=share,
        default=0.9,
        metavar="SHARE",
        help="how sure that bound is to be (default: 0.9)",
    )


def bound_of(options: argparse.Namespace) -> Bound:
    """The bound that was asked for."""
    return Bound.chosen(options.right_lost, options.false_positives, options.confidence)


def share(text: str) -> float:
    """An argument between 0 and 1. Raises argparse.ArgumentTypeError."""
    value = float(text)
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, not {text}")
    return value


def level_for_share(judged: JudgedTraces, gate: Gate, share: float) -> float:
    """The level whose share of stopped traces is nearest to a wished one."""
    low, high = _range(gate)
    levels = np.unique(judged.levels[np.isfinite(judged.levels)])
    candidates = np.array([low, *(levels[:-1] + levels[1:]) / 2.0, high])
    candidates = np.unique(np.clip(candidates, low, high))
    shares, _ = judged.shares(candidates)
    return float(candidates[np.abs(shares - share).argmin()])


def level_for_bound(judged: JudgedTraces, gate: Gate, bound: Bound) -> tuple[float, str]:
    """The loosest level that keeps a bound, and why.

    Raises:
        CalibrationError: no threshold holds the bound; says how many more outcomes would do.
    """
    check_spared(int(judged.cut.sum()), int(judged.spared.sum()), judged.cut.size)
    return bounded_level(
        judged.outcomes(judged.levels),
        None if judged.rehearsed is None else judged.outcomes(judged.rehearsed),
        gate,
        bound,
    )


def bounded_level(
    outcomes: Outcomes,
    rehearsal: Outcomes | None,
    gate: Gate,
    bound: Bound,
) -> tuple[float, str]:
    """`level_for_bound` of rollouts whose outcome is known; rehearsal: by the final estimator."""
    audit = _audited(outcomes, rehearsal, gate, bound)
    if audit.level is None:
        known = outcomes.levels.size
        alone = _audited(outcomes, None, gate, bound)
        raise CalibrationError(
            f"{known} outcomes are known, and no threshold keeps {bound}: "
            + (_missing(audit, known) if alone.level is None else _vetoed(alone, gate))
        )
    return audit.level, audit.reason


def _audited(
    outcomes: Outcomes, rehearsal: Outcomes | None, gate: Gate, bound: Bound
) -> AuditThreshold:
    low, high = _range(gate)
    audit = AuditThreshold(bound, window=1, low=low, high=high)
    audit.update(outcomes, None, ready=True, rehearsal=rehearsal)
    return audit


def _vetoed(alone: AuditThreshold, gate: Gate) -> str:
    """Why none is left of what would hold without the rehearsal."""
    threshold = threshold_of(gate.rule)
    assert alone.level is not None
    return (
        f"the estimators of the folds would allow {threshold.symbol} = "
        f"{threshold.at(alone.level):.4g} ({alone.reason}), but the gate's own, fitted on all, "
        "breaks the bound there and at every stricter one that they allow: it differs too much "
        "from theirs; more outcomes would bring them together"
    )


def _range(gate: Gate) -> tuple[float, float]:
    threshold = threshold_of(gate.rule)
    return threshold.level(threshold.strictest), threshold.level(threshold.loosest)


def _check_confidences(gate: Gate, traces: Traces) -> None:
    if RULES[gate.rule].alternatives(gate) > 1 and traces.recorded.confidences is None:
        raise CalibrationError(
            "the confidence rule needs recorded confidences: record them under a gate of that "
            'rule, with "espo": {"mode": "shadow"} in the requests'
        )


def _missing(audit: AuditThreshold, known: int) -> str:
    """How many more outcomes would do, if they are like those there are."""
    bound, told, bad = audit.bound, audit.known or 0.0, audit.bad or 0.0
    lost = bound.of == "right-lost"
    if told < bound.needed:
        enough = math.ceil(bound.needed)
        if lost:
            return f"{told:.0f} are of right answers, and at least {enough} of these are needed"
        if not told:
            return f"at least {enough} outcomes of traces that it stops are needed"
    share = bad / told
    if share >= bound.limit:
        what = "the right ones it loses" if lost else "those stopped by the best one"
        return (
            f"of {what} {share:.1%}, so more outcomes alone will not do; allow more, or use "
            "another rule"
        )
    much = told
    while upper_bound(share * much, much, bound.confidence) > bound.limit:
        much *= 1.02
    more = math.ceil(known * (much / told - 1.0))
    return (
        f"the best one loses {bad:.0f} of {told:.0f} right ones"
        if lost
        else f"the best one stops {told:.0f} of them, with at most {audit.upper:.1%} false"
    ) + f"; about {max(more, 1):,} more outcomes are needed"
