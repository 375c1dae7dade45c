"""A gate learnt from recorded traces, in one pass over them; what is read is the caller's matter.

An estimator judges only traces that it was not fitted on: the traces are dealt to folds by prompt,
and each fold is judged by an estimator of the others.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from espo_gateway.optional import needed
from espo_gateway.stop.estimate import (
    FEATURES,
    SuccessEstimator,
    logits_by,
    probabilities,
    rough_probabilities,
)
from espo_gateway.stop.fit import Examples, examples, fit
from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.regret import Array, RegretStatistics
from espo_gateway.stop.replay import decisive
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import ASKED, Schedule, SourceName, asked_below
from espo_gateway.traces.reader import Traces

#: Traces that an estimator is fitted on at most.
MAX_FITTED = 10_000
#: Of the states of right traces: what a threshold loses for which it is asked.
LOST = 0.05
#: Stands in a gate whose estimator is still to be fitted.
UNFITTED = SuccessEstimator(weights=(0.0,) * len(FEATURES), bias=0.0)

T = TypeVar("T")


class Read(Protocol):
    """What gives recorded traces, some at a time, as often as it is called."""

    def __call__(self, work: Callable[[Traces], T], /) -> Iterable[T]:
        """What some work makes of each part, in order; the work may be done in other processes."""


class CalibrationError(ValueError):
    """The traces do not carry a recommendation; the message says what would."""


@dataclass
class CrossFit:
    """A gate under which traces are judged, and the estimators that judge each fold.

    free: the same without the sources that must be asked, where there are such.
    """

    gate: Gate
    folds: list[SuccessEstimator] = field(default_factory=list)
    free: CrossFit | None = None

    def logits(self, traces: Traces) -> tuple[Array, Array]:
        """log V/(1 - V) at each token, [traces, tokens]: out of sample, and by the estimator that
        is to gate."""
        assert self.gate.estimator is not None
        which, recorded = traces.keys % len(self.folds), traces.recorded
        unseen, final = np.empty((2, *recorded.logprobs.T.shape)).transpose(0, 2, 1)
        told = recorded.told(self.gate.estimator.sources)
        for tokens, features in recorded.feature_blocks():
            beside = None if told is None else told[:, tokens]
            unseen[:, tokens] = logits_by(self.folds, which, features, beside)
            final[:, tokens] = self.gate.estimator.logits(features, beside)
        if self.free is not None:
            # Where the free estimate is good nobody is asked, and it stands.
            below = self.gate.schedule.below
            free_unseen, free_final = self.free.logits(traces)
            unseen = np.where(rough_probabilities(free_unseen) < below, unseen, free_unseen)
            final = np.where(rough_probabilities(free_final) < below, final, free_final)
        return unseen, final

    def asked(self, traces: Traces) -> NDArray[np.bool_]:
        """Where a source is asked, [traces, tokens]: on the schedule, where it was recorded."""
        recorded, schedule = traces.recorded, self.gate.schedule
        asked = decisive(self.gate, recorded)
        assert self.gate.estimator is not None
        told = recorded.told([name for name in self.gate.estimator.sources if name in ASKED])
        if told is not None:
            asked &= np.isfinite(told.sum(axis=-1))
        if self.free is not None:
            unseen, _ = self.free.logits(traces)
            asked &= rough_probabilities(unseen) < schedule.below
        return asked

    def values(self, traces: Traces) -> tuple[Array | None, Array | None]:
        """V of these; None where the gate has no estimator."""
        if self.gate.estimator is None:
            return None, None
        unseen, final = self.logits(traces)
        return probabilities(unseen), probabilities(final)


def learn(
    read: Read,
    base: Gate,
    *,
    folds: int,
    sources: tuple[SourceName, ...] = (),
    every: int = 0,
) -> CrossFit:
    """The statistics, and the estimators where the rule has one: one pass over the traces.

    Args:
        sources: what the estimators read beside the streams.
        every: tokens between two questions, made a multiple of those that were recorded.

    Raises:
        CalibrationError: no traces, or no outcomes to fit an estimator to.
    """
    count, total, squares = 0, 0.0, 0.0
    dealt: list[list[Dealt]] = [[] for _ in range(folds)]
    prompts: set[int] = set()
    cut = spared = fitted = 0
    first = sys.maxsize
    estimates = base.source == "stream"
    look = _Look(folds if estimates else 0, sources)
    for seen in read(look):
        count += seen.count
        total += seen.total
        squares += seen.squares
        cut += seen.cut
        spared += seen.spared
        first = min(first, seen.asked or first)
        prompts |= seen.prompts
        if fitted < MAX_FITTED:
            fitted += seen.known
            for parts, part in zip(dealt, seen.dealt, strict=False):
                parts.append(part)
        else:
            look.folds = 0  # what is still to be looked at needs no examples
    if not count:
        raise CalibrationError("no trace has a single token with its logprobs")
    statistics = RegretStatistics(decay=base.statistics.decay).moved_by(count, total, squares)
    gate = dataclasses.replace(base, version=base.version + 1, statistics=statistics)
    if not estimates:
        return CrossFit(gate)
    weighted = [_weighted(parts, spared_weight(cut, spared)) for parts in dealt]
    sets = [
        [part for j, parts in enumerate(weighted) if j != k for part in parts]
        for k in (None, *range(folds))
    ]
    # A core for each is much quicker than all for one, on matrices so narrow.
    free_sources = tuple(source for source in sources if source not in ASKED)
    with needed("threadpoolctl").threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        whole, *others = pool.map(partial(fit, sources=sources), sets)
        frees = (
            []
            if free_sources == sources
            else list(pool.map(partial(fit, sources=free_sources), sets))
        )
    if whole is not None and len(prompts) == 1:
        raise CalibrationError(
            f"{fitted} outcomes are known, all of one prompt: there is nothing to judge the "
            "estimator on that it was not fitted on; give traces of other prompts, too"
        )
    if whole is None or any(estimator is None for estimator in others):
        raise CalibrationError(
            f"{fitted} outcomes are known, too few of them right or too few wrong: there is "
            "nothing to tell apart"
        )
    own = [estimator for estimator in others if estimator is not None]
    if not frees or frees[0] is None:
        return CrossFit(dataclasses.replace(gate, estimator=whole), own)
    free = CrossFit(
        dataclasses.replace(gate, estimator=frees[0]),
        [estimator for estimator in frees[1:] if estimator is not None],
    )
    fitted_on = [part for fold in weighted for part in fold]
    asking = dataclasses.replace(
        gate,
        estimator=whole,
        free=frees[0],
        schedule=Schedule(
            every=-(-max(every, 1) // first) * first,
            below=_below(whole, frees[0], fitted_on),
        ),
    )
    return CrossFit(asking, own, free)


def _below(estimator: SuccessEstimator, free: SuccessEstimator, parts: Sequence[Examples]) -> float:
    """Where to ask, were the estimate that asks to lose `LOST` of the states of right traces."""
    features = np.concatenate([part.features for part in parts]).astype(np.float64)
    right = np.concatenate([part.outcomes for part in parts])
    stream, told = features[:, : len(FEATURES)], features[:, len(FEATURES) :]
    whole = estimator.logits(stream, told)
    alone = free.logits(stream, told[:, : len(free.weights) - len(FEATURES)])
    return asked_below(rough_probabilities(alone), whole <= np.quantile(whole[right], LOST))


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


#: Examples, and which are of spared traces: what these weigh is known when all are counted.
Dealt = tuple[Examples, NDArray[np.bool_]]


@dataclass(frozen=True)
class _Seen:
    """What some traces bring to `learn`.

    count, total, squares: of g. known: outcomes; prompts: keys of theirs. dealt: examples by fold.
    asked: the first token at which a source was asked; None: none was.
    """

    count: int
    total: float
    squares: float
    cut: int
    spared: int
    known: int
    prompts: set[int]
    dealt: list[Dealt]
    asked: int | None = None


@dataclass
class _Look:
    """The work of `learn` on some traces. folds: 0: no examples are wanted."""

    folds: int
    sources: tuple[SourceName, ...] = ()

    def __call__(self, traces: Traces) -> _Seen:
        recorded = traces.recorded
        regrets = recorded.regrets.T[recorded.known.T]  # as it lies in memory
        known = ~np.isnan(traces.correct)
        return _Seen(
            count=regrets.size,
            total=float(regrets.sum()),
            squares=float((regrets**2).sum()),
            cut=int(traces.cut.sum()),
            spared=int(traces.spared.sum()),
            known=int(known.sum()),
            prompts={*traces.keys[known].tolist()},
            dealt=self._dealt(traces, known) if self.folds else [],
            asked=_first_asked(recorded, self.sources),
        )

    def _dealt(self, traces: Traces, known: NDArray[np.bool_]) -> list[Dealt]:
        if np.isnan(traces.recorded.prompt_tokens).any():
            raise CalibrationError("the estimator needs prompt_tokens, and a trace has none")
        traces = traces.where(known)
        every = examples(traces.recorded, traces.correct == 1.0, np.ones(len(traces)), self.sources)
        folds = traces.keys[every.rollouts] % self.folds
        spared = traces.spared[every.rollouts]
        return [(every.where(folds == k), spared[folds == k]) for k in range(self.folds)]


def _first_asked(recorded: Recorded, sources: Sequence[SourceName]) -> int | None:
    """The first token at which all that are asked have answered some trace."""
    probed = None if recorded.probes is None else recorded.probes[..., 0]
    answers = [
        np.isfinite(numbers)
        for name, numbers in (("critic", recorded.critic), ("probe", probed))
        if name in sources and numbers is not None
    ]
    asked = np.logical_and.reduce(answers).any(axis=0) if answers else np.zeros(1, bool)
    return int(asked.argmax()) + 1 if asked.any() else None


def _weighted(parts: list[Dealt], weight: float) -> list[Examples]:
    return [
        dataclasses.replace(
            part, weights=np.where(spared, weight, 1.0).astype(np.float32) * part.weights
        )
        for part, spared in parts
    ]
