"""The gateway in front of a real vLLM server: nothing changes but what is stopped."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.helpers.gateway import gateway_for, post, post_stream, raw_request
from tests.helpers.vllm import (
    CHAT,
    COMPLETIONS,
    STRICT,
    VllmServer,
    body_for,
    comparable,
    generated,
    joined,
    rounded,
    settled,
)

pytestmark = pytest.mark.vllm

#: enough tokens that the server takes seconds over them
LENGTH, CHOICES = 400, 32
#: On a machine short of processors vLLM may take up an abort late, also when it comes directly.
ATTEMPTS = 4


@pytest.mark.parametrize("mode", ["enforce", "shadow", "off"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 1.0, "seed": 7, "n": 3},
        {"temperature": 1.2, "seed": 5, "top_k": 9, "stop": ["7", "99"]},
    ],
    ids=["greedy", "seeded", "n=3", "stop strings"],
)
@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_answers_equal_the_bare_servers(
    vllm_server: VllmServer,
    path: str,
    stream: bool,
    logprobs: bool,
    sampling: dict[str, Any],
    mode: str,
) -> None:
    body = body_for(vllm_server, path, max_tokens=48, return_token_ids=True, **sampling)
    if logprobs:
        body |= {"logprobs": True, "top_logprobs": 1} if path == CHAT else {"logprobs": 1}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    gate = STRICT if mode == "shadow" else None
    async with gateway_for(vllm_server, gate=gate) as gateway:
        answers = []
        for url, sent in ((vllm_server.url, body), (gateway.url, {**body, "espo": {"mode": mode}})):
            if stream:
                answer: Any = joined(await post_stream(url + path, sent))
            else:
                status, answer = await post(url + path, sent)
                assert status == 200, answer
            answers.append(json.loads(json.dumps(answer), object_hook=comparable))
    assert rounded(answers[0]) == rounded(answers[1])


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("asked", [None, 0, 1, 3])
async def test_a_client_does_not_see_what_the_confidence_rule_reads(
    vllm_server: VllmServer, path: str, asked: int | None
) -> None:
    body = body_for(vllm_server, path, max_tokens=24, temperature=1.0, seed=3)
    if asked is not None:
        body |= {"logprobs": True, "top_logprobs": asked} if path == CHAT else {"logprobs": asked}
    gate = b'{"rule": "confidence", "confidence": 0.001, "confidence_top_k": 8}'
    async with gateway_for(vllm_server, gate=gate) as gateway:
        sent = {**body, "espo": {"trace": True}}
        answers = [await post(url + path, body) for url in (vllm_server.url, gateway.url)]
        status, traced = await post(gateway.url + path, sent)
        stopping = {**body, "espo": {"confidence": 100.0}}
        _, stopped = await post(gateway.url + path, stopping)
    assert status == 200
    trace = traced["choices"][0]["espo"]["trace"]
    assert [token["threshold"] for token in trace] == [0.001] * len(trace)
    assert len(trace) == traced["choices"][0]["espo"]["tokens"] > 4
    plain = [json.loads(json.dumps(told), object_hook=comparable) for _, told in answers]
    assert rounded(plain[0]) == rounded(plain[1])
    # Each token had its eight alternatives, or the rule could not have decided at the first.
    assert stopped["choices"][0]["espo"]["cut"] == 4


async def test_several_prompts_equal_the_bare_servers(vllm_server: VllmServer) -> None:
    fields = {"max_tokens": 12, "temperature": 1.0, "seed": 3, "n": 2, "return_token_ids": True}
    body = body_for(vllm_server, COMPLETIONS, **fields)
    async with gateway_for(vllm_server, gate=None) as gateway:
        for prompt in (["1+1=", "12+3="], [[5, 6, 7], [8, 9]]):
            sent = {**body, "prompt": prompt}
            answers = [
                (await post(url + COMPLETIONS, sent))[1] for url in (vllm_server.url, gateway.url)
            ]
            answers = [json.loads(json.dumps(a), object_hook=comparable) for a in answers]
            assert len(answers[0]["choices"]) == 4
            assert answers[0] == answers[1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_stop_ends_the_generation(vllm_server: VllmServer, path: str, stream: bool) -> None:
    """Each of several choices ends where it fails; vLLM generates next to nothing after that."""
    fields = {"max_tokens": LENGTH, "temperature": 1.0, "seed": 1, "ignore_eos": True, "n": CHOICES}
    body = body_for(vllm_server, path, return_token_ids=True, **fields)
    async with gateway_for(vllm_server, gate=STRICT) as gateway:
        before = await settled(vllm_server)
        _, whole = await post(gateway.url + path, {**body, "espo": {"mode": "shadow"}})
        assert await settled(vllm_server) - before == CHOICES * LENGTH + 1
        spent: list[float] = []
        while not spent or (min(spent) > CHOICES * LENGTH / 2 and len(spent) < ATTEMPTS):
            before = await settled(vllm_server)
            ids, records = await stopped_choices(gateway.url + path, body, stream=stream)
            for found, record, reference in zip(ids, records, whole["choices"], strict=True):
                assert record["stopped"]
                assert record["cut"] == reference["espo"]["cut"] == len(found)
                assert found == reference["token_ids"][: record["cut"]]
            spent.append(await settled(vllm_server) - before - 1)
            assert spent[-1] >= sum(record["tokens"] for record in records)
    assert min(spent) < CHOICES * LENGTH / 2


async def stopped_choices(
    url: str, body: dict[str, Any], *, stream: bool
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Token ids and records of one request's choices."""
    if not stream:
        choices = (await post(url, body))[1]["choices"]
        return [choice["token_ids"] for choice in choices], [choice["espo"] for choice in choices]
    chunks = await post_stream(url, {**body, "stream": True})
    last = [choice for chunk in chunks for choice in chunk["choices"] if "espo" in choice]
    last.sort(key=lambda choice: choice["index"])
    return [stream[1] for stream in joined(chunks)[:-1]], [choice["espo"] for choice in last]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_departure_ends_the_generation(
    vllm_server: VllmServer, path: str, stream: bool
) -> None:
    fields = {"max_tokens": LENGTH, "ignore_eos": True, "stream": stream, "n": CHOICES}
    body = body_for(vllm_server, path, **fields)
    async with gateway_for(vllm_server, gate=None) as gateway:
        spent: list[float] = []
        while not spent or (min(spent) > CHOICES * LENGTH / 2 and len(spent) < ATTEMPTS):
            before = await settled(vllm_server)
            reader, writer = await raw_request(gateway.url, path, body)
            if stream:
                await reader.readuntil(b"data: ")
            else:
                while await generated(vllm_server) == before:
                    pass
            writer.transport.abort()
            spent.append(await settled(vllm_server) - before - 1)
            assert [upstream.in_flight for upstream in gateway.pool.servers] == [0]
    assert 0 < min(spent) < CHOICES * LENGTH / 2


@pytest.mark.parametrize("ends", [{}, {"stop": ["7", "99"]}], ids=["EOS", "stop strings"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_the_token_that_completes_is_exempt(
    vllm_server: VllmServer, path: str, ends: dict[str, Any]
) -> None:
    """vLLM tells the end in the chunk of the last token, also when it merges many."""
    certain = json.dumps({"rule": "random", "hazard": 1.0}).encode()
    fields = {"max_tokens": LENGTH, "temperature": 1.0, **ends}
    async with gateway_for(vllm_server, gate=certain) as gateway:

        async def choice(seed: int, espo: dict[str, Any]) -> dict[str, Any]:
            body = body_for(vllm_server, path, seed=seed, espo=espo, **fields)
            return (await post(gateway.url + path, body))[1]["choices"][0]

        never = {"mode": "enforce", "min_tokens": LENGTH + 1}
        wholes = await asyncio.gather(*(choice(seed, never) for seed in range(CHOICES)))
        completed = {
            seed: whole["espo"]["tokens"]
            for seed, whole in enumerate(wholes)
            if whole["finish_reason"] == "stop" and whole["espo"]["tokens"] > 1
        }
        assert len(completed) > CHOICES / 4
        for early in (0, 1):
            choices = await asyncio.gather(
                *(choice(seed, {"min_tokens": n - early}) for seed, n in completed.items())
            )
            cuts = [n - 1 if early else None for n in completed.values()]
            assert [found["espo"]["cut"] for found in choices] == cuts
            assert {found["finish_reason"] for found in choices} == {"length" if early else "stop"}
