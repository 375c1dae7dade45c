"""What a client is told of an answer: of the gateway's own, and of what is left of them."""

from __future__ import annotations

import ast
import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from espo_gateway import client as module
from espo_gateway.client import R_FAIL, Outcome, outcomes
from espo_gateway.testing import FakeServer, Script
from tests.helpers.gateway import (
    CHAT,
    COMPLETIONS,
    FAILING,
    GOOD,
    chat_body,
    client_of,
    completion_body,
    gateway_for,
    post,
    post_stream,
)

#: What the server does, what is asked, and how each choice then ends, at which token.
CASES: dict[str, tuple[Script, dict[str, Any], Outcome]] = {
    "stopped": (FAILING, {}, Outcome(0, "early_stop", 8, None, True)),
    "ended": (Script([GOOD] * 5), {}, Outcome(0, "completed", 5, None, True)),
    "tools": (
        Script([GOOD] * 5, finish_reason="tool_calls"),
        {},
        Outcome(0, "completed", 5, None, True),
    ),
    "too long": (Script([GOOD] * 50), {"max_tokens": 7}, Outcome(0, "length", 7, None, True)),
    "aborted": (
        Script([GOOD] * 5, finish_reason="abort"),
        {},
        Outcome(0, "aborted", 5, None, True),
    ),
    "shadow": (FAILING, {"espo": {"mode": "shadow"}}, Outcome(0, "completed", 16, 8, True)),
    "audited": (FAILING, {"espo": {"audit": 1.0}}, Outcome(0, "completed", 16, 8, True)),
    "off": (FAILING, {"espo": {"mode": "off"}}, Outcome(0, "completed", 16, None, False)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("word", ["length", "stop", "early_stop"])
async def test_an_answer_of_any_kind_and_client(case: str, word: str) -> None:
    script, fields, expected = CASES[case]
    extra = {"extra_body": {"espo": fields["espo"]}} if "espo" in fields else {}
    plain = {name: value for name, value in fields.items() if name != "espo"}
    async with (
        FakeServer(script) as server,
        gateway_for(server, finish_reason=word) as gateway,
        client_of(gateway.url) as client,
    ):
        create_chat: Any = client.chat.completions.create
        create: Any = client.completions.create
        for answer in (
            await create(**completion_body(**plain), **extra),
            await create_chat(**chat_body(**plain), **extra),
            (await post(gateway.url + COMPLETIONS, completion_body(**fields)))[1],
            (await post(gateway.url + CHAT, chat_body(**fields)))[1],
        ):
            assert outcomes(answer) == [expected]
            (outcome,) = outcomes(answer)
            assert outcome.reward(0.5) == (R_FAIL if case == "stopped" else 0.5)
            assert outcome.reward(0.5, r_fail=-2.0) == (-2.0 if case == "stopped" else 0.5)
        chunks = await post_stream(
            gateway.url + COMPLETIONS, completion_body(stream=True, return_token_ids=True, **fields)
        )
        (outcome,) = outcomes(chunks[-1])
        assert (outcome.end, outcome.would_stop) == (expected.end, expected.would_stop)
        if case != "off":  # then the last chunk alone does not know
            assert outcome.tokens == expected.tokens


async def test_every_choice_has_its_own() -> None:
    def script(body: dict[str, Any]) -> Script:
        return FAILING if body["prompt"] == "bad" else Script([GOOD] * 3)

    async with FakeServer(script) as server, gateway_for(server) as gateway:
        body = completion_body(prompt=["good", "bad"], n=2)
        _, answer = await post(gateway.url + COMPLETIONS, body)
        told = [(one.index, one.end, one.tokens) for one in outcomes(answer)]
        assert told == [
            (0, "completed", 3),
            (1, "completed", 3),
            (2, "early_stop", 8),
            (3, "early_stop", 8),
        ]


STOPPED = {"finish_reason": "length", "stop_reason": "espo", "text": "a"}


@pytest.mark.parametrize(
    ("choice", "usage", "end", "tokens"),
    [
        # A client or a proxy has dropped the record.
        (STOPPED, {"completion_tokens": 8}, "early_stop", 8),
        ({**STOPPED, "token_ids": [1, 2]}, None, "early_stop", 2),
        ({**STOPPED, "logprobs": {"token_logprobs": [-1.0] * 3}}, None, "early_stop", 3),
        ({**STOPPED, "logprobs": {"content": [{}] * 4}}, None, "early_stop", 4),
        (STOPPED, None, "early_stop", None),
        # No gateway at all.
        ({"finish_reason": "length"}, {"completion_tokens": 9}, "length", 9),
        ({"finish_reason": "stop"}, {}, "completed", None),
        ({"finish_reason": "stop", "stop_reason": 5}, None, "completed", None),
        ({"finish_reason": None}, None, "aborted", None),
        ({"finish_reason": "error"}, None, "aborted", None),
        ({"finish_reason": "content_filter"}, None, "aborted", None),
        ({}, None, "aborted", None),
    ],
)
def test_what_is_left_of_an_answer(choice: Any, usage: Any, end: str, tokens: int | None) -> None:
    answer = {"choices": [choice], "usage": usage}
    as_object = SimpleNamespace(choices=[SimpleNamespace(**choice)], usage=usage)
    for one in (answer, as_object, copy.deepcopy(answer)):
        (outcome,) = outcomes(one)
        assert (outcome.end, outcome.tokens) == (end, tokens)
        assert outcome.monitored == (end == "early_stop")


@pytest.mark.parametrize("answer", [{}, {"choices": None}, {"choices": []}, {"error": {}}])
def test_an_answer_without_choices_has_none(answer: Any) -> None:
    assert outcomes(answer) == []


def test_it_can_be_copied_into_a_trainer() -> None:
    source = Path(str(module.__file__)).read_text()
    used = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert used <= sys.stdlib_module_names
    assert len(source.splitlines()) < 120
