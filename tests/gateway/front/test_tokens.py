"""vLLM's route for trainers, tokens in and tokens out, monitored like the OpenAI routes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from yarl import URL

from espo_gateway.client import outcomes
from espo_gateway.testing import Body, FakeServer, Script
from espo_gateway.testing.critic import FakeCritic
from tests.helpers.gateway import (
    BAD,
    CRITIC_GATE,
    FAILING,
    GOOD,
    advance,
    gateway_for,
    metric,
    post,
    post_stream,
    until_running,
)

TOKENS, ABORT = "/inference/v1/generate", "/inference/v1/abort_requests"


def tokens_body(sampling: Body | None = None, **fields: Any) -> Body:
    sampling = {"max_tokens": 100, **(sampling or {})}
    return {"request_id": "r", "token_ids": [1, 2, 3], "sampling_params": sampling, **fields}


async def generated(url: str, body: Body) -> tuple[Body, list[Body]]:
    """The answer, or a stream's chunks put together, and the chunks."""
    if not body.get("stream"):
        status, answer = await post(url + TOKENS, body)
        assert status == 200, answer
        return answer, []
    chunks = await post_stream(url + TOKENS, body)
    choices: dict[int, Body] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"token_ids": [], "sampling_mask": []})
            token_ids = choice["token_ids"] + part["token_ids"]
            mask = choice["sampling_mask"] + part["sampling_mask"]
            content = choice.get("logprobs") or []
            content = content + ((part["logprobs"] or {}).get("content") or [])
            choice |= {**part, "token_ids": token_ids, "sampling_mask": mask, "logprobs": content}
    for choice in choices.values():
        choice["logprobs"] = {"content": choice["logprobs"]} if choice["logprobs"] else None
    return {**chunks[0], "choices": [choices[i] for i in sorted(choices)]}, chunks


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("per_chunk", [1, 3, 7, 100])
async def test_a_failing_one_is_stopped_at_its_token(stream: bool, per_chunk: int) -> None:
    script = Script(FAILING.tokens, per_chunk=per_chunk)
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        answer, _ = await generated(gateway.url, tokens_body(stream=stream))
        (choice,) = answer["choices"]
        assert choice["token_ids"] == [1] * 6 + [2] * 2
        assert choice["sampling_mask"] == [[1]] * 6 + [[2]] * 2
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "espo")
        assert choice["routed_experts"] is None
        assert choice["logprobs"] is None
        assert "text" not in choice
        assert (choice["espo"]["stopped"], choice["espo"]["cut"]) == (True, 8)
        assert (answer["request_id"], answer["output_mode"]) == ("generate-tokens-r", "tokens")
        assert "id" not in answer
        assert "object" not in answer
        (outcome,) = outcomes(answer)
        assert (outcome.end, outcome.tokens) == ("early_stop", 8)
        if not stream:
            assert answer["usage"]["completion_tokens"] == 8
            assert answer["usage"]["prompt_tokens"] == 3
        # What was sampled is what would have been sampled without us.
        (sent,) = server.bodies
        assert sent["token_ids"] == [1, 2, 3]
        assert sent["sampling_params"] == {"max_tokens": 100, "logprobs": 2}
        assert sent["stream"] is True


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("logprobs", [None, 0, 1, 2, 3, -1])
@pytest.mark.parametrize("mode", ["tokens", "text"])
@pytest.mark.parametrize("return_token_ids", [True, None])
async def test_one_that_succeeds_is_as_without_the_gateway(
    stream: bool, logprobs: int | None, mode: str, return_token_ids: bool | None
) -> None:
    script = Script([GOOD._replace(others=(-3.0, -4.0)), BAD, GOOD, GOOD], per_chunk=2)
    body = tokens_body({"logprobs": logprobs}, stream=stream, output_mode=mode)
    body["return_token_ids"] = return_token_ids
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        got, _ = await generated(gateway.url, body)
        without, _ = await generated(server.url, body)
        for answer in (got, without):
            for name in ("usage", "created", "model"):
                answer.pop(name, None)
            for choice in answer["choices"]:
                choice.pop("espo", None)
                if logprobs == -1:  # the fake knows no "all"
                    choice["logprobs"] = None
            for name in [name for name, value in answer.items() if value is None]:
                del answer[name]
        assert got == without
        assert server.bodies[0]["sampling_params"]["logprobs"] in (2, 3, -1)


async def test_the_usage_of_a_stream() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        body = tokens_body(stream=True, stream_options={"include_usage": True})
        _, chunks = await generated(gateway.url, body)
        last = chunks[-1]
        assert (last["choices"], last["request_id"]) == ([], "generate-tokens-r")
        assert last["usage"]["completion_tokens"] == 8
        assert not {"id", "object", "model"} & last.keys()


@pytest.mark.parametrize("stream", [True, False])
async def test_several_choices_are_stopped_one_by_one(stream: bool) -> None:
    def script(body: Body) -> Script:
        return FAILING if body["sampling_params"]["seed"] % 2 else Script([GOOD] * 5)

    async with FakeServer(script) as server, gateway_for(server) as gateway:
        body = tokens_body({"n": 4, "seed": 10}, stream=stream)
        answer, chunks = await generated(gateway.url, body)
        ends = [(one.index, one.end, one.tokens) for one in outcomes(answer)]
        assert ends == [
            (0, "completed", 5),
            (1, "early_stop", 8),
            (2, "completed", 5),
            (3, "early_stop", 8),
        ]
        assert sorted(sent["request_id"] for sent in server.bodies) == ["r-0", "r-1", "r-2", "r-3"]
        assert {sent["sampling_params"]["n"] for sent in server.bodies} == {1}
        assert len({chunk["request_id"] for chunk in chunks}) == (1 if stream else 0)
        assert gateway.several == {}


@pytest.mark.parametrize(
    ("sampling", "fields"),
    [
        ({}, {"espo": {"mode": "off"}}),
        ({"prompt_logprobs": 1}, {}),
        ({"logprob_token_ids": [1]}, {}),
        ({}, {"kv_transfer_params": {"do_remote_decode": True}}),
    ],
)
async def test_what_cannot_be_monitored_is_marked_or_refused(sampling: Body, fields: Body) -> None:
    body = tokens_body({"n": 1, **sampling}, **fields)
    async with FakeServer(FAILING) as server:
        async with gateway_for(server) as gateway:
            answer, _ = await generated(gateway.url, body)
            (choice,) = answer["choices"]
            assert (choice["espo"]["mode"], len(choice["token_ids"])) == ("off", 16)
            assert outcomes(answer)[0].monitored is False
        async with gateway_for(server, unmonitored="refuse") as gateway:
            status, answer = await post(gateway.url + TOKENS, body)
            assert status == (200 if fields.get("espo") else 400)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], None),
        ({"token_ids": [1]}, "sampling_params"),
        (tokens_body(espo={"mode": "x"}), "espo.mode"),
        (tokens_body({"n": 0}), "n"),
        (tokens_body({"n": 10_000}), "n"),
    ],
)
async def test_bad_requests_name_the_field(body: Any, param: str | None) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        status, answer = await post(gateway.url + TOKENS, body)
        assert (status, answer["error"]["param"]) == (400, param)
        assert server.bodies == []


async def test_a_critic_reads_the_tokens_of_the_request() -> None:
    async with (
        FakeServer(FAILING) as server,
        FakeCritic(lambda prefix: 0.0) as critic,
        gateway_for(server, gate=CRITIC_GATE, critic=critic.url) as gateway,
    ):
        answer, _ = await generated(gateway.url, tokens_body())
        assert outcomes(answer)[0].end == "early_stop"
        assert all(prefix[:3] == [1, 2, 3] for asked in critic.requests for prefix in asked)
        assert critic.questions > 0


async def test_keys_limits_counters_and_words_are_those_of_the_other_routes() -> None:
    settings: dict[str, Any] = {"finish_reason": f"length,{TOKENS}=abort", "max_choices": 2}
    async with FakeServer(FAILING) as server, gateway_for(server, **settings) as gateway:
        answer, _ = await generated(gateway.url, tokens_body())
        assert answer["choices"][0]["finish_reason"] == "abort"
        assert await metric(gateway, "espo_gateway_requests_total") == 1
        assert await metric(gateway, "espo_gateway_generated_tokens_total") >= 8
    async with FakeServer(FAILING) as server, gateway_for(server, api_keys=("k",)) as gateway:
        for path in (TOKENS, ABORT):
            assert (await post(gateway.url + path, tokens_body()))[0] == 401
        assert (server.bodies, server.aborts) == ([], [])
        gateway.drain()
        async with (
            aiohttp.ClientSession(headers={"Authorization": "Bearer k"}) as session,
            session.post(gateway.url + TOKENS, json=tokens_body()) as response,
        ):
            assert response.status == 503


@pytest.mark.parametrize(
    "path",
    ["/inference/v1/generate/", "/inference/v1%2Fgenerate", "/inference/v1/%67enerate"],
)
async def test_spellings(path: str) -> None:
    async with (
        FakeServer(FAILING) as server,
        gateway_for(server, unmonitored="refuse") as gateway,
        aiohttp.ClientSession() as session,
        session.post(URL(gateway.url + path, encoded=True), json=tokens_body()) as response,
    ):
        assert response.status in (200, 404)
        if response.status == 200:
            assert (await response.json())["choices"][0]["espo"]["stopped"]
        assert len(server.bodies) == (response.status == 200)


@pytest.mark.parametrize(
    "path", ["/inference/v1/pause", "/inference/pause", "/inference/v1/../../pause", "/inference"]
)
async def test_nothing_else_under_inference_is_reached(path: str) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        status, _ = await post(gateway.url + path.replace("..", "%2e%2e"), {})
        assert status in (400, 404)


# -- ending requests ---------------------------------------------------------------------------


async def aborted(url: str, body: Any) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.post(url + ABORT, json=body) as response:
        return response.status, await response.read()


async def test_every_server_is_told_whom_to_abort_and_of_every_choice() -> None:
    async with (
        FakeServer(FAILING, gated=True) as one,
        FakeServer(FAILING, gated=True) as two,
        gateway_for(one, two) as gateway,
    ):
        asked = asyncio.create_task(post(gateway.url + TOKENS, tokens_body({"n": 2})))
        await until_running(one, 1)
        await until_running(two, 1)
        ids = ["generate-tokens-r", "generate-tokens-other"]
        assert await aborted(gateway.url, {"request_ids": ids}) == (200, b"")
        everyone = [*ids, "generate-tokens-r-0", "generate-tokens-r-1"]
        assert one.aborts == two.aborts == [everyone]
        for server in (one, two):
            server.release(100)
        await asked
        await aborted(gateway.url, {"request_ids": ids})
        assert one.aborts[-1] == ids


async def test_whichever_choice_begins_first_the_answer_has_one_id() -> None:
    async with (
        FakeServer(FAILING, gated=True) as one,
        FakeServer(FAILING, gated=True) as two,
        gateway_for(one, two) as gateway,
        aiohttp.ClientSession() as session,
    ):
        options = {"include_usage": True}
        body = tokens_body({"n": 2}, stream=True, stream_options=options)
        asked = asyncio.create_task(session.post(gateway.url + TOKENS, json=body))
        await until_running(one, 1)
        await until_running(two, 1)
        second = one if one.bodies[0]["request_id"] == "r-1" else two
        await advance(second, 1)
        async with await asked as response:
            events = [await response.content.readuntil(b"\n\n")]
            # By that id the client may end all of it.
            await aborted(gateway.url, {"request_ids": ["generate-tokens-r-1"]})
            assert {"generate-tokens-r-0", "generate-tokens-r-1"} <= {*one.aborts[0]}
            for server in (one, two):
                server.release(100)
            events += (await response.read()).split(b"\n\n")
    told = [json.loads(event[6:]) for event in events if event.startswith(b"data: {")]
    assert told[-1]["choices"] == []
    assert {chunk["request_id"] for chunk in told} == {"generate-tokens-r-1"}


async def test_an_aborted_rollout_is_no_stopped_one() -> None:
    script = Script([GOOD] * 5, finish_reason="abort")
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        answer, _ = await generated(gateway.url, tokens_body())
        (outcome,) = outcomes(answer)
        assert (outcome.end, outcome.tokens) == ("aborted", 5)
        assert answer["choices"][0]["token_ids"] == [1] * 5


async def test_one_server_that_is_gone_does_not_hinder_the_others() -> None:
    async with (
        FakeServer(FAILING) as one,
        FakeServer(FAILING) as two,
        gateway_for(one, two, attempts=1) as gateway,
    ):
        await one.stop()
        assert (await aborted(gateway.url, {"request_ids": ["a"]}))[0] == 200
        status, body = await aborted(gateway.url, {})
        assert (status, json.loads(body)["detail"]) == (400, "Missing 'request_ids'")
        await two.stop()
        assert (await aborted(gateway.url, {"request_ids": ["a"]}))[0] == 503
