"""Followers hear every token, with what the watch has made of it, and change nothing."""

from __future__ import annotations

from typing import Any

import pytest

from espo_gateway.stop.gate_json import Control
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.watch import Watch
from espo_gateway.stream.followers import Step
from espo_gateway.stream.request import plan
from espo_gateway.stream.session import Policy, Session
from tests.helpers.streams import CALM, EAGER, WILD, chunk

#: z passes 1 with the second wild token in a row.
LOGPROBS = [CALM, CALM, WILD, WILD, CALM, WILD]
CUT = 4


class Listener:
    """Keeps all it hears."""

    def __init__(self) -> None:
        self.prompts: list[int] = []
        self.heard: list[Step] = []

    def begin(self, prompt_tokens: int) -> None:
        self.prompts.append(prompt_tokens)

    def push(self, step: Step) -> None:
        self.heard.append(step)


def followed(*followers: Listener, gate: Gate = EAGER, **fields: Any) -> Session:
    body = {"model": "m", "prompt": [1, 2, 3], **fields}
    planned = plan(body, chat=False)
    control = Control(mode="shadow")
    return Session(
        gate,
        control,
        planned.asked,
        planned.singles[0],
        chat=False,
        policy=Policy(refuse=False),
        followers=followers,
    )


@pytest.mark.parametrize("asked", [{}, {"logprobs": 1}], ids=["text chunks", "any chunks"])
def test_they_hear_every_token_and_the_watchs_numbers_up_to_the_cut(asked: dict[str, Any]) -> None:
    listeners = Listener(), Listener()
    session, alone = followed(*listeners, **asked), followed(**asked)
    watch = Watch(EAGER, 3)
    expected: list[Step] = []
    for t, logprob in enumerate(LOGPROBS, 1):
        event = chunk([logprob], "stop" if t == len(LOGPROBS) else None)
        assert not listeners[0].heard[t - 1 :]
        for one in (session, alone):
            one.receive(event)
            one.drain()
        watch.push(logprob, CALM)
        numbers = (watch.regret, watch.z) if t <= CUT else (None, None)
        expected.append(Step(logprob, CALM, None, t == len(LOGPROBS), *numbers))
    assert session.record.cut == CUT
    assert session.record == alone.record
    for listener in listeners:
        assert listener.prompts == [3]
        assert listener.heard == expected


def test_a_missing_regret_is_told_as_missing() -> None:
    listener = Listener()
    session = followed(listener)
    session.receive(chunk([WILD]))
    session.receive(chunk([None]))
    first, missing = listener.heard
    assert first.regret == pytest.approx(CALM - WILD)
    assert missing == Step(None, None, None, False, None, first.z)


def test_nobody_follows_what_is_not_monitored() -> None:
    listener = Listener()
    session = followed(listener)
    session.receive(chunk([CALM]))
    session.give_up("not today")
    session.receive(chunk([WILD]))
    assert session.followers == ()
    assert len(listener.heard) == 1
    assert session.tokens == 2
