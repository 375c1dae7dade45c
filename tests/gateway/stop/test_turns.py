"""A rollout in turns is decided about as if it were one stream, live and in a replay."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.stop.estimate import FEATURES, SuccessEstimator
from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.regret import RegretStatistics
from espo_gateway.stop.replay import first_stops
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import Schedule
from espo_gateway.stop.watch import Earlier, Verdict, Watch

#: Every rule that asks nobody, at thresholds that some streams cross in a later turn.
COMMON: dict[str, Any] = {
    "statistics": RegretStatistics(0.5, 2.0),
    "estimator": SuccessEstimator((0.1, 0.3, *([-0.4] * (len(FEATURES) - 2))), 1.5),
}
GATES = [
    Gate(rule="regret-only", beta=0.4, **COMMON),
    Gate(rule="regret-only", beta=0.4, min_tokens=7, **COMMON),
    Gate(rule="value-gated", value="stream", beta=0.7, epsilon=0.3, **COMMON),
    Gate(rule="success-probability", p_star=0.3, **COMMON),
    Gate(rule="surprise", beta=1.5, min_tokens=2, **COMMON),
    Gate(rule="confidence", confidence=0.8, confidence_window=5, **COMMON),
    Gate(rule="random", hazard=0.1, **COMMON),
    Gate(rule="length", beta=9.0, **COMMON),
]
MISSING = float("nan")

tokens = st.tuples(
    st.one_of(st.just(MISSING), st.floats(-6, 0)), st.floats(0, 3), st.floats(0.2, 3)
).map(lambda token: (token[0], min(token[0] + token[1], 0.0), token[2]))
turns = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=6), st.booleans()), min_size=1, max_size=5
)
Turns = list[tuple[list[tuple[float, float, float]], bool]]


def live(gate: Gate, said: Turns, prompt_tokens: int) -> int:
    """The cut, counted from the first turn's first token; 0 for none."""
    earlier: Earlier | None = None
    for stream, completed in said:
        # Each later prompt is longer, and none of it is the rollout's.
        before = 0 if earlier is None else len(earlier.logprobs)
        watch = Watch(gate, prompt_tokens + 100 * before, earlier=earlier)
        for token, (logprob, largest, confidence) in enumerate(stream, 1):
            last = completed and token == len(stream)
            verdict = watch.push(logprob, largest, last=last, confidence=confidence)
            assert watch.tokens == token
            if verdict is Verdict.STOP:
                assert watch.cut == token
                return before + token
        columns = [array("d", column) for column in zip(*stream, strict=True)]
        if earlier is None:
            earlier = Earlier(prompt_tokens, *columns)
        else:
            assert earlier.confidences is not None
            known = [earlier.logprobs, earlier.max_logprobs, earlier.confidences]
            whole = [a + b for a, b in zip(known, columns, strict=True)]
            earlier = Earlier(prompt_tokens, *whole)
    return 0


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate.rule}, {gate.min_tokens}")
@given(said=turns, prompt_tokens=st.integers(1, 50))
def test_turns_are_decided_about_as_one_stream(gate: Gate, said: Turns, prompt_tokens: int) -> None:
    logprobs, largest, confidences = (
        np.array([column])
        for column in zip(*(t for stream, _ in said for t in stream), strict=True)
    )
    lengths = np.cumsum([len(tokens) for tokens, _ in said])
    recorded = Recorded(
        logprobs,
        largest,
        np.array([float(prompt_tokens)]),
        completed_at=np.where([completed for _, completed in said], lengths, 0)[None],
        confidences=confidences,
    )
    assert live(gate, said, prompt_tokens) == first_stops(gate, recorded)[0]


def test_sources_are_asked_at_the_tokens_of_one_stream() -> None:
    gate = Gate(
        rule="success-probability", p_star=0.5, schedule=Schedule(every=4, growth=0.0), **COMMON
    )

    def asked(watch: Watch, count: int) -> list[int]:
        return [n for n in range(1, count + 1) if watch.push(-0.1, -0.1) is Verdict.ASK]

    flat = array("d", [-0.1] * 6)
    whole = asked(Watch(gate, 3), 14)
    assert whole == [4, 8, 12]
    assert asked(Watch(gate, 3, earlier=Earlier(3, flat, flat, None)), 8) == [2, 6]
