"""vLLM's tokens in, tokens out route through the gateway: nothing changes but what is stopped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from espo_gateway.client import outcomes
from tests.helpers.gateway import gateway_for, post, post_stream, raw_request
from tests.helpers.vllm import STRICT, VllmServer, rounded, serve

pytestmark = pytest.mark.vllm

TOKENS, ABORT = "/inference/v1/generate", "/inference/v1/abort_requests"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tokens_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmServer]:
    server = await serve(tmp_path_factory.mktemp("tokens"), "--enable-scale-out")
    yield server
    await server.process.stop()


def tokens_body(server: VllmServer, sampling: dict[str, Any], **fields: Any) -> dict[str, Any]:
    sampling = {"max_tokens": 48, **sampling}
    return {"model": server.model, "token_ids": [5, 6, 7], "sampling_params": sampling, **fields}


def comparable(answer: dict[str, Any]) -> Any:
    """Without what differs from one request to the next, and without nulls."""

    def kept(fields: dict[str, Any]) -> dict[str, Any]:
        skipped = ("espo", "request_id", "created")
        return {k: v for k, v in fields.items() if k not in skipped and v is not None}

    return rounded(json.loads(json.dumps(answer), object_hook=kept))


def joined(chunks: list[dict[str, Any]]) -> list[Any]:
    streams: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            stream = streams.setdefault(choice["index"], [[], "", [], None])
            stream[0] += choice["token_ids"]
            stream[1] += choice.get("text") or ""
            stream[2] += (choice["logprobs"] or {}).get("content") or []
            stream[3] = choice["finish_reason"]
    return rounded(json.loads(json.dumps([streams, chunks[-1].get("usage")])))


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 7, "logprobs": 1},
        {"temperature": 1.0, "seed": 7, "logprobs": 3, "n": 3},
        {"temperature": 1.0, "seed": 7, "logprobs": 0},
    ],
    ids=["greedy", "one", "three", "sampled only"],
)
@pytest.mark.parametrize("output", ["tokens", "text"])
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_equal_the_bare_servers(
    tokens_server: VllmServer, stream: bool, output: str, sampling: dict[str, Any], mode: str
) -> None:
    body = tokens_body(tokens_server, sampling, output_mode=output, return_token_ids=True)
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    gate = STRICT if mode == "shadow" else None
    async with gateway_for(tokens_server, gate=gate) as gateway:
        answers = []
        sent = {**body, "espo": {"mode": mode}}
        for url, one in ((tokens_server.url, body), (gateway.url, sent)):
            if stream:
                answers.append(joined(await post_stream(url + TOKENS, one)))
            else:
                status, answer = await post(url + TOKENS, one)
                assert status == 200, answer
                answers.append(comparable(answer))
    assert answers[0] == answers[1]


async def test_a_stopped_one_begins_as_it_would_have_gone_on(tokens_server: VllmServer) -> None:
    body = tokens_body(tokens_server, {"temperature": 1.0, "seed": 3, "max_tokens": 200})
    _, whole = await post(tokens_server.url + TOKENS, body)
    async with gateway_for(tokens_server, gate=STRICT) as gateway:
        status, answer = await post(gateway.url + TOKENS, body)
        assert status == 200, answer
        (outcome,) = outcomes(answer)
        assert outcome.end == "early_stop"
        ids = answer["choices"][0]["token_ids"]
        assert len(ids) == outcome.tokens
        assert ids == whole["choices"][0]["token_ids"][: len(ids)]


async def test_a_request_is_aborted_by_the_id_that_its_client_gave(
    tokens_server: VllmServer,
) -> None:
    sampling = {"max_tokens": 480, "min_tokens": 480, "ignore_eos": True}
    body = tokens_body(tokens_server, sampling, request_id="mine", stream=True)
    async with gateway_for(tokens_server) as gateway:
        reader, writer = await raw_request(gateway.url, TOKENS, body)
        await reader.readuntil(b'"token_ids"')
        async with asyncio.timeout(60):
            async with (
                aiohttp.ClientSession() as session,
                session.post(
                    gateway.url + ABORT, json={"request_ids": ["generate-tokens-mine"]}
                ) as response,
            ):
                status = response.status
            rest = await reader.readuntil(b"data: [DONE]")
        writer.close()
        assert status == 200
        assert b'"finish_reason":"abort"' in rest
