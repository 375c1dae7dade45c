"""The stop rules: the paper's gate as written, replay equal to live, the lazy critic exact."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.monitor import MonitorConfig, RegretStatistics, pad
from espo_gateway.rules import Gate, Verdict, Watch, first_stops
from espo_gateway.values import FEATURES, StreamStatistics, SuccessEstimator, stream_features

GATE = {
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


def gates(estimator):
    return [
        Gate(rule="none"),
        Gate(rule="value-gated", beta=0.7, epsilon=0.3, constant=0.6, **GATE),
        Gate(rule="value-gated", value="stream", beta=0.7, estimator=estimator, **GATE),
        Gate(rule="regret-only", beta=0.4, min_tokens=1, **GATE),
        Gate(rule="success-probability", p_star=0.4, estimator=estimator, **GATE),
    ]


@given(streams, estimators, st.integers(1, 500))
def test_replay_equals_the_live_decision_token_for_token(rows, estimator, prompt_tokens):
    def matrix(column):
        numbers = [[pair[column] for pair in row] for row in rows]
        return pad([[math.nan if x is None else x for x in row] for row in numbers])

    prompts = np.full(len(rows), prompt_tokens)
    for gate in gates(estimator):
        live = []
        for row in rows:
            watch = Watch(gate, prompt_tokens)
            verdicts = [watch.push(*pair) for pair in row]
            live.append(watch.cut or 0)
            if watch.cut:
                assert verdicts.index(Verdict.STOP) + 1 == watch.cut
        assert first_stops(gate, matrix(0), matrix(1), prompts).tolist() == live


@given(st.lists(st.floats(0, 9), min_size=1, max_size=30), st.floats(0.2, 4), st.floats(0, 1))
def test_the_papers_gate_is_row_5(regrets, beta, value):
    gate = Gate(rule="value-gated", beta=beta, constant=value, min_tokens=1, **GATE)
    watch = Watch(gate, 1)
    z, expected = 0.0, None
    for t, g in enumerate(regrets, 1):
        normalised = (g - 0.2) / math.sqrt(0.5 + gate.monitor.delta)
        z = 0.9 * z + 0.1 * max(-5.0, min(5.0, normalised))
        if expected is None and z > beta * max(value, 0.2) + 1e-12:
            expected = t
        watch.push(-g, 0.0)
    assert watch.cut == expected


@given(
    st.lists(st.floats(0, 9), min_size=5, max_size=30),
    st.lists(st.floats(0, 1), min_size=30, max_size=30),
    st.randoms(use_true_random=False),
)
def test_a_lazy_late_unordered_critic_cuts_where_an_eager_one_would(regrets, values, random):
    gate = Gate(rule="value-gated", value="critic", beta=0.8, min_tokens=1, **GATE)
    watch, asked = Watch(gate, 1), []
    for t, g in enumerate(regrets, 1):
        if watch.push(-g, 0.0) is Verdict.ASK:
            asked.append(t)
    random.shuffle(asked)
    for t in asked:
        watch.settle(t, values[t - 1])
    assert watch.settled

    z, eager = 0.0, None
    for t, g in enumerate(regrets, 1):
        z = 0.9 * z + 0.1 * max(-5.0, min(5.0, (g - 0.2) / math.sqrt(0.5 + 1e-6)))
        if eager is None and z > 0.8 * max(values[t - 1], 0.2) + 1e-12:
            eager = t
    assert watch.cut == eager
    # Lazy: V is not asked for while no V could stop the stream.
    calm = Watch(gate, 1)
    assert [calm.push(-0.01, 0.0) for _ in range(50)] == [Verdict.GO] * 50


def test_an_unanswered_critic_never_stops():
    watch = Watch(Gate(rule="value-gated", value="critic", beta=0.1, min_tokens=1, **GATE), 1)
    assert watch.push(-9.0, 0.0) is Verdict.ASK
    assert watch.settle(1, None) is Verdict.GO
    assert watch.cut is None


def test_the_cut_waits_for_an_earlier_unsettled_token():
    watch = Watch(Gate(rule="value-gated", value="critic", beta=0.1, min_tokens=1, **GATE), 1)
    assert [watch.push(-9.0, 0.0), watch.push(-9.0, 0.0)] == [Verdict.ASK, Verdict.ASK]
    watch.settle(2, 0.0)
    assert (watch.cut, watch.settled) == (2, False)
    watch.settle(1, 0.0)
    assert (watch.cut, watch.settled) == (1, True)


def test_no_rule_stops_before_min_tokens():
    watch = Watch(Gate(rule="regret-only", beta=0.1, min_tokens=7, **GATE), 1)
    for _ in range(20):
        watch.push(-9.0, 0.0)
    assert watch.cut == 7


@given(streams, st.integers(1, 500))
def test_stream_features_equal_the_live_statistics(rows, prompt_tokens):
    regrets = [[None if a is None or not a > -9000 else b for a, b in row] for row in rows]
    regrets = [[g if g is not None and 0 <= g < 99 else None for g in row] for row in regrets]
    live = []
    for row in regrets:
        statistics = StreamStatistics(prompt_tokens)
        live.append([])
        for g in row:
            statistics.push(g, None if g is None else 2 * g)
            live[-1].append(statistics.features())
    matrix = pad([[math.nan if g is None else g for g in row] for row in regrets])
    batch = stream_features(matrix, 2 * matrix, np.full(len(rows), prompt_tokens))
    for row, features in zip(live, batch, strict=True):
        assert [tuple(at) for at in features[: len(row)].tolist()] == row


@pytest.mark.parametrize(
    ("field", "value"),
    [("beta", 0.0), ("epsilon", -1.0), ("p_star", 1.0), ("min_tokens", 0), ("rule", "luck")],
)
def test_a_gate_out_of_range_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        Gate(**{field: value})


def test_a_rule_without_its_estimator_is_refused():
    with pytest.raises(ValueError, match="needs an estimator"):
        Gate(rule="success-probability")
