"""The gateway against a fake server: what a client gets, and what the server sees."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from typing import Any

import aiohttp
import pytest

from espo_gateway.front.gateway import GATES
from espo_gateway.testing import FakeServer, Script, Token
from tests.helpers.gateway import (
    BAD,
    CHAT,
    COMPLETIONS,
    FAILING,
    GATE,
    GOOD,
    LONG,
    chat_body,
    client_of,
    completion_body,
    gateway_for,
    generate,
    get_text,
    metric,
    post,
    post_stream,
)


@pytest.mark.parametrize("per_chunk", [1, 3, 5, 100])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
async def test_cut_is_exact_however_tokens_are_merged(
    chat: bool, stream: bool, per_chunk: int
) -> None:
    script = dataclasses.replace(FAILING, per_chunk=per_chunk)
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        choice = await generate(gateway.url, chat=chat, stream=stream, return_token_ids=True)
    assert choice["text"] == "aaaaaabb"
    assert choice["token_ids"] == [1] * 6 + [2] * 2
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "espo")
    assert choice["usage"] == {"prompt_tokens": 3, "total_tokens": 11, "completion_tokens": 8}
    record = choice["espo"]
    assert record["z"] == pytest.approx(0.1 * 7.9 * 1.9, abs=1e-4)
    assert (
        record.items()
        >= {
            "rule": "regret-only",
            "mode": "enforce",
            "stopped": True,
            "cut": 8,
            "overshoot": record["tokens"] - 8,
            "missing": 0,
            "threshold": 1.0,
            "value": None,
            "beta": 1.0,
            "gate_version": 3,
            "weights_version": "w5",
        }.items()
    )


@pytest.mark.parametrize("split", [1, 7])
async def test_bytes_may_be_split_anywhere(split: int) -> None:
    script = Script([Token("é🙂", -0.1), *FAILING.tokens], split=split)
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        choice = await generate(gateway.url, chat=True, stream=True)
    assert choice["text"] == "é🙂aaaaaabb"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_cancels_the_generation(stream: bool) -> None:
    async with FakeServer(LONG, gated=True) as server, gateway_for(server) as gateway:
        # The server can send ten tokens and then waits: only a cancelled request ends.
        server.release(10)
        choice = await generate(gateway.url, chat=False, stream=stream, max_tokens=10_000)
        await server.until(lambda: server.running == 0)
        assert choice["espo"]["cut"] == 8
        assert (server.aborted, server.finished) == (1, 0)
        assert choice["espo"]["tokens"] <= server.generated <= 10
        assert [upstream.in_flight for upstream in gateway.pool.servers] == [0]
        assert await metric(gateway, "espo_gateway_stops_total") == 1
        assert (
            await metric(gateway, "espo_gateway_generated_tokens_total") == choice["espo"]["tokens"]
        )
        assert (
            await metric(gateway, "espo_gateway_overshoot_tokens_total")
            == choice["espo"]["overshoot"]
        )


async def test_official_client_reads_a_stopped_answer() -> None:
    async with (
        FakeServer(FAILING) as server,
        gateway_for(server) as gateway,
        client_of(gateway.url) as client,
    ):
        whole = await client.chat.completions.create(**chat_body(logprobs=True, top_logprobs=1))
        assert whole.choices[0].finish_reason == "length"
        assert whole.choices[0].model_extra["espo"]["cut"] == 8
        content = whole.choices[0].logprobs.content
        assert [len(entry.top_logprobs) for entry in content] == [1] * 8
        stream = await client.completions.create(**completion_body(stream=True))
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks) == "aaaaaabb"
        assert chunks[-1].choices[0].model_extra["espo"]["stopped"] is True
        assert all(chunk.usage is None for chunk in chunks)


async def test_shadow_generates_on_and_says_where_it_would_have_cut() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        espo = {"mode": "shadow", "trace": True}
        choice = await generate(gateway.url, chat=False, stream=False, espo=espo)
        assert (server.aborted, server.finished) == (0, 1)
    assert choice["text"] == "a" * 6 + "b" * 10
    assert choice["finish_reason"] == "stop"
    record = choice["espo"]
    assert (record["stopped"], record["cut"], record["tokens"], record["overshoot"]) == (
        False,
        8,
        16,
        0,
    )
    assert len(record["trace"]) == 16
    at_cut, after = record["trace"][7], record["trace"][8]
    assert at_cut == {"g": 7.9, "z": record["z"], "threshold": 1.0, "value": None}
    assert after["z"] > at_cut["z"]


async def test_trace_of_a_cut_choice_ends_with_the_cut() -> None:
    script = dataclasses.replace(FAILING, per_chunk=16)
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        choice = await generate(gateway.url, chat=True, stream=True, espo={"trace": True})
    assert len(choice["espo"]["trace"]) == choice["espo"]["cut"] == 8


async def test_constants_of_one_request_leave_the_gate_alone() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        strict = await generate(gateway.url, chat=False, stream=False, espo={"beta": 0.5})
        lax = await generate(gateway.url, chat=False, stream=False, espo={"beta": 50})
        usual = await generate(gateway.url, chat=False, stream=False)
    assert [c["espo"]["cut"] for c in (strict, lax, usual)] == [7, None, 8]
    assert lax["finish_reason"] == "stop"
    assert lax["espo"]["stopped"] is False


@pytest.mark.parametrize(
    "bad",
    [
        Token("b", None, -0.1),
        Token("b", math.nan, -0.1),
        Token("b", -9999.0, -0.1),
        Token("b", -8.0, math.nan),
        Token("b", -8.0, math.inf),
        Token("b", -math.inf, -0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("chat", [True, False])
async def test_bad_numbers_never_stop(bad: Token, chat: bool) -> None:
    async with FakeServer(Script([GOOD, *[bad] * 10])) as server, gateway_for(server) as gateway:
        choice = await generate(gateway.url, chat=chat, stream=False)
    assert choice["text"] == "a" + "b" * 10
    assert choice["espo"]["cut"] is None
    assert choice["espo"]["missing"] == 10


@pytest.mark.parametrize("logprobs", [None, 0, 1, 3])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("mode", ["enforce", "off"])
async def test_unstopped_answers_equal_the_bare_servers(
    mode: str, chat: bool, stream: bool, logprobs: int | None
) -> None:
    """With a gate that never stops, and with mode off: the same but for the record."""
    fields: dict[str, Any] = {"return_token_ids": True, "max_tokens": 9}
    if logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": logprobs} if chat else {"logprobs": logprobs}
    body = (chat_body if chat else completion_body)(stream=stream, **fields)
    if stream:
        body["stream_options"] = {"include_usage": True}
    script = dataclasses.replace(FAILING, per_chunk=2)
    async with FakeServer(script) as server, gateway_for(server, gate=None) as gateway:
        answers = []
        for url, sent in ((server.url, body), (gateway.url, {**body, "espo": {"mode": mode}})):
            url += CHAT if chat else COMPLETIONS
            whole = await (post_stream(url, sent) if stream else post(url, sent))
            answers.append(json.loads(json.dumps(whole), object_hook=_comparable))
    assert answers[0] == answers[1]


def _comparable(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k != "espo" and v is not None}


async def test_only_what_is_needed_is_changed_upstream() -> None:
    odd = {"temperature": 0.7, "top_k": 5, "seed": 3, "vllm_xargs": {"x": 1}, "espo": {"beta": 2.0}}
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        await post(gateway.url + COMPLETIONS, completion_body(prompt=[1, 2, 3], **odd))
        await post(gateway.url + CHAT, chat_body(**odd))
    del odd["espo"]
    assert server.bodies[0] == {
        **completion_body(prompt=[1, 2, 3], **odd),
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": 1,
    }
    assert server.bodies[1] == {
        **chat_body(**odd),
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "logprobs": True,
        "top_logprobs": 2,
    }


async def test_usage_of_a_cut_answer_is_null_rather_than_wrong() -> None:
    script = dataclasses.replace(FAILING, tells_prompt=False)
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        unknown = await generate(gateway.url, chat=False, stream=False)
        known = await generate(gateway.url, chat=False, stream=False, prompt=[5, 6])
    assert unknown["usage"] is None
    assert known["usage"] == {"prompt_tokens": 2, "total_tokens": 10, "completion_tokens": 8}


def by_seed(body: dict[str, Any]) -> Script:
    """Says its seed; fails when it is odd."""
    tail = [BAD] * 8 if body["seed"] % 2 else [GOOD] * 3
    return Script([GOOD] * 4 + [Token(str(body["seed"] % 10), -0.1), *tail])


@pytest.mark.parametrize("chat", [True, False])
async def test_n_choices_are_watched_one_by_one(chat: bool) -> None:
    fields: dict[str, Any] = {"n": 3, "seed": 10}
    texts = ["aaaa0aaa", "aaaa1bb", "aaaa2aaa"]
    usage = {"prompt_tokens": 3, "total_tokens": 26, "completion_tokens": 23}
    if not chat:
        fields["prompt"] = ["p", "q"]
        texts *= 2  # each prompt's choices have the same seeds, as in vLLM
        usage = {"prompt_tokens": 6, "total_tokens": 52, "completion_tokens": 46}
    body = (chat_body if chat else completion_body)(**fields)
    async with FakeServer(by_seed) as server, gateway_for(server) as gateway:
        url = gateway.url + (CHAT if chat else COMPLETIONS)
        _, answer = await post(url, body)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = await post_stream(url, {**body, **options})
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
    found = [c["message"]["content"] if chat else c["text"] for c in answer["choices"]]
    assert found == texts
    assert answer["usage"] == chunks[-1]["usage"] == usage
    assert [c["espo"]["stopped"] for c in answer["choices"]] == [False, True, False] * (
        len(texts) // 3
    )
    streamed = [""] * len(texts)
    for choice in (chunk["choices"][0] for chunk in chunks[:-1]):
        text = choice["delta"].get("content") if chat else choice["text"]
        streamed[choice["index"]] += text or ""
    assert streamed == texts
    assert {body["n"] for body in server.bodies} == {1}


async def test_one_failing_choice_ends_the_others() -> None:
    def script(body: dict[str, Any]) -> Script:
        return Script(LONG.tokens, status=400) if body["seed"] == 1 else Script([GOOD] * 10**6)

    async with FakeServer(script) as server, gateway_for(server) as gateway:
        status, answer = await post(
            gateway.url + COMPLETIONS, completion_body(n=3, seed=0, max_tokens=10**6)
        )
        await server.until(lambda: server.running == 0)
        assert (status, answer["error"]["message"]) == (400, "as scripted")
        assert server.finished == 0
        assert [upstream.in_flight for upstream in gateway.pool.servers] == [0]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], None),
        (completion_body(stream="yes"), "stream"),
        (completion_body(stream_options={"include_usage": True}), "stream_options"),
        (completion_body(n=0), "n"),
        (completion_body(n=10**9), "n"),
        (completion_body(espo={"mode": "maybe"}), "espo.mode"),
        (completion_body(espo={"betta": 1}), "espo.betta"),
        (completion_body(espo={"beta": -1}), "espo"),
        (completion_body(espo="off"), "espo"),
    ],
)
async def test_bad_requests_name_the_field(body: Any, param: str | None) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        status, answer = await post(gateway.url + COMPLETIONS, body)
        assert status == 400
        assert answer["error"]["param"] == param
        assert answer["error"]["type"] == "invalid_request_error"
        assert server.bodies == []


async def test_other_endpoints_are_passed_through() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        async with client_of(gateway.url) as client:
            models = await client.models.list()
        assert [model.id for model in models.data] == ["fake"]
        status, echoed = await post(gateway.url + "/v1/embeddings", {"input": "é"})
        assert (status, echoed) == (200, {"input": "é"})
        status, _ = await post(gateway.url + "/elsewhere", {})
        assert status == 404


async def test_ready_tells_which_upstreams_answer() -> None:
    async with (
        FakeServer(FAILING) as one,
        FakeServer(FAILING) as two,
        gateway_for(one, two) as gateway,
    ):
        ready = json.loads(await get_text(gateway.url + "/ready"))
        assert [upstream["answers"] for upstream in ready["upstreams"]] == [True, True]
        await two.stop()
        ready = json.loads(await get_text(gateway.url + "/ready"))
        assert ready["status"] == "ok"
        assert [upstream["answers"] for upstream in ready["upstreams"]] == [True, False]
        await one.stop()
        status, _ = await post(gateway.url + COMPLETIONS, completion_body())
        assert status == 503


async def test_the_least_loaded_server_is_chosen() -> None:
    async with (
        FakeServer(FAILING, gated=True) as one,
        FakeServer(FAILING, gated=True) as two,
        gateway_for(one, two) as gateway,
    ):
        url = gateway.url + COMPLETIONS
        requests = [asyncio.create_task(post(url, completion_body())) for _ in range(6)]
        await one.until(lambda: one.running == 3)
        await two.until(lambda: two.running == 3)
        assert [upstream.in_flight for upstream in gateway.pool.servers] == [3, 3]
        for server in (one, two):
            server.release(3 * 16)
        await asyncio.gather(*requests)
        assert [upstream.in_flight for upstream in gateway.pool.servers] == [0, 0]


async def test_a_request_keeps_the_gate_it_started_with() -> None:
    async with FakeServer(FAILING, gated=True) as server, gateway_for(server) as gateway:
        url = gateway.url + COMPLETIONS
        before = asyncio.create_task(post(url, completion_body()))
        await server.until(lambda: server.running == 1)
        gateway.push_gate(json.dumps({**json.loads(GATE), "version": 4, "beta": 50.0}).encode())
        after = asyncio.create_task(post(url, completion_body()))
        server.release(32)
        records = [(await task)[1]["choices"][0]["espo"] for task in (before, after)]
    assert [record["gate_version"] for record in records] == [3, 4]
    assert [record["cut"] for record in records] == [8, None]


async def test_a_request_may_name_a_gate_that_was_pushed() -> None:
    """The one in force too, pushed or not; of those pushed only the last are kept."""
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        url = gateway.url + COMPLETIONS

        def push(version: int, beta: float) -> None:
            gate = {**json.loads(GATE), "version": version, "beta": beta}
            gateway.push_gate(json.dumps(gate).encode())

        async def named(version: int) -> tuple[int, Any]:
            return await post(url, completion_body(espo={"gate": version}))

        async def record(version: int) -> Any:
            status, answer = await named(version)
            assert status == 200, answer
            return answer["choices"][0]["espo"]

        assert (await record(3))["cut"] == 8
        push(4, beta=50.0)
        push(5, beta=1.0)
        assert ((await record(4))["cut"], (await record(4))["gate_version"]) == (None, 4)
        assert ((await record(5))["cut"], (await record(5))["gate_version"]) == (8, 5)
        push(4, beta=1.0)  # a version that is pushed again is the new one
        assert (await record(4))["cut"] == 8
        for version in range(6, 6 + GATES - 1):
            push(version, beta=1.0)
        assert (await record(4))["gate_version"] == 4
        status, answer = await named(5)
    assert status == 400
    assert answer["error"]["param"] == "espo.gate"
    assert "no gate of version 5" in answer["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("setting", "header", "words"),
    [
        ("length", None, ("length", "length")),
        ("early_stop", None, ("early_stop", "early_stop")),
        ("length,/v1/completions=stop", None, ("stop", "length")),
        (" length , /v1/chat/completions=content_filter ", None, ("length", "content_filter")),
        ("/v1/completions=a,/v1/chat/completions=b", None, ("a", "b")),
        ("/v1/completions=a", None, ("a", "length")),
        ("length,/v1/completions=stop", "early_stop", ("early_stop", "early_stop")),
    ],
)
async def test_the_word_for_a_stopped_choice(
    setting: str, header: str | None, words: tuple[str, str], stream: bool
) -> None:
    headers = {} if header is None else {"x-espo-finish-reason": header}
    async with (
        FakeServer(FAILING) as server,
        gateway_for(server, finish_reason=setting) as gateway,
        aiohttp.ClientSession(headers=headers) as session,
    ):
        routes = ((COMPLETIONS, completion_body), (CHAT, chat_body))
        for (path, body), word in zip(routes, words, strict=True):
            async with session.post(gateway.url + path, json=body(stream=stream)) as response:
                assert f'"finish_reason":"{word}"' in await response.text()
        assert not any(name.lower().startswith("x-espo") for name in server.headers[0])


async def test_a_header_that_is_no_word_is_named() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        for word in ("", "two words", "a,b", "x" * 65, "ü"):
            async with (
                aiohttp.ClientSession(headers={"X-Espo-Finish-Reason": word}) as session,
                session.post(gateway.url + COMPLETIONS, json=completion_body()) as response,
            ):
                assert response.status == 400
                assert (await response.json())["error"]["param"] == "X-Espo-Finish-Reason"
        assert server.bodies == []
