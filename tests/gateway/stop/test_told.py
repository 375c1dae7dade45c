"""What is told of a stream beside its tokens: asked on a schedule; live and replayed are equal."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.stop import fit as estimator
from espo_gateway.stop.estimate import FEATURES, SuccessEstimator
from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.replay import estimated, first_stops
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import PROBED, TOLD, Answers, Probe, Schedule, SourceName, in_order
from espo_gateway.stop.watch import Verdict, Watch
from tests.gateway.stop.test_watch import CONSTANTS, Row, recorded, streams

numbers = st.one_of(st.floats(-20, 0), st.just(math.nan))
sources = st.sets(st.sampled_from(list(TOLD))).map(list).map(in_order)
schedules = st.builds(
    Schedule, every=st.integers(1, 9), growth=st.floats(0, 1), below=st.sampled_from([1.0, 0.6])
)


@st.composite
def estimators(draw: st.DrawFn, wanted: tuple[SourceName, ...]) -> SuccessEstimator:
    count = len(FEATURES) + sum(len(TOLD[source]) for source in wanted)
    weights = draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))
    return SuccessEstimator(tuple(weights), draw(st.floats(-3, 3)), wanted)


def live(gate: Gate, row: Row, history: float, critic: Any, probes: Any) -> tuple[int, list[int]]:
    """The cut, and the tokens that were asked about; sources answer at once."""
    known = None if math.isnan(history) else history
    watch, asked = Watch(gate, 3, history=known), []
    for t, pair in enumerate(row):
        if watch.push(*pair) is Verdict.ASK:
            asked.append(t + 1)
            answers: dict[SourceName, list[float]] = {"critic": [critic[t]], "probe": probes[t]}
            told: Answers = {
                source: answer
                for source, answer in answers.items()
                if not any(map(math.isnan, answer))
            }
            watch.settle(t + 1, watch.valued(t + 1, told))
    return watch.cut or 0, asked


@given(streams, sources, schedules, st.data())
def test_replay_equals_the_live_decision(
    rows: list[Row], wanted: tuple[SourceName, ...], schedule: Schedule, data: st.DataObject
) -> None:
    shape = len(rows), max(map(len, rows))
    history = np.array([data.draw(numbers) for _ in rows])
    many_numbers = st.lists(numbers, min_size=4 * shape[1], max_size=4 * shape[1])
    told = np.resize(np.array(data.draw(many_numbers)), (*shape, 1 + PROBED))
    told[np.isnan(told[..., 1:]).any(axis=-1), 1:] = math.nan
    free: tuple[SourceName, ...] = tuple(s for s in wanted if s == "history")
    rules: list[dict[str, Any]] = [
        {"rule": "success-probability", "p_star": 0.4},
        {"rule": "value-gated", "beta": 0.7},
    ]
    for rule in rules:
        gate = Gate(
            value="stream",
            estimator=data.draw(estimators(wanted)),
            free=data.draw(estimators(free)),
            schedule=schedule,
            min_tokens=2,
            **rule,
            **CONSTANTS,
        )
        many = recorded(rows, 3, history=history, critic=told[..., 0], probes=told[..., 1:])
        cuts = first_stops(gate, many).tolist()
        alone = [
            live(gate, row, history[i], told[i, :, 0], told[i, :, 1:].tolist())
            for i, row in enumerate(rows)
        ]
        assert cuts == [cut for cut, _ in alone]
        for (_, asked), row in zip(alone, rows, strict=True):
            assert set(asked) <= set(schedule.tokens(len(row)).tolist())


@given(schedules, st.integers(0, 3000))
def test_a_schedule_is_sparser_as_a_stream_grows(schedule: Schedule, length: int) -> None:
    tokens = schedule.tokens(length)
    assert (tokens % schedule.every == 0).all()
    gaps = np.diff(tokens)
    assert (gaps >= schedule.every).all()
    assert (gaps >= schedule.growth * tokens[:-1]).all()
    assert (gaps <= schedule.growth * tokens[:-1] + 2 * schedule.every).all()
    assert Schedule(every=0).tokens(length).size == 0


def test_a_stream_is_asked_about_though_no_rule_stops_it_yet() -> None:
    watch = Watch(Gate(schedule=Schedule(every=4, growth=0.0)), 3)
    verdicts = [watch.push(None if t == 3 else -0.1, -0.1) for t in range(12)]
    # Without its logprobs a token is no state that anyone could judge; the next ones are.
    assert [t + 1 for t, verdict in enumerate(verdicts) if verdict is Verdict.ASK] == [8, 12]
    assert watch.valued(8, {"probe": (-1.0, -2.0, -0.1)}) is None
    assert watch.settle(8, None) is Verdict.GO


def test_nobody_is_asked_where_there_is_no_one_to_ask() -> None:
    watch = Watch(Gate(schedule=Schedule(every=1)), 3, asks=False)
    assert {watch.push(-0.1, -0.1) for _ in range(9)} == {Verdict.GO}


def test_what_a_source_knows_is_learnt_where_it_has_answered() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random(400) < 0.4
    probes = np.full((400, 64, PROBED), np.nan)
    probes[:, 15::16] = np.where(correct, -1.0, -6.0)[:, None, None]
    probes[:, 15::16] += rng.normal(0, 2.0, (400, 4, PROBED))
    logprobs = rng.normal(-0.5, 0.1, (400, 64))
    many = Recorded(logprobs, np.maximum(logprobs, -0.4), np.full(400, 9.0), probes=probes)
    examples = estimator.examples(many, correct, np.ones(400), ("probe",))
    assert len(examples.outcomes) == 4 * 400
    whole, free = estimator.fit([examples], ("probe",)), estimator.fit([examples], ())
    assert whole is not None
    assert free is not None
    assert (whole.sources, free.sources) == (("probe",), ())

    def explained(one: SuccessEstimator) -> float:
        p = 1.0 / (1.0 + np.exp(-estimated(one, many)))
        found = estimator.explained_variance(many, correct, np.ones(400), p)
        assert found is not None
        return found

    assert explained(whole) > 0.5 > 0.1 > explained(free)


def test_an_estimator_that_asks_needs_a_schedule() -> None:
    count = len(FEATURES) + len(TOLD["probe"])
    asking = SuccessEstimator((0.0,) * count, 0.0, ("probe",))
    with pytest.raises(ValueError, match=r"schedule\.every"):
        Gate(rule="success-probability", estimator=asking)
    gate = Gate(rule="success-probability", estimator=asking, schedule=Schedule(every=8))
    with pytest.raises(ValueError, match="free"):
        dataclasses.replace(gate, free=asking)
    with pytest.raises(ValueError, match="sources"):
        SuccessEstimator((0.0,) * (count + 1), 0.0, ("probe", "history"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("every", -1), ("growth", -0.1), ("growth", math.nan), ("below", 0.0), ("below", 1.1)],
)
def test_a_schedule_out_of_range_names_the_field(field: str, value: float) -> None:
    settings: Any = {field: value}
    with pytest.raises(ValueError, match=field):
        Schedule(**settings)


@pytest.mark.parametrize("field", ["phrase", "answer"])
@pytest.mark.parametrize("ids", [[], [3, -1]])
def test_a_probe_is_made_of_token_ids(field: str, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=field):
        Probe(**{"phrase": [1], "answer": [2], field: ids})
