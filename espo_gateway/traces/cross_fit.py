"""Recorded traces learnt from and judged, in passes over them; what is read is the caller's matter.

An estimator judges only traces that it was not fitted on: the traces are dealt to folds by prompt,
and each fold is judged by an estimator of the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.estimate import FEATURES, SuccessEstimator, probabilities
from espo_gateway.stop.fit import Examples, KnownOutcomes, fit
from espo_gateway.stop.recorded import recorded_regrets
from espo_gateway.stop.regret import Array, RegretStatistics
from espo_gateway.stop.replay import threshold_at, token_levels
from espo_gateway.stop.rules import RULES, Gate
from espo_gateway.traces.reader import Chunk
from espo_gateway.traces.recommend import CalibrationError, Sample, spared_weight

#: Traces that an estimator is fitted on at most.
MAX_FITTED = 20_000
#: Stands in a gate whose estimator is still to be fitted.
UNFITTED = SuccessEstimator(weights=(0.0,) * len(FEATURES), bias=0.0)

Read = Callable[[], Iterable[Chunk]]


@dataclass(frozen=True)
class Row:
    """What a threshold would have done to the traces.

    stopped: share of those that can tell. undecided: traces that were cut before it can be known.
    saved: share of the tokens, of traces that were not cut. false: of the stopped ones of known
    outcome, the share that would have been right; None when none is known.
    """

    threshold: float
    stopped: float
    undecided: int
    saved: float
    false: float | None


@dataclass
class Fit:
    """A gate under which traces are judged, and the estimators that judge each fold."""

    gate: Gate
    folds: list[SuccessEstimator] = field(default_factory=list)

    def levels(self, chunk: Chunk, values: Array | None) -> Array:
        """Level of each token where V is as given, [traces, tokens]."""
        if RULES[self.gate.rule].alternatives(self.gate) > 1 and chunk.confidences is None:
            raise CalibrationError(
                "the confidence rule needs recorded confidences: record them under a gate of that "
                'rule, with "espo": {"mode": "shadow"} in the requests'
            )
        return token_levels(
            self.gate,
            chunk.logprobs,
            chunk.max_logprobs,
            chunk.prompt_tokens,
            completed_at=chunk.completed_at,
            values=values,
            confidences=chunk.confidences,
        )

    def values(self, chunk: Chunk) -> tuple[Array | None, Array | None]:
        """V at each token, [traces, tokens]: out of sample, and by the estimator that is to gate.

        None where the rule has no estimator.
        """
        estimator = self.gate.estimator
        if estimator is None:
            return None, None
        known = _known(chunk, np.ones(len(chunk.keys), dtype=bool))
        unseen = np.empty(chunk.logprobs.shape)
        for k, other in enumerate(self.folds):
            rows = chunk.keys % len(self.folds) == k
            unseen[rows] = probabilities(other.logits(known.features[rows]))
        return unseen, known.probabilities(estimator)


def learn(read: Read, base: Gate, *, folds: int) -> Fit:
    """The statistics, and the estimators where the rule has one: one pass over the traces.

    Raises:
        CalibrationError: no traces, or no outcomes to fit an estimator to.
    """
    count, total, squares = 0, 0.0, 0.0
    examples: list[list[Examples]] = [[] for _ in range(folds)]
    cut = spared = fitted = 0
    estimates = base.source == "stream"
    for chunk in read():
        regrets = recorded_regrets(chunk.logprobs, chunk.max_logprobs)
        regrets = regrets[~np.isnan(regrets)]
        count += regrets.size
        total += float(regrets.sum())
        squares += float((regrets**2).sum())
        cut += int(chunk.cut.sum())
        spared += int(chunk.spared.sum())
        if not estimates or fitted >= MAX_FITTED:
            continue
        if np.isnan(chunk.prompt_tokens).any():
            raise CalibrationError("the estimator needs prompt_tokens, and a trace has none")
        known = ~np.isnan(chunk.correct)
        fitted += int(known.sum())
        for k in range(folds):
            rows = known & (chunk.keys % folds == k)
            if rows.any():
                examples[k].append(_known(chunk, rows).examples())
    if not count:
        raise CalibrationError("no trace has a single token with its logprobs")
    statistics = RegretStatistics(decay=base.statistics.decay).moved_by(count, total, squares)
    gate = dataclasses.replace(base, version=base.version + 1, statistics=statistics)
    if not estimates:
        return Fit(gate)
    weighted = [_weighted(parts, spared_weight(cut, spared)) for parts in examples]
    whole = fit([part for parts in weighted for part in parts])
    others = [
        fit([part for j, parts in enumerate(weighted) if j != k for part in parts])
        for k in range(folds)
    ]
    if whole is None or any(estimator is None for estimator in others):
        raise CalibrationError(
            f"{fitted} outcomes are known, too few of them right or too few wrong: there is "
            "nothing to tell apart"
        )
    gate = dataclasses.replace(gate, estimator=whole)
    return Fit(gate, [estimator for estimator in others if estimator is not None])


def judge(read: Read, learnt: Fit) -> Sample:
    """The levels of all traces: one pass."""
    columns: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("levels", "cut", "spared", "correct", "rehearsed")
    }
    variance, rest = _Variance(), _Variance()
    for chunk in read():
        unseen, final = learnt.values(chunk)
        columns["levels"].append(learnt.levels(chunk, unseen).min(axis=1, initial=np.inf))
        for name in ("cut", "spared", "correct"):
            columns[name].append(getattr(chunk, name))
        if unseen is not None:
            levels = learnt.levels(chunk, final).min(axis=1, initial=np.inf)
            columns["rehearsed"].append(levels)
            regrets = recorded_regrets(chunk.logprobs, chunk.max_logprobs)
            real = ~np.isnan(regrets) & ~np.isnan(chunk.correct)[:, None]
            outcomes = np.broadcast_to(chunk.correct[:, None], real.shape)[real]
            variance.add(outcomes)
            rest.add(outcomes - unseen[real])
    joined = {name: np.concatenate(parts) for name, parts in columns.items() if parts}
    sample = Sample(
        levels=joined["levels"],
        cut=joined["cut"],
        spared=joined["spared"],
        correct=joined["correct"],
        rehearsed=joined.get("rehearsed"),
    )
    if variance.value:
        sample.explained_variance = 1.0 - rest.value / variance.value
    return sample


def rows_at(read: Read, learnt: Fit, sample: Sample, levels: Sequence[float]) -> list[Row]:
    """What each of some levels would have done: one pass."""
    saved, total = np.zeros(len(levels)), 0.0
    weight = spared_weight(int(sample.cut.sum()), int(sample.spared.sum()))
    for chunk in read():
        whole = ~chunk.cut
        lengths = chunk.lengths[whole]
        weights = np.where(chunk.spared[whole], weight, 1.0)
        total += float(weights @ lengths)
        tokens = learnt.levels(chunk, learnt.values(chunk)[0])[whole]
        for k, level in enumerate(levels):
            crossed = tokens < level
            cuts = np.where(crossed.any(axis=1), crossed.argmax(axis=1) + 1, lengths)
            saved[k] += weights @ (lengths - cuts)
    shares, undecided = sample.shares(np.array(levels))
    rows = []
    for k, level in enumerate(levels):
        stopped = sample.known & (sample.levels < level)
        some = stopped.any()
        false = np.average(sample.correct[stopped], weights=sample.weights[stopped]) if some else 0
        rows.append(
            Row(
                threshold=threshold_at(learnt.gate.rule, level),
                stopped=float(shares[k]),
                undecided=int(undecided[k]),
                saved=float(saved[k] / total) if total else math.nan,
                false=float(false) if some else None,
            )
        )
    return rows


def _known(chunk: Chunk, rows: NDArray[np.bool_]) -> KnownOutcomes:
    """Weights are 1 for a spared trace and 0 for others: how many were cut is known only later."""
    return KnownOutcomes(
        chunk.logprobs[rows],
        chunk.max_logprobs[rows],
        prompt_tokens=chunk.prompt_tokens[rows],
        completed_at=chunk.completed_at[rows],
        outcomes=chunk.correct[rows] == 1.0,
        weights=chunk.spared[rows].astype(np.float64),
    )


def _weighted(parts: list[Examples], spared: float) -> list[Examples]:
    return [
        dataclasses.replace(part, weights=np.where(part.weights, spared, 1.0).astype(np.float32))
        for part in parts
    ]


class _Variance:
    """Of numbers that come in parts."""

    def __init__(self) -> None:
        self._count, self._total, self._squares = 0, 0.0, 0.0

    def add(self, numbers: Array) -> None:
        self._count += numbers.size
        self._total += float(numbers.sum())
        self._squares += float((numbers**2).sum())

    @property
    def value(self) -> float:
        if not self._count:
            return 0.0
        mean = self._total / self._count
        return self._squares / self._count - mean * mean
