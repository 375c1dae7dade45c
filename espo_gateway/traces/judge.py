"""Every stop rule over recorded full rollouts, in one pass that keeps little of each.

Of a rollout and a rule stay its worst score and where each of a grid of thresholds would have cut
it: about the same memory however long rollouts are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.estimate import logits_by, probabilities
from espo_gateway.stop.regret import Array
from espo_gateway.stop.replay import Replay, crossings
from espo_gateway.stop.rules import RULES, Gate
from espo_gateway.traces.cross_fit import UNFITTED, Fit, Read, learn
from espo_gateway.traces.detection import Judged
from espo_gateway.traces.reader import Chunk
from espo_gateway.traces.recommend import CalibrationError, check_spared, spared_weight

_POINTS = 121
#: Thresholds that each rule is tried with, from strict to loose.
GRIDS: Mapping[str, Array] = {
    "beta": np.geomspace(20.0, 0.1, _POINTS),
    "p_star": 1.0 / (1.0 + np.exp(np.linspace(13.8, -6.9, _POINTS))),
    "confidence": np.geomspace(1e-3, 1e3, _POINTS),
    "hazard": np.geomspace(1e-6, 0.5, _POINTS),
}
_NO_LIMITS = np.empty(0)
BASE = Gate(rule="success-probability", estimator=UNFITTED)


@dataclass
class Judgement:
    """One rule over all rollouts.

    cuts: tokens kept under each of the rule's grid, 0 for no stop, [rollouts, thresholds].
    levels: how strict a gate still stops each rollout, [rollouts].
    rehearsed: the same by the gate's own estimator, which has seen these rollouts.
    """

    gate: Gate
    cuts: NDArray[np.int32]
    levels: Array
    rehearsed: Array


@dataclass
class Replayed:
    """What a pass over the rollouts gives.

    left_out: rollouts that were cut, or whose outcome is unknown.
    """

    judged: Judged
    rules: dict[str, Judgement]
    left_out: int


def gates(learnt: Fit, chunk: Chunk) -> dict[str, Gate]:
    """The rules that a chunk's columns allow, by the name of their row."""
    gate = learnt.gate
    made: dict[str, dict[str, Any]] = {
        "value-gated (stream)": {"rule": "value-gated", "value": "stream"},
        "regret-only": {"rule": "regret-only"},
        "success-probability": {"rule": "success-probability"},
        "surprise": {"rule": "surprise"},
        "random": {"rule": "random"},
    }
    if chunk.values is not None:
        made["value-gated (critic)"] = {"rule": "value-gated", "value": "critic"}
        made["value-only (critic)"] = {"rule": "value-only", "value": "critic"}
    if chunk.confidences is not None:
        made["confidence"] = {"rule": "confidence"}
    return {name: dataclasses.replace(gate, **fields) for name, fields in made.items()}


def fitted(read: Read, folds: int) -> Fit:
    """Statistics and estimators from rollouts with outcomes. Raises CalibrationError."""
    return learn(read, BASE, folds=folds)


def fitted_elsewhere(read: Read) -> Fit:
    """The same from rollouts of another run, all of which judge those of this one."""
    learnt = learn(read, BASE, folds=2)
    assert learnt.gate.estimator is not None
    return Fit(learnt.gate, [learnt.gate.estimator])


def grid_of(gate: Gate) -> Array:
    """The thresholds a rule is tried with, from strict to loose."""
    name = RULES[gate.rule].threshold
    assert name is not None
    return GRIDS[name]


def replayed(read: Read, learnt: Fit) -> Replayed:
    """One pass.

    Raises:
        CalibrationError: no rollout was generated to its end and has an outcome, all have the same
            one, of those that were cut none was audited, or only some have a column.
    """
    columns: dict[str, list[NDArray[Any]]] = {}
    parts: dict[str, list[tuple[NDArray[np.int32], Array, Array]]] = {}
    made: dict[str, Gate] = {}
    cut = spared = traces = left_out = 0
    for chunk in read():
        traces += chunk.cut.size
        cut += int(chunk.cut.sum())
        spared += int(chunk.spared.sum())
        rows = ~chunk.cut & ~np.isnan(chunk.correct)
        left_out += int((~rows).sum())
        if not rows.any():
            continue
        chunk = only(chunk, rows)
        for name in ("keys", "lengths", "prompt_tokens", "correct", "spared"):
            columns.setdefault(name, []).append(getattr(chunk, name))
        there = gates(learnt, chunk)
        if made and there.keys() != made.keys():
            differing = ", ".join(sorted(there.keys() ^ made.keys()))
            raise CalibrationError(
                f"only some of the rollouts carry what these rules need: {differing}; "
                "replay them apart"
            )
        made = there
        for name, found in judge(chunk, learnt, made):
            parts.setdefault(name, []).append(found)
    check_spared(cut, spared, traces)
    if not made:
        raise CalibrationError(
            "no rollout was generated to its end and has an outcome; record with stopping off, in "
            "shadow mode or with audits, and give the outcomes (--outcomes)"
        )
    whole = {name: np.concatenate(found) for name, found in columns.items()}
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
    )
    rules = {}
    for name, gate in made.items():
        cuts, levels, rehearsed = map(np.concatenate, zip(*parts.pop(name), strict=True))
        rules[name] = Judgement(gate, cuts, levels, rehearsed)
    return Replayed(judged, rules, left_out)


def judge(
    chunk: Chunk, learnt: Fit, made: Mapping[str, Gate]
) -> list[tuple[str, tuple[NDArray[np.int32], Array, Array]]]:
    """Cuts, levels and rehearsed levels of a chunk's rollouts under each rule."""
    replay = Replay(
        chunk.logprobs,
        chunk.max_logprobs,
        chunk.prompt_tokens,
        completed_at=chunk.completed_at,
        confidences=chunk.confidences,
    )
    which = chunk.keys % len(learnt.folds)
    unseen = probabilities(logits_by(learnt.folds, which, replay.features))
    assert learnt.gate.estimator is not None
    final = probabilities(learnt.gate.estimator.logits(replay.features))
    del replay.features
    said = None if chunk.values is None else learnt.gate.success(chunk.values)
    sources = {"stream": unseen, "critic": said, "constant": None, None: None}
    found = []
    for name, gate in made.items():
        cuts, levels = crossings(
            gate.rule, replay.scores(gate, sources[gate.source]), grid_of(gate)
        )
        rehearsed = levels
        if gate.source == "stream" and len(learnt.folds) > 1:
            _, rehearsed = crossings(gate.rule, replay.scores(gate, final), _NO_LIMITS)
        found.append((name, (cuts.astype(np.int32), levels, rehearsed)))
    return found


def only(chunk: Chunk, rows: NDArray[np.bool_]) -> Chunk:
    """Some of a chunk's rollouts."""
    if rows.all():
        return chunk
    fields = {
        field.name: getattr(chunk, field.name)
        for field in dataclasses.fields(chunk)
        if getattr(chunk, field.name) is not None
    }
    return dataclasses.replace(chunk, **{name: column[rows] for name, column in fields.items()})
