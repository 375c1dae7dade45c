"""The stop rules: the paper's gate as written, replay equal to live, the lazy critic exact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from random import Random
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.stop import regret
from espo_gateway.stop.estimate import (
    FEATURES,
    StreamStatistics,
    SuccessEstimator,
    feature_blocks,
    sigmoid,
)
from espo_gateway.stop.recorded import Recorded, pad
from espo_gateway.stop.regret import (
    MonitorConfig,
    RegretStatistics,
)
from espo_gateway.stop.replay import crossings, estimated, first_stops, scores, stop_levels
from espo_gateway.stop.rules import (
    BETA,
    CONFIDENCE,
    HAZARD,
    LENGTH,
    P_STAR,
    RULES,
    Gate,
    RuleName,
    Threshold,
    threshold_of,
)
from espo_gateway.stop.watch import Verdict, Watch
from tests.gateway.stop.reference import RegretMonitor, surrogate_regret

Pair = tuple[float | None, float | None]
Row = list[Pair]

CONSTANTS: dict[str, Any] = {
    "statistics": RegretStatistics(mean=0.2, variance=0.5),
    "monitor": MonitorConfig(clip=5.0),
}

token = st.one_of(
    st.tuples(st.floats(-12, 0), st.floats(0, 8)).map(lambda x: (x[0], x[0] + x[1])),
    st.sampled_from([(None, None), (math.nan, -0.1), (-9999.0, -0.1), (-0.5, math.inf)]),
)
streams = st.lists(st.lists(token, max_size=25), min_size=1, max_size=5)
estimators = st.builds(
    SuccessEstimator,
    weights=st.tuples(*[st.floats(-2, 2)] * len(FEATURES)),
    bias=st.floats(-3, 3),
)


def gates(estimator: SuccessEstimator, version: int = 0) -> list[Gate]:
    """Every rule with every source of V."""
    common: dict[str, Any] = {**CONSTANTS, "version": version, "estimator": estimator}
    values: list[dict[str, Any]] = [
        {"value": value, "constant": 0.6} for value in ("constant", "stream", "critic")
    ]
    return [
        Gate(rule="none"),
        *(Gate(rule="value-gated", beta=0.7, epsilon=0.3, **value, **common) for value in values),
        *(Gate(rule="value-only", p_star=0.7, min_tokens=2, **value, **common) for value in values),
        Gate(rule="regret-only", beta=0.4, min_tokens=1, **common),
        Gate(rule="success-probability", p_star=0.4, **common),
        Gate(rule="surprise", beta=0.9, min_tokens=2, **common),
        *(
            Gate(rule="confidence", confidence=0.8, confidence_window=window, **common)
            for window in (1, 5, 100)
        ),
        Gate(rule="random", hazard=0.2, **common),
        Gate(rule="length", beta=6.0, **common),
    ]


def recorded(rows: Sequence[Sequence[Pair]], prompt_tokens: int = 1, **arrays: Any) -> Recorded:
    """Rows of (logprob, max_logprob) as a replay gets them."""
    return Recorded(
        pad([[math.nan if logprob is None else logprob for logprob, _ in row] for row in rows]),
        pad([[math.nan if best is None else best for _, best in row] for row in rows]),
        np.full(len(rows), float(prompt_tokens)),
        **arrays,
    )


def live_cut(
    gate: Gate,
    row: Row,
    prompt_tokens: int,
    *,
    completed: bool = False,
    values: Sequence[float] = (),
    confidences: Sequence[float] = (),
) -> int:
    """What `Watch` decides on one stream, a critic answering at once."""
    watch = Watch(gate, prompt_tokens)
    for t, pair in enumerate(row):
        told = None if not confidences or math.isnan(confidences[t]) else confidences[t]
        last = completed and t == len(row) - 1
        verdict = watch.push(*pair, last=last, confidence=told)
        if verdict is Verdict.ASK:
            verdict = watch.settle(t + 1, None if math.isnan(values[t]) else values[t])
        assert (verdict is Verdict.STOP) == (watch.cut == t + 1)
    return watch.cut or 0


@given(
    streams,
    estimators,
    st.integers(1, 500),
    st.lists(st.booleans(), min_size=5, max_size=5),
    st.lists(st.one_of(st.floats(-0.5, 1.5), st.just(math.nan)), min_size=25, max_size=25),
    st.lists(st.one_of(st.floats(0, 3), st.just(math.nan)), min_size=25, max_size=25),
)
def test_replay_equals_the_live_decision_token_for_token(
    rows: list[Row],
    estimator: SuccessEstimator,
    prompt_tokens: int,
    completed: list[bool],
    answers: list[float],
    confidences: Sequence[float],
) -> None:
    lengths = [len(row) for row in rows]
    ends = np.array([n if done else 0 for n, done in zip(lengths, completed, strict=False)])
    values, sure = (
        np.array([numbers[: max(lengths)]] * len(rows)) for numbers in (answers, confidences)
    )
    for gate in gates(estimator, version=prompt_tokens):
        live = [
            live_cut(
                gate, row, prompt_tokens, completed=done, values=answers, confidences=confidences
            )
            for row, done in zip(rows, completed, strict=False)
        ]
        replayed = recorded(rows, prompt_tokens, completed_at=ends, critic=values, confidences=sure)
        assert first_stops(gate, replayed).tolist() == live


@given(streams, estimators, st.integers(1, 40), st.data())
def test_all_limits_at_once_cut_where_each_alone_does(
    rows: list[Row], estimator: SuccessEstimator, block: int, data: st.DataObject
) -> None:
    """However the tokens are dealt to blocks, and for limits that scores are equal to, or miss by
    the last bit."""
    replayed = recorded(
        rows,
        prompt_tokens=9,
        critic=np.resize([0.2, math.nan, 0.9], (len(rows), max(map(len, rows)))),
        confidences=np.resize([0.3, 2.0, math.nan, 1.1], (len(rows), max(map(len, rows)))),
    )
    for gate in gates(estimator)[1:]:
        threshold = threshold_of(gate.rule)
        seen = scores(gate, replayed)
        usable = sorted({*seen[(seen > 0) & (seen < 1)].tolist()}) or [0.5]
        near = [n for score in usable for n in np.nextafter(score, [score, 0.0, 1.0])]
        drawn = data.draw(st.lists(st.sampled_from(near), min_size=1, max_size=8))
        limits = np.array(sorted(set(drawn), reverse=threshold.above))
        limits = limits[(limits > 0.0) & (limits < 1.0)]
        streams_v = estimated(estimator, replayed) if gate.source == "stream" else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(regret, "BLOCK", block)
            again = replayed.where(np.arange(len(rows)))
            found = crossings(gate, again, limits, streams_v)
        for limit, cuts in zip(limits.tolist(), found.cuts.T, strict=True):
            assert cuts.tolist() == first_stops(threshold.set(gate, limit), replayed).tolist()
        assert found.levels == pytest.approx(stop_levels(gate, replayed), rel=1e-9, abs=1e-9)


@given(streams, st.integers(1, 40), estimators)
def test_blocks_change_nothing_of_what_is_kept_of_a_stream(
    rows: list[Row], block: int, estimator: SuccessEstimator
) -> None:
    gate = Gate(rule="random", hazard=0.2, **CONSTANTS)
    whole = recorded(rows, prompt_tokens=9)
    none = np.empty((len(rows), 0, len(FEATURES)))
    features = np.concatenate([none, *(part for _, part in whole.feature_blocks())], axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regret, "BLOCK", block)
        parts = recorded(rows, prompt_tokens=9)
        chosen = parts.known & (np.arange(parts.known.shape[1]) % 3 == 1)
        for of in (
            lambda one: one.regrets,
            lambda one: estimated(estimator, one),
            lambda one: one.z(gate.statistics, gate.monitor),
            lambda one: RULES["random"].tracks(gate, one),
        ):
            np.testing.assert_array_equal(of(parts), of(whole))
        np.testing.assert_array_equal(parts.features_where(chosen), features[chosen])


@given(streams, estimators, st.booleans(), st.floats(0.001, 0.999), st.floats(-0.5, 1.5))
def test_a_rollout_is_stopped_by_just_the_gates_above_its_level(
    rows: list[Row], estimator: SuccessEstimator, done: bool, share: float, said: float
) -> None:
    shape = len(rows), max(map(len, rows))
    replayed = recorded(
        rows,
        prompt_tokens=7,
        completed_at=np.array([len(row) * done for row in rows]),
        critic=np.full(shape, said),
        confidences=np.resize([0.3, 2.0, math.nan, 1.1], shape),
    )
    for gate in gates(estimator)[1:]:
        levels = stop_levels(gate, replayed)
        threshold = threshold_of(gate.rule)
        limit = share if threshold in (P_STAR, HAZARD) else 5 * share
        level = threshold.level(limit)
        assert threshold.at(level) == pytest.approx(limit)
        stopped = first_stops(threshold.set(gate, limit), replayed) > 0
        clear = np.abs(levels - level) > 1e-9  # a logarithm may round across the threshold
        assert (stopped == (levels < level))[clear].all()


@pytest.mark.parametrize(
    ("threshold", "loose", "strict"),
    [
        (BETA, 2.0, 3.0),
        (P_STAR, 0.1, 0.05),
        (HAZARD, 0.1, 0.05),
        (CONFIDENCE, 2.0, 1.0),
        (LENGTH, 9, 80),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_a_higher_level_is_a_looser_threshold(
    threshold: Threshold, loose: float, strict: float
) -> None:
    assert threshold.level(loose) > threshold.level(strict)
    assert threshold.level(threshold.loosest) > threshold.level(threshold.strictest)
    assert (np.diff(threshold.level(threshold.grid)) > 0).all()


def test_the_rule_that_never_stops_has_no_threshold() -> None:
    with pytest.raises(ValueError, match="'none' has no threshold"):
        threshold_of("none")


def test_a_critics_unknown_values_give_the_strictest_level_possible() -> None:
    rows = [[(-9.0, 0.0)] * 10, [(-3.0, 0.0)] * 10]
    gate = Gate(rule="value-gated", value="critic", epsilon=0.25, **CONSTANTS)
    unknown = stop_levels(gate, recorded(rows))
    for value in (0.0, 0.25, 0.9):
        known = stop_levels(gate, recorded(rows, critic=np.full((2, 10), value)))
        assert (unknown <= known).all()
        assert (unknown == known).all() == (value <= 0.25)
    asked = Gate(rule="value-only", value="critic")
    for replay in (first_stops, stop_levels):
        with pytest.raises(ValueError, match="give the recorded ones"):
            replay(asked, recorded(rows))


@given(st.integers(0, 2**31), st.floats(0.01, 0.9))
def test_the_random_rule_stops_at_its_hazard_whatever_the_tokens(seed: int, hazard: float) -> None:
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, (2000, 30))
    gate = Gate(rule="random", hazard=hazard, min_tokens=3, version=seed)
    streams = Recorded(logprobs, np.zeros_like(logprobs), np.ones(2000))
    cuts = first_stops(gate, streams)
    for token in (3, 7):
        alive = (cuts == 0) | (cuts >= token)
        if alive.sum() < 200:
            continue
        stopped = (cuts[alive] == token).mean()
        assert stopped == pytest.approx(hazard, abs=5 * math.sqrt(0.25 / alive.sum()))
    # Another batch draws anew.
    other = dataclasses.replace(gate, version=seed + 1)
    assert first_stops(other, streams).tolist() != (cuts.tolist())


@given(st.lists(st.floats(0, 9), min_size=1, max_size=30), st.floats(0.2, 4), st.floats(0, 1))
def test_the_papers_gate_is_row_5(regrets: list[float], beta: float, value: float) -> None:
    gate = Gate(rule="value-gated", beta=beta, constant=value, min_tokens=1, **CONSTANTS)
    watch = Watch(gate, 1)
    z, expected = 0.0, None
    for t, g in enumerate(regrets, 1):
        normalised = (g - 0.2) / math.sqrt(0.5 + gate.monitor.delta)
        z = 0.9 * z + 0.1 * max(-5.0, min(5.0, normalised))
        if expected is None and z > beta * max(value, 0.2) + 1e-12:
            expected = t
        watch.push(-g, 0.0)
    assert watch.cut == expected


@pytest.mark.parametrize("rule", ["value-gated", "value-only"])
@given(
    regrets=st.lists(st.floats(0, 9), min_size=5, max_size=30),
    values=st.lists(st.floats(0, 1), min_size=30, max_size=30),
    random=st.randoms(use_true_random=False),
)
def test_a_late_unordered_critic_cuts_where_an_eager_one_would(
    rule: RuleName, regrets: list[float], values: list[float], random: Random
) -> None:
    gate = Gate(rule=rule, value="critic", beta=0.8, p_star=0.2, min_tokens=2, **CONSTANTS)
    watch, asked = Watch(gate, 1), []
    for t, g in enumerate(regrets, 1):
        if watch.push(-g, 0.0) is Verdict.ASK:
            asked.append(t)
    if rule == "value-only":
        assert asked == list(range(2, len(regrets) + 1))
    random.shuffle(asked)
    for t in asked:
        watch.settle(t, values[t - 1])
    assert watch.settled

    z, eager = 0.0, None
    for t, g in enumerate(regrets, 1):
        z = 0.9 * z + 0.1 * max(-5.0, min(5.0, (g - 0.2) / math.sqrt(0.5 + 1e-6)))
        gated = z > 0.8 * max(values[t - 1], 0.2) + 1e-12
        if eager is None and t >= 2 and (values[t - 1] < 0.2 if rule == "value-only" else gated):
            eager = t
    assert watch.cut == eager


def test_a_calm_stream_never_costs_a_critic_call() -> None:
    calm = Watch(Gate(rule="value-gated", value="critic", beta=0.8, min_tokens=1, **CONSTANTS), 1)
    assert [calm.push(-0.01, 0.0) for _ in range(50)] == [Verdict.GO] * 50


def test_an_unanswered_critic_never_stops() -> None:
    watch = Watch(Gate(rule="value-gated", value="critic", beta=0.1, min_tokens=1, **CONSTANTS), 1)
    assert watch.push(-9.0, 0.0) is Verdict.ASK
    assert watch.settle(1, None) is Verdict.GO
    assert watch.cut is None


def test_the_cut_waits_for_an_earlier_unsettled_token() -> None:
    watch = Watch(Gate(rule="value-gated", value="critic", beta=0.1, min_tokens=1, **CONSTANTS), 1)
    assert [watch.push(-9.0, 0.0), watch.push(-9.0, 0.0)] == [Verdict.ASK, Verdict.ASK]
    watch.settle(2, 0.0)
    assert (watch.cut, watch.settled) == (2, False)
    watch.settle(1, 0.0)
    assert (watch.cut, watch.settled) == (1, True)


@given(streams, estimators)
def test_a_look_tells_what_the_last_token_was_compared_with(
    rows: list[Row], estimator: SuccessEstimator
) -> None:
    for gate in gates(estimator):
        watch, monitor = Watch(gate, 3), RegretMonitor(gate.statistics, gate.monitor)
        for pair in rows[0]:
            if watch.push(*pair) is Verdict.ASK:
                assert watch.look()[3] is None
            g = surrogate_regret(*pair)
            z = monitor.push(g)
            if watch.cut is not None:
                assert watch.look() == (g, z, watch.threshold, watch.value)
                break
            regret, shown, threshold, value = watch.look()
            assert (regret, shown) == (g, z)
            assert (value is None) == (gate.source in (None, "critic"))
            if gate.rule == "value-gated":
                assert threshold == gate.beta * max(value or 0.0, gate.epsilon)
            elif gate.rule == "none":
                assert threshold is None
            else:
                assert threshold == threshold_of(gate.rule).of(gate)


def test_no_rule_stops_before_min_tokens() -> None:
    watch = Watch(Gate(rule="regret-only", beta=0.1, min_tokens=7, **CONSTANTS), 1)
    for _ in range(20):
        watch.push(-9.0, 0.0)
    assert watch.cut == 7


def test_the_length_rule_counts_all_tokens_and_decides_only_at_known_ones() -> None:
    watch = Watch(Gate(rule="length", beta=4.0), 1)
    stream = [(-1.0, 0.0)] * 2 + [(math.nan, 0.0)] * 4 + [(-1.0, 0.0)]
    verdicts = [watch.push(*pair) for pair in stream]
    assert verdicts == [Verdict.GO] * 6 + [Verdict.STOP]
    assert first_stops(watch.gate, recorded([stream])).tolist() == [watch.cut] == [7]


def test_a_logprob_that_was_rounded_above_0_is_one_of_0() -> None:
    estimator = SuccessEstimator(weights=(0.1,) * len(FEATURES), bias=0.0)
    gate = Gate(rule="success-probability", estimator=estimator, p_star=0.5)
    rows: list[Row] = [[(above, above) for above in (1e-7, 0.0)] for _ in range(2)]
    watch, none = Watch(gate, -1), Watch(gate, 0)
    for pair in rows[0]:
        watch.push(*pair)
        none.push(0.0, 0.0)
    assert watch.look() == none.look()
    logits = estimated(estimator, recorded(rows, prompt_tokens=0))
    assert sigmoid(logits[0, -1]) == watch.estimate


@given(streams, st.integers(1, 500))
def test_stream_features_equal_the_live_statistics(rows: list[Row], prompt_tokens: int) -> None:
    regrets = [[None if a is None or not a > -9000 else b for a, b in row] for row in rows]
    regrets = [[g if g is not None and 0 <= g < 99 else None for g in row] for row in regrets]
    live: list[list[tuple[float, ...]]] = []
    for row in regrets:
        statistics = StreamStatistics(prompt_tokens)
        live.append([])
        for g in row:
            statistics.push(g, None if g is None else 2 * g)
            live[-1].append(statistics.features())
    matrix = pad([[math.nan if g is None else g for g in row] for row in regrets])
    parts = feature_blocks(matrix, -2 * matrix, np.full(len(rows), prompt_tokens))
    none = np.empty((len(rows), 0, len(FEATURES)))
    batch = np.concatenate([none, *(part for _, part in parts)], axis=1)
    for row, expected, features in zip(regrets, live, batch, strict=True):
        known = max((n for n, g in enumerate(row, 1) if g is not None), default=0)
        assert [tuple(at) for at in features[:known].tolist()] == expected[:known]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", 0.0),
        ("beta", math.inf),
        ("epsilon", -1.0),
        ("constant", math.nan),
        ("p_star", 1.0),
        ("hazard", -0.1),
        ("hazard", 1.1),
        ("confidence", 0.0),
        ("confidence_window", 0),
        ("confidence_top_k", 0),
        ("min_tokens", 0),
        ("rule", "luck"),
        ("value", "oracle"),
    ],
)
def test_a_gate_out_of_range_names_the_field(field: str, value: float | str) -> None:
    wrong: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=field):
        Gate(**wrong)


def test_statistics_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="mean must be a finite number"):
        Gate(statistics=RegretStatistics(mean=math.nan))


@pytest.mark.parametrize("rule", ["success-probability", "value-gated", "value-only"])
def test_a_rule_without_its_estimator_is_refused(rule: RuleName) -> None:
    with pytest.raises(ValueError, match="needs an estimator"):
        Gate(rule=rule, value="stream")


@pytest.mark.parametrize("rule", get_args(RuleName))
def test_only_a_rule_that_compares_values_asks_a_critic(rule: RuleName) -> None:
    estimator = SuccessEstimator(weights=(0.0,) * len(FEATURES), bias=0.0)
    gate = Gate(rule=rule, value="critic", estimator=estimator)
    assert gate.needs_critic == (rule in ("value-gated", "value-only"))


@given(st.lists(st.floats(-9, 0), min_size=1, max_size=40), st.floats(0, 0.95), st.floats(0.1, 4))
def test_surprise_is_the_smoothed_negative_logprob(
    logprobs: list[float], smoothing: float, beta: float
) -> None:
    monitor = MonitorConfig(smoothing=smoothing)
    watch = Watch(Gate(rule="surprise", beta=beta, monitor=monitor, min_tokens=1), 1)
    mean, expected = 0.0, None
    for t, logprob in enumerate(logprobs, 1):
        mean = smoothing * mean - (1 - smoothing) * logprob
        if expected is None and mean > beta + 1e-12:
            expected = t
        watch.push(logprob, 0.0)
    assert watch.cut == expected
