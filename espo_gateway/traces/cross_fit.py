"""A gate learnt from recorded traces, in one pass over them; what is read is the caller's matter.

An estimator judges only traces that it was not fitted on: the traces are dealt to folds by prompt,
and each fold is judged by an estimator of the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from espo_gateway.stop.estimate import FEATURES, SuccessEstimator, logits_by, probabilities
from espo_gateway.stop.fit import Examples, examples, fit
from espo_gateway.stop.regret import Array, RegretStatistics
from espo_gateway.stop.rules import Gate
from espo_gateway.traces.reader import Traces

#: Traces that an estimator is fitted on at most.
MAX_FITTED = 20_000
#: Stands in a gate whose estimator is still to be fitted.
UNFITTED = SuccessEstimator(weights=(0.0,) * len(FEATURES), bias=0.0)

Read = Callable[[], Iterable[Traces]]


class CalibrationError(ValueError):
    """The traces do not carry a recommendation; the message says what would."""


@dataclass
class CrossFit:
    """A gate under which traces are judged, and the estimators that judge each fold."""

    gate: Gate
    folds: list[SuccessEstimator] = field(default_factory=list)

    def logits(self, traces: Traces) -> tuple[Array, Array]:
        """log V/(1 - V) at each token, [traces, tokens]: out of sample, and by the estimator that
        is to gate."""
        assert self.gate.estimator is not None
        features = traces.recorded.features
        unseen = logits_by(self.folds, traces.keys % len(self.folds), features)
        return unseen, logits_by([self.gate.estimator], np.zeros_like(traces.keys), features)

    def values(self, traces: Traces) -> tuple[Array | None, Array | None]:
        """V of these; None where the gate has no estimator."""
        if self.gate.estimator is None:
            return None, None
        unseen, final = self.logits(traces)
        return probabilities(unseen), probabilities(final)


def learn(read: Read, base: Gate, *, folds: int) -> CrossFit:
    """The statistics, and the estimators where the rule has one: one pass over the traces.

    Raises:
        CalibrationError: no traces, or no outcomes to fit an estimator to.
    """
    count, total, squares = 0, 0.0, 0.0
    dealt: list[list[Examples]] = [[] for _ in range(folds)]
    cut = spared = fitted = 0
    estimates = base.source == "stream"
    for traces in read():
        regrets = traces.recorded.regrets[traces.recorded.known]
        count += regrets.size
        total += float(regrets.sum())
        squares += float((regrets**2).sum())
        cut += int(traces.cut.sum())
        spared += int(traces.spared.sum())
        if not estimates or fitted >= MAX_FITTED:
            continue
        if np.isnan(traces.recorded.prompt_tokens).any():
            raise CalibrationError("the estimator needs prompt_tokens, and a trace has none")
        known = ~np.isnan(traces.correct)
        fitted += int(known.sum())
        for k, part in enumerate(_dealt(traces.where(known), folds)):
            dealt[k].append(part)
    if not count:
        raise CalibrationError("no trace has a single token with its logprobs")
    statistics = RegretStatistics(decay=base.statistics.decay).moved_by(count, total, squares)
    gate = dataclasses.replace(base, version=base.version + 1, statistics=statistics)
    if not estimates:
        return CrossFit(gate)
    weighted = [_weighted(parts, spared_weight(cut, spared)) for parts in dealt]
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
    return CrossFit(gate, [estimator for estimator in others if estimator is not None])


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


def _dealt(traces: Traces, folds: int) -> Iterator[Examples]:
    """Examples by fold. Weights are 1 for a spared trace and 0 for others: how many were cut is
    known only later."""
    # In the place of its weight each brings the number of its trace.
    every = examples(traces.recorded, traces.correct == 1.0, np.arange(float(len(traces))))
    number = every.weights.astype(np.int64)
    for k in range(folds):
        rows = traces.keys[number] % folds == k
        yield Examples(
            every.features[rows],
            every.outcomes[rows],
            traces.spared[number[rows]].astype(np.float32),
        )


def _weighted(parts: list[Examples], spared: float) -> list[Examples]:
    return [
        dataclasses.replace(part, weights=np.where(part.weights, spared, 1.0).astype(np.float32))
        for part in parts
    ]
