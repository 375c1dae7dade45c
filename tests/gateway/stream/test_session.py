"""The end of a rollout: what completes it is exempt, and a replay of the record says the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.stop.gate_json import Control
from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.replay import first_stops
from espo_gateway.stop.rules import Gate
from espo_gateway.stream.request import plan
from espo_gateway.stream.session import Policy, Session
from tests.helpers.streams import CALM, EAGER, WILD, chunk

#: Stops where the hash of the stream says so: at any token, the last included.
CHANCE = Gate(rule="random", hazard=0.2, min_tokens=1)


def session(gate: Gate, **control: Any) -> Session:
    planned = plan({"model": "m", "prompt": [1, 2, 3], "logprobs": 1}, chat=False)
    return Session(gate, Control(**control), planned.asked, planned.singles[0], chat=False)


def played(chunks: list[bytes], gate: Gate = EAGER, **control: Any) -> Session:
    """As `relay.follow` does it, up to the end of the stream or of the choice."""
    one = session(gate, **control)
    for event in chunks:
        one.receive(event)
        one.drain()
        if one.ended:
            break
    return one


def ending(one: Session) -> tuple[str, int | None, bool]:
    record = one.record
    return one.finish()["choices"][0]["finish_reason"], record.cut, record.stopped


@pytest.mark.parametrize("chunking", [[5], [4, 1], [1] * 5, [3, 2]])
@pytest.mark.parametrize("mode", ["enforce", "shadow"])
def test_the_token_that_completes_a_rollout_stops_nothing(chunking: list[int], mode: str) -> None:
    logprobs = [CALM, CALM, CALM, WILD, WILD]  # the decision falls on the last
    chunks, start = [], 0
    for size in chunking:
        start += size
        finish = "stop" if start == len(logprobs) else None
        chunks.append(chunk(logprobs[start - size : start], finish))
    assert ending(played(chunks, mode=mode)) == ("stop", None, False)


def test_what_is_answered_after_it_was_given_up_changes_nothing() -> None:
    gate = Gate(rule="value-gated", value="critic", beta=2.0, epsilon=0.5, min_tokens=1)
    planned = plan({"model": "m", "prompt": [1, 2, 3]}, chat=False)
    one = Session(
        *(gate, Control(), planned.asked, planned.singles[0]),
        chat=False,
        policy=Policy(refuse=False),
    )
    one.receive(chunk([CALM, WILD, WILD, WILD]))
    asked = list(one.questions)
    one.give_up("not today")
    one.receive(chunk([WILD], "stop"))
    for token in asked:
        one.answer(token, {"critic": [0.0]})
    one.drain()
    assert asked
    assert one.decided
    assert ending(one) == ("stop", None, False)


def test_only_the_last_token_of_a_merged_final_chunk_is_exempt() -> None:
    assert ending(played([chunk([CALM, WILD, WILD, CALM], "stop")])) == ("length", 3, True)


def test_a_rollout_that_ran_into_the_limit_is_stopped_at_its_last_token() -> None:
    assert ending(played([chunk([CALM, WILD, WILD], "length")])) == ("length", 3, True)


def test_an_end_told_in_a_chunk_of_its_own_comes_too_late() -> None:
    """Whether the stop was carried out before would be a matter of timing."""
    chunks = [chunk([CALM, WILD]), chunk([WILD]), chunk([], "stop")]
    assert ending(played(chunks)) == ("length", 3, True)
    late = session(EAGER)
    for event in chunks:
        late.receive(event)
    late.drain()
    assert ending(late) == ("length", 3, True)


def test_a_critic_is_not_asked_about_the_token_that_completes() -> None:
    gate = Gate(rule="value-only", value="critic", min_tokens=2)
    one = session(gate)
    one.receive(chunk([CALM] * 3))
    one.receive(chunk([CALM] * 2, "stop"))
    assert one.questions == [2, 3, 4]
    for token in (4, 3, 2):
        one.answer(token, {"critic": [0.9]})
    one.drain()
    assert ending(one) == ("stop", None, False)


@given(
    st.lists(st.floats(-12, 0), min_size=1, max_size=30),
    st.data(),
    st.sampled_from(["stop", "length"]),
    st.sampled_from([EAGER, CHANCE]),
)
def test_a_replay_of_what_was_received_gives_the_same_cut(
    logprobs: list[float], data: st.DataObject, finish: str, gate: Gate
) -> None:
    ends = data.draw(st.sets(st.integers(1, len(logprobs)))) | {len(logprobs)}
    chunks, start = [], 0
    for end in sorted(ends):
        chunks.append(chunk(logprobs[start:end], finish if end == len(logprobs) else None))
        start = end
    shadow = played(chunks, gate, mode="shadow")
    row = np.array([logprobs])
    completed_at = np.array([len(logprobs) if finish == "stop" else 0])
    recorded = Recorded(row, np.maximum(row, CALM), np.array([3.0]), completed_at)
    cut = first_stops(gate, recorded)
    assert (shadow.record.cut or 0) == cut[0]
    assert shadow.record.z is not None
    assert not math.isnan(shadow.record.z)
