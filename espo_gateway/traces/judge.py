"""Every stop rule over recorded full rollouts, in one pass that keeps little of each.

Of a rollout and a rule stay its worst score and where each of a grid of thresholds would have cut
it: about the same memory however long rollouts are.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.regret import Array
from espo_gateway.stop.replay import crossings
from espo_gateway.stop.rules import RULES, Gate, threshold_of
from espo_gateway.stop.told import ASKED, TOLD, SourceName, in_order
from espo_gateway.traces.cross_fit import (
    UNFITTED,
    CalibrationError,
    CrossFit,
    Read,
    check_spared,
    learn,
    spared_weight,
)
from espo_gateway.traces.detection import Judged
from espo_gateway.traces.reader import Traces, unnamed

#: Tokens at which scores are held against outcomes: two to each doubling.
LOOKS = tuple(sorted({16, *(step * 2**k for k in range(4, 17) for step in (2, 3))}))

BASE = Gate(rule="success-probability", estimator=UNFITTED)


@dataclass
class Judgement:
    """One rule over all rollouts.

    cuts: tokens kept under each of the rule's grid, 0 for no stop, [rollouts, thresholds].
    levels: how strict a gate still stops each rollout, [rollouts].
    rehearsed: the same by the gate's own estimator, which has seen these rollouts.
    looked_at: the score at each of `LOOKS`, lower is worse, NaN where there is none, [rollouts,
        looks].
    asked: questions to a probe up to each of the cuts, or to the end, [rollouts, thresholds]; None
        where it is not asked.
    """

    gate: Gate
    cuts: NDArray[np.int32]
    levels: Array
    rehearsed: Array
    looked_at: Array
    asked: NDArray[np.int32] | None = None

    def undecided(self, rollouts: int) -> Judgement:
        """The same rule over so many that carry nothing of what it needs."""
        thresholds = self.cuts.shape[1]
        never = np.full(rollouts, np.inf)
        return dataclasses.replace(
            self,
            cuts=np.zeros((rollouts, thresholds), np.int32),
            levels=never,
            rehearsed=never,
            looked_at=np.full((rollouts, len(LOOKS)), np.nan),
            asked=None if self.asked is None else np.zeros((rollouts, thresholds), np.int32),
        )


@dataclass(frozen=True)
class Survey:
    """What rollouts carry.

    keys, by_prompt: of their prompts (`Trace`), [rollouts]. told: of each of what some rules need
    beside the tokens, how many rollouts have any; those that were cut count, as none is judged.
    """

    keys: NDArray[np.uint32]
    by_prompt: NDArray[np.bool_]
    told: Counter[str]

    @classmethod
    def of(cls, parts: Iterable[Survey]) -> Survey:
        parts = list(parts)
        return cls(
            np.concatenate([np.empty(0, np.uint32), *(part.keys for part in parts)]),
            np.concatenate([np.empty(0, bool), *(part.by_prompt for part in parts)]),
            sum((part.told for part in parts), Counter[str]()),
        )

    @property
    def combinations(self) -> list[tuple[SourceName, ...]]:
        """What estimators may read beside the stream: each source that is asked, and all of them;
        with whatever costs nothing."""
        there = [name for name in TOLD if self.told[name]]
        asked = [name for name in there if name in ASKED]
        sets = [[name] for name in asked] if len(asked) > 1 else []
        sets += [asked] if there else []
        return [in_order([*(set(there) - ASKED), *some]) for some in sets]

    def warnings(self) -> list[str]:
        """Where prompts are not known, or rules judged on rollouts of which they know nothing."""
        every = self.keys.size
        return unnamed(int((~self.by_prompt).sum())) + [
            f"{every - some:,} of {every:,} rollouts carry nothing of {name!r}: rules that need it "
            "are judged on them, too, and stop none; to see what it tells, replay the others alone"
            for name, some in self.told.items()
            if some < every
        ]


def survey(traces: Traces) -> Survey:
    """Of some rollouts."""
    recorded = traces.recorded
    answers = {
        "history": recorded.history,
        "critic": recorded.critic,
        "probe": None if recorded.probes is None else recorded.probes.sum(axis=-1),
        "confidence": recorded.confidences,
    }
    told = Counter[str]()
    for name, numbers in answers.items():
        if numbers is not None:
            said = np.isfinite(numbers.reshape(len(traces), -1)).any(axis=1)
            told[name] = int((said | traces.cut).sum()) if said.any() else 0
    return Survey(traces.keys, traces.by_prompt, +told)


@dataclass
class Replayed:
    """What a pass over the rollouts gives.

    left_out: rollouts that were cut, or whose outcome is unknown.
    """

    judged: Judged
    rules: dict[str, Judgement]
    left_out: int


def gates(learnt: CrossFit, traces: Traces) -> dict[str, Gate]:
    """The rules that the traces' columns allow, by the name of their row."""
    gate = learnt.gate
    made: dict[str, dict[str, Any]] = {
        "value-gated (stream)": {"rule": "value-gated", "value": "stream"},
        "regret-only": {"rule": "regret-only"},
        "success-probability": {"rule": "success-probability"},
        "surprise": {"rule": "surprise"},
        "length": {"rule": "length"},
        "random": {"rule": "random"},
    }
    if traces.recorded.critic is not None:
        made["value-gated (critic)"] = {"rule": "value-gated", "value": "critic"}
        made["value-only (critic)"] = {"rule": "value-only", "value": "critic"}
    if traces.recorded.confidences is not None:
        made["confidence"] = {"rule": "confidence"}
    return {name: dataclasses.replace(gate, **fields) for name, fields in made.items()}


def fitted(
    read: Read, folds: int, sources: tuple[SourceName, ...] = (), every: int = 0
) -> CrossFit:
    """Statistics and estimators from rollouts with outcomes; see `learn`.

    Raises CalibrationError.
    """
    return learn(read, BASE, folds=folds, sources=sources, every=every)


def fitted_elsewhere(read: Read, sources: tuple[SourceName, ...] = (), every: int = 0) -> CrossFit:
    """The same from rollouts of another run, all of which judge those of this one."""

    def whole(learnt: CrossFit) -> CrossFit:
        assert learnt.gate.estimator is not None
        free = None if learnt.free is None else whole(learnt.free)
        return CrossFit(learnt.gate, [learnt.gate.estimator], free)

    return whole(learn(read, BASE, folds=2, sources=sources, every=every))


def replayed(read: Read, learnt: CrossFit, told: Sequence[CrossFit] = ()) -> Replayed:
    """One pass.

    Args:
        told: estimators that read sources beside the streams.

    Raises:
        CalibrationError: no rollout was generated to its end and has an outcome, all have the same
            one, or of those that were cut none was audited.
    """
    cut = spared = count = left_out = 0
    parts: list[Part] = []
    made: dict[str, Judgement] = {}
    for part in read(partial(judge, learnt, told)):
        count += part.count
        cut += part.cut
        spared += part.spared
        left_out += part.count - len(part.columns["keys"])
        if not part.judgements:
            continue
        made = {**part.judgements, **made}
        parts.append(part)
    check_spared(cut, spared, count)
    if not made:
        raise CalibrationError(
            "no rollout was generated to its end and has an outcome; record with stopping off, in "
            "shadow mode or with audits, and give the outcomes (--outcomes)"
        )
    whole = {
        name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns
    }
    correct = whole["correct"] == 1.0
    if correct.all() or not correct.any():
        raise CalibrationError(
            f"all of the {correct.size} rollouts are {'right' if correct.all() else 'wrong'}: "
            "there is no failure to tell from a success"
        )
    judged = Judged(
        prompts=np.unique(whole["keys"], return_inverse=True)[1],
        lengths=whole["lengths"],
        prompt_tokens=whole["prompt_tokens"],
        correct=correct,
        weights=np.where(whole["spared"], spared_weight(cut, spared), 1.0),
        sessions=whole["sessions"],
    )
    rules = {}
    for name, first in made.items():
        found = [
            part.judgements.pop(name)
            if name in part.judgements
            else first.undecided(len(part.columns["keys"]))
            for part in parts
        ]
        columns: dict[str, Any] = {
            column: np.concatenate([getattr(each, column) for each in found])
            for column in ("cuts", "levels", "rehearsed", "looked_at", "asked")
            if getattr(found[0], column) is not None
        }
        rules[name] = Judgement(first.gate, **columns)
    return Replayed(judged, rules, left_out)


@dataclass
class Part:
    """What some of the traces bring to `replayed`.

    columns: of those judged. judgements: empty where none is.
    """

    count: int
    cut: int
    spared: int
    columns: dict[str, NDArray[Any]]
    judgements: dict[str, Judgement]


def judge(learnt: CrossFit, told: Sequence[CrossFit], traces: Traces) -> Part:
    """Some rollouts under each rule."""
    rows = ~traces.cut & ~np.isnan(traces.correct)
    there = traces.where(rows)
    return Part(
        count=len(traces),
        cut=int(traces.cut.sum()),
        spared=int(traces.spared.sum()),
        columns={
            name: getattr(there, name)
            for name in ("keys", "lengths", "correct", "spared", "sessions")
        }
        | {"prompt_tokens": there.recorded.prompt_tokens},
        judgements=_judgements(learnt, told, there) if rows.any() else {},
    )


def _judgements(learnt: CrossFit, told: Sequence[CrossFit], traces: Traces) -> dict[str, Judgement]:
    found = _judged(learnt, gates(learnt, traces), traces)
    for one in told:
        assert one.gate.estimator is not None
        beside = " + ".join(one.gate.estimator.sources)
        made = {
            f"{name} + {beside}": dataclasses.replace(gate, free=None)
            for name, gate in gates(one, traces).items()
            if gate.source == "stream"
        }
        found |= _judged(one, made, traces)
    return found


def _questions(
    gate: Gate, recorded: Recorded, grid: Array, asks: NDArray[np.bool_], ends: NDArray[Any]
) -> NDArray[np.int32]:
    """How many there are up to each of the ends; where z is too low for any V nobody is asked."""
    rule, threshold = RULES[gate.rule], threshold_of(gate.rule)
    places = np.flatnonzero(asks.any(axis=0))
    asks, z = asks[:, places], recorded.z(gate.statistics, gate.monitor)[:, places]
    counts = np.empty(ends.shape, np.int32)
    for k, limit in enumerate(grid):
        floor = rule.floor(threshold.set(gate, float(limit)))
        counts[:, k] = (asks & (z > floor) & (places < ends[:, k, None])).sum(axis=1)
    return counts


def _judged(learnt: CrossFit, made: Mapping[str, Gate], traces: Traces) -> dict[str, Judgement]:
    recorded = traces.recorded
    unseen, final = learnt.logits(traces)
    estimator = learnt.gate.estimator
    asks = learnt.asked(traces) if estimator and "probe" in estimator.sources else None
    found = {}
    for name, gate in made.items():
        grid, streams = threshold_of(gate.rule).grid, gate.source == "stream"
        judged = crossings(gate, recorded, grid, unseen if streams else None, LOOKS)
        rehearsed = judged.levels
        if streams and len(learnt.folds) > 1:
            rehearsed = crossings(gate, recorded, grid[:0], final).levels
        asked = None
        if streams and asks is not None:
            ends = np.where(judged.cuts, judged.cuts, traces.lengths[:, None])
            asked = _questions(gate, recorded, grid, asks, ends)
        if learnt.free is not None:
            gate = dataclasses.replace(gate, free=learnt.free.gate.estimator)
        found[name] = Judgement(
            gate, judged.cuts.astype(np.int32), judged.levels, rehearsed, judged.looked_at, asked
        )
    return found
