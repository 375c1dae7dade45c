"""The answer probe: asked on a schedule, recorded, decided by; no fault of it costs a token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from espo_gateway.critic.probe import FLOOR, LONGEST, Probed, probe_body, read_probe
from espo_gateway.stop.estimate import FEATURES, SuccessEstimator
from espo_gateway.stop.gate_json import gate_to_json
from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.replay import first_stops
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import PROBED, TOLD, Probe, Schedule
from espo_gateway.stream.request import WHOLE_POLICY
from espo_gateway.testing import FakeServer, Script
from espo_gateway.testing.script import Body
from tests.helpers.gateway import (
    CHAT,
    COMPLETIONS,
    GOOD,
    chat_body,
    completion_body,
    gateway_for,
    metric,
    post,
    post_stream,
)

PROMPT, LENGTH = [1, 2, 3], 12
ASKING = {"probe": {"phrase": [70, 71], "answer": [80, 81]}}
EVERY = Schedule(every=3, growth=0.0)
RECORDING = Gate(schedule=EVERY)
#: P(success) is one half where the answer's log-likelihood is -4, at any token.
ESTIMATOR = SuccessEstimator((0.0,) * len(FEATURES) + (0.0, 1.0, *[0.0] * 4), 4.0, ("probe",))
STOPPING = Gate(rule="success-probability", p_star=0.5, estimator=ESTIMATOR, schedule=EVERY)


def likely(token: int) -> tuple[float, float]:
    """Log-likelihoods of the answer's two tokens after so many of the stream: they fall."""
    return -0.1 * token, -0.5 * token


def server_that_says(
    numbers: Callable[[int], tuple[float, float]] = likely, **fault: Any
) -> Callable[[Body], Script]:
    """A server that streams 12 tokens, and answers probes by the length of their prefix."""

    def script(body: Body) -> Script:
        if "logprob_token_ids" not in body:
            return Script([GOOD] * LENGTH, prompt_token_ids=tuple(PROMPT))
        assert body["prompt"][-2:] == [70, 71]
        assert body["logprob_token_ids"] == [80, 81]
        first, second = numbers(len(body["prompt"]) - len(PROMPT) - 2)
        tops = [{"token_id:80": first, "token_id:81": -9.0}, {"token_id:81": second}]

        def rewrite(answer: Body) -> Body:
            logprobs = {"top_logprobs": tops, "token_logprobs": [-0.05, -0.05]}
            answer["choices"][0] |= {"token_ids": [80, 99], "logprobs": logprobs}
            return answer

        return Script([GOOD] * 2, rewrite=rewrite, **fault)

    return script


async def record_of(script: Any, gate: Gate, **espo: Any) -> Any:
    body = completion_body(prompt=PROMPT, espo={**ASKING, **espo})
    async with (
        FakeServer(script) as server,
        gateway_for(server, gate=gate_to_json(gate)) as gateway,
    ):
        status, answer = await post(gateway.url + COMPLETIONS, body)
        assert status == 200, answer
        return answer["choices"][0]["espo"]


async def test_what_a_probe_says_is_recorded_though_no_rule_stops_yet() -> None:
    record = await record_of(server_that_says(), RECORDING)
    # The last token completes: nothing could be decided there.
    assert record["probes"] == [[t, -0.1 * t, pytest.approx(-0.6 * t), -0.05] for t in (3, 6, 9)]
    assert record["cut"] is None


@pytest.mark.parametrize("endpoint", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stream_is_cut_where_its_answer_has_become_unlikely(
    endpoint: str, stream: bool
) -> None:
    make = chat_body if endpoint == CHAT else completion_body
    body = make(stream=stream, espo=ASKING)
    async with (
        FakeServer(server_that_says()) as server,
        gateway_for(server, gate=gate_to_json(STOPPING)) as gateway,
    ):
        if stream:
            chunks = await post_stream(gateway.url + endpoint, body)
            text = "".join(
                choice.get("text") or choice.get("delta", {}).get("content") or ""
                for chunk in chunks
                for choice in chunk["choices"]
            )
            record = chunks[-1]["choices"][0]["espo"]
        else:
            _, answer = await post(gateway.url + endpoint, body)
            choice = answer["choices"][0]
            text, record = choice.get("text") or choice["message"]["content"], choice["espo"]
        asked = await metric(gateway, "espo_gateway_probe_questions_total")
        sampled = await metric(gateway, "espo_gateway_probe_tokens_total")
    assert (record["stopped"], record["cut"]) == (True, 9)
    assert text == "a" * 9
    assert record["value"] == pytest.approx(1 / (1 + math.exp(5.4 - 4.0)))
    # Before min_tokens nothing is decided, so nothing is asked.
    assert asked >= 2
    assert sampled >= 4


async def test_a_replay_of_what_was_recorded_cuts_where_the_gateway_did() -> None:
    record = await record_of(server_that_says(), STOPPING, mode="shadow")
    probes = np.full((1, LENGTH, PROBED), np.nan)
    for token, *said in record["probes"]:
        probes[0, token - 1] = said
    flat = np.full((1, LENGTH), -0.1)
    many = Recorded(flat, flat, np.array([3.0]), np.array([LENGTH]), probes=probes)
    assert first_stops(STOPPING, many).tolist() == [record["cut"]] == [9]


@pytest.mark.parametrize(
    "script",
    [
        server_that_says(status=500),
        server_that_says(status=400),
        server_that_says(fault="reset"),
        server_that_says(lambda token: (math.nan, math.nan)),
        lambda body: Script([GOOD] * LENGTH),
        lambda body: Script([GOOD] * LENGTH, token_ids="logprob_token_ids" not in body),
    ],
    ids=["500", "400", "reset", "no numbers", "other logprobs", "no ids"],
)
async def test_a_probe_without_answer_costs_stops_and_nothing_else(script: Any) -> None:
    record = await record_of(script, STOPPING)
    assert (record["stopped"], record["tokens"], record["probes"]) == (False, LENGTH, [])


async def test_without_a_reference_answer_nothing_is_asked_and_nothing_stops() -> None:
    async with (
        FakeServer(server_that_says()) as server,
        gateway_for(server, gate=gate_to_json(STOPPING)) as gateway,
    ):
        _, answer = await post(gateway.url + COMPLETIONS, completion_body())
        assert "probes" not in answer["choices"][0]["espo"]
        assert answer["choices"][0]["espo"]["stopped"] is False
        assert len(server.bodies) == 1


async def test_a_stream_whose_free_estimate_is_good_is_not_asked_about() -> None:
    sure = SuccessEstimator((0.0,) * len(FEATURES), 2.0)
    gate = Gate(
        **{**vars(STOPPING), "free": sure, "schedule": Schedule(every=3, growth=0.0, below=0.5)}
    )
    record = await record_of(server_that_says(), gate)
    assert (record["stopped"], record["probes"]) == (False, [])
    # One that goes on to its end is: what it says stands for those that were not.
    record = await record_of(server_that_says(), gate, mode="shadow")
    assert record["stopped"] is False
    assert [token for token, *_ in record["probes"]] == [3, 6, 9]


@pytest.mark.parametrize(
    ("espo", "field"),
    [
        ({"probe": {"phrase": [], "answer": [1]}}, "espo.probe.phrase"),
        ({"probe": {"phrase": [1], "answer": ["4"]}}, "espo.probe.answer.0"),
        ({"probe": {"phrase": [1], "reply": [1]}}, "espo.probe.reply"),
        ({"history": "often"}, "espo.history"),
    ],
)
async def test_a_probe_that_makes_no_sense_names_the_field(espo: Any, field: str) -> None:
    async with FakeServer(server_that_says()) as server, gateway_for(server) as gateway:
        status, answer = await post(gateway.url + COMPLETIONS, completion_body(espo=espo))
    assert status == 400
    assert answer["error"]["param"] == field


def test_a_probe_asks_the_policy_and_not_what_its_server_makes_of_it() -> None:
    body = probe_body(Probe([1], [5]), "m", [2])
    assert body.items() >= {"temperature": 0.0, "top_p": 1.0, **WHOLE_POLICY}.items()


def test_the_answer_counts_up_to_where_the_policy_says_another_thing() -> None:
    probe = Probe([1], [5, 6, 7])

    def read(sampled: list[int], *logprobs: float) -> Probed:
        tops = [
            {f"token_id:{wanted}": logprob}
            for wanted, logprob in zip(probe.answer, logprobs, strict=False)
        ]
        numbers = {"top_logprobs": tops, "token_logprobs": [-0.5] * len(sampled)}
        choice = {"token_ids": sampled, "logprobs": numbers}
        return read_probe(probe, {"choices": [choice]})

    assert read([5, 6, 7], -1.0, -2.0, -3.0) == (-1.0, -6.0, -0.5, 3)
    assert read([5, 9, 7], -1.0, -2.0, -3.0) == (-1.0, -3.0, -0.5, 3)
    assert read([9, 6, 7], -1.0, -2.0, -3.0) == (-1.0, -1.0, -0.5, 3)
    # Its own end came first.
    assert read([5], -1.0) == (-1.0, -1.0, -0.5, 1)
    assert read([5, 6, 7], -15.0, -15.0, -15.0) == (-15.0, FLOOR, -0.5, 3)
    long = Probe([1], list(range(40)))
    assert LONGEST < 40
    with pytest.raises(ValueError, match="logprob_token_ids"):
        read_probe(long, {"choices": [{"token_ids": [0], "logprobs": None}]})
    assert TOLD["probe"][0] == "probe_first"
    assert json.loads(gate_to_json(STOPPING))["estimator"]["sources"] == ["probe"]
