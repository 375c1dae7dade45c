"""DeepConf's rule: a token's confidence, its mean over a window, the stop below a threshold."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.replay import first_stops
from espo_gateway.stop.rules import RULES, Gate
from espo_gateway.stop.tracks import token_confidence
from espo_gateway.stop.watch import Verdict, Watch
from espo_gateway.stream.cut import strip_logprobs
from espo_gateway.stream.request import plan, upstream_body
from espo_gateway.testing import FakeServer, Script, Token
from tests.helpers.gateway import chat_body, completion_body, gateway_for, post

SURE, UNSURE = 12.0, 2.0


def watch(**fields: Any) -> Watch:
    return Watch(Gate(rule="confidence", confidence=5.0, **fields), 1)


def push(stream: Watch, confidence: float | None) -> Verdict:
    return stream.push(-0.1, -0.1, confidence=confidence)


@given(
    st.lists(st.one_of(st.floats(0, 20), st.none()), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1, 10),
)
def test_it_stops_where_the_windowed_mean_falls_below(
    stream: list[float | None], window: int, min_tokens: int
) -> None:
    one = watch(confidence_window=window, min_tokens=min_tokens)
    known: list[float] = []
    for t, confidence in enumerate(stream, 1):
        verdict = push(one, confidence)
        if confidence is None:
            assert verdict is Verdict.GO  # no evidence, no decision
            continue
        known.append(confidence)
        mean = math.fsum(known[-window:]) / len(known[-window:])
        if abs(mean - 5.0) < 1e-9:
            return
        assert (verdict is Verdict.STOP) == (mean < 5.0 and t >= min_tokens)
        if verdict is Verdict.STOP:
            assert (one.cut, one.threshold) == (t, 5.0)
            return


def test_an_old_doubt_is_forgotten_with_its_window() -> None:
    one = watch(confidence_window=4, min_tokens=8)
    for confidence in [UNSURE] * 4 + [SURE] * 4 + [UNSURE] * 2:
        assert push(one, confidence) is Verdict.GO
    assert push(one, UNSURE) is Verdict.STOP


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_a_missing_confidence_changes_nothing(missing: float | None) -> None:
    with_gaps, without = watch(confidence_window=3), watch(confidence_window=3)
    for confidence in (SURE, 6.0, 6.0):
        push(with_gaps, confidence)
        push(with_gaps, missing)
        push(without, confidence)
    assert push(with_gaps, 4.0) is push(without, 4.0) is Verdict.GO
    assert push(with_gaps, missing) is Verdict.GO
    assert push(with_gaps, 4.0) is push(without, 4.0) is Verdict.STOP


def test_rounding_does_not_build_up_over_a_long_stream() -> None:
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0, 30, 200_000)
    gate = Gate(rule="confidence", confidence=1e-9, confidence_window=100)
    track = RULES["confidence"].track(gate)
    assert track is not None
    for confidence in confidences.tolist():
        track.push(-0.1, confidence)
    last = track.push(-0.1, 7.0)
    assert last == pytest.approx(np.mean([*confidences[-99:], 7.0]), rel=1e-9)


def test_memory_is_bounded_by_the_window() -> None:
    one = watch(confidence_window=64)
    for _ in range(100):
        push(one, SURE)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(20_000):
        push(one, SURE)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 8_192


def test_a_replay_needs_the_recorded_confidences() -> None:
    rows = np.full((1, 3), -0.1)
    with pytest.raises(ValueError, match="needs the recorded confidences"):
        first_stops(Gate(rule="confidence"), Recorded(rows, rows, np.ones(1)))


def test_a_gate_says_how_many_alternatives_it_reads() -> None:
    assert Gate(rule="confidence", confidence_top_k=7).top_logprobs == 7
    assert Gate(rule="regret-only", confidence_top_k=7).top_logprobs == 1


@given(st.lists(st.floats(-30, 0), min_size=1, max_size=25), st.integers(1, 20))
def test_confidence_is_the_mean_negative_logprob_of_the_likeliest(
    alternatives: list[float], top_k: int
) -> None:
    told = token_confidence(alternatives, top_k)
    if len(alternatives) < top_k:
        assert told is None
    else:
        assert told == pytest.approx(-np.mean(np.sort(alternatives)[::-1][:top_k]))


@pytest.mark.parametrize("bad", [None, math.nan, -9999.0, math.inf])
def test_an_unreadable_alternative_leaves_no_confidence(bad: float | None) -> None:
    assert token_confidence([-0.1, bad, -3.0], 2) is None


# -- in a gateway ----------------------------------------------------------------------------------

CONFIDENCE_GATE = {
    "rule": "confidence",
    "confidence": 4.0,
    "confidence_window": 3,
    "confidence_top_k": 3,
}
#: Confident tokens have an alternative that is all but impossible.
SURE_TOKEN = Token("a", -0.1, None, 1, others=(-9.0, -11.0, -12.0))
UNSURE_TOKEN = Token("b", -0.9, None, 2, others=(-1.0, -1.1, -1.2))


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("stream_size", [1, 5])
async def test_a_gateway_asks_for_the_alternatives_and_stops_by_them(
    chat: bool, stream_size: int, tmp_path: Path
) -> None:
    script = Script([SURE_TOKEN] * 6 + [UNSURE_TOKEN] * 9, per_chunk=stream_size)
    path = tmp_path / "traces.jsonl"
    route, body = "/v1/completions", completion_body()
    if chat:
        route, body = "/v1/chat/completions", chat_body()
    gate = json.dumps(CONFIDENCE_GATE).encode()
    async with (
        FakeServer(script) as server,
        gateway_for(server, gate=gate, record=path) as gateway,
    ):
        status, answer = await post(gateway.url + route, body)
    assert status == 200
    asked = server.bodies[-1]
    assert asked["top_logprobs" if chat else "logprobs"] == 3
    choice = answer["choices"][0]
    # Means over the last three: 6.7, then 4.8 and 2.9 with two unsure ones.
    assert (choice["espo"]["cut"], choice["espo"]["threshold"]) == (8, 4.0)
    assert choice["logprobs"] is None
    recorded = json.loads(path.read_text())
    assert recorded["confidences"][:6] == pytest.approx([(0.1 + 9 + 11) / 3] * 6)
    assert len(recorded["confidences"]) == 8


@pytest.mark.parametrize("asked", [0, 1, 2, 3, 5])
async def test_a_client_sees_the_alternatives_it_asked_for(asked: int) -> None:
    tokens = [SURE_TOKEN, Token("c", -2.5, -0.2, 3, others=(-2.0, -3.0, -4.0))]
    body = chat_body(logprobs=True, top_logprobs=asked)
    async with (
        FakeServer(Script(tokens)) as server,
        gateway_for(server, gate=json.dumps(CONFIDENCE_GATE).encode()) as watched,
        gateway_for(server, gate=None) as plain,
    ):
        answers = [
            (await post(gateway.url + "/v1/chat/completions", body))[1]
            for gateway in (watched, plain)
        ]
    seen = [answer["choices"][0]["logprobs"] for answer in answers]
    assert seen[0] == seen[1]
    assert len(seen[0]["content"]) == 2


@pytest.mark.parametrize(
    ("sampled", "asked", "shown"),
    [
        # As vLLM: the sampled token first, and with it as many as show the likeliest.
        (-0.1, 1, ["s"]),
        (-0.1, 2, ["s", "a"]),
        (-2.5, 1, ["s", "a"]),
        (-2.5, 2, ["s", "a", "b"]),
        (-2.5, 3, ["s", "a", "b"]),
        (-2.5, 0, ["s"]),
        (-2.5, -1, ["s", "a", "b", "c"]),
    ],
)
def test_a_completion_shows_the_sampled_token_and_the_likeliest(
    sampled: float, asked: int, shown: list[str]
) -> None:
    top = {"s": sampled, "a": -1.0, "b": -2.0, "c": -3.0}
    logprobs: dict[str, Any] = {
        "tokens": ["s"],
        "token_logprobs": [sampled],
        "top_logprobs": [dict(top)],
    }
    strip_logprobs({"logprobs": logprobs}, asked)
    assert logprobs["top_logprobs"] == [{name: top[name] for name in shown}]


@pytest.mark.parametrize(
    ("chat", "asked", "sent"),
    [
        (False, None, 7),
        (False, 3, 7),
        (False, 9, 9),
        (True, None, 7),
        (True, 3, 7),
        (True, 9, 9),
        (True, -1, -1),
    ],
)
def test_the_server_is_asked_for_enough(chat: bool, asked: int | None, sent: int) -> None:
    body: dict[str, Any] = {"model": "m", "messages": []} if chat else {"model": "m", "prompt": "p"}
    if asked is not None:
        body |= {"logprobs": True, "top_logprobs": asked} if chat else {"logprobs": asked}
    [single] = plan(body, chat=chat).singles
    told = upstream_body(single, chat=chat, token_ids=False, alternatives=7)
    assert told["top_logprobs" if chat else "logprobs"] == sent
