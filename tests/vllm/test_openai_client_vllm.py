"""The official `openai` client, and curl, cannot tell the gateway from vLLM when no rule is on."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from openai import APIError, APIStatusError, OpenAI
from pydantic import BaseModel

from espo_gateway.supervisor import ServerProcess, free_port
from tests.helpers.gateway import client_of, gateway_for, post
from tests.helpers.vllm import (
    CHAT,
    COMPLETIONS,
    STRICT,
    VllmServer,
    body_for,
    comparable,
    joined,
    rounded,
    settled,
)

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

Call = dict[str, Any]

#: 12+34= in the tokenizer's ids
IDS = [5, 6, 7, 8]
SEEDED: Call = {"temperature": 1.0, "seed": 7, "max_tokens": 24}
GREEDY: Call = {"temperature": 0.0, "max_tokens": 24}

COMPLETION_CALLS: dict[str, Call] = {
    "greedy": {"prompt": "12+34=", **GREEDY},
    "seeded": {"prompt": "12+34=", **SEEDED},
    "n": {"prompt": "12+34=", **SEEDED, "n": 3},
    "texts": {"prompt": ["1+1=", "12+3=", "7+7="], **SEEDED},
    "texts, n": {"prompt": ["1+1=", "12+3="], **SEEDED, "n": 2},
    "ids": {"prompt": IDS, **GREEDY},
    "lists of ids": {"prompt": [IDS, [9, 10], [6]], **SEEDED},
    "logprobs": {"prompt": "12+34=", **SEEDED, "logprobs": 3},
    "no alternatives": {"prompt": "12+34=", **SEEDED, "logprobs": 0, "n": 2},
    "stop strings": {"prompt": "12+34=", **SEEDED, "stop": ["7", "99"], "n": 4},
    "echo": {"prompt": "12+34=", **GREEDY, "echo": True},
    "vLLM's own": {
        "prompt": "12+34=",
        **SEEDED,
        "extra_body": {"top_k": 5, "return_token_ids": True, "ignore_eos": True},
    },
    "one token": {"prompt": "12+34=", "temperature": 0.0, "max_tokens": 1},
}
MESSAGES = [{"role": "user", "content": "12+34="}]
CHAT_CALLS: dict[str, Call] = {
    "greedy": {"messages": MESSAGES, **GREEDY},
    "seeded": {"messages": MESSAGES, **SEEDED},
    "n": {"messages": MESSAGES, **SEEDED, "n": 3},
    "logprobs": {"messages": MESSAGES, **SEEDED, "logprobs": True, "top_logprobs": 3},
    "no alternatives": {"messages": MESSAGES, **SEEDED, "logprobs": True, "n": 2},
    "stop string": {"messages": MESSAGES, **SEEDED, "stop": "7", "n": 4},
    "new name": {"messages": MESSAGES, "temperature": 0.0, "max_completion_tokens": 9},
    "vLLM's own": {
        "messages": MESSAGES,
        **SEEDED,
        "extra_body": {"top_k": 5, "return_token_ids": True, "ignore_eos": True},
    },
}
CALLS = {
    **{f"completions: {name}": call for name, call in COMPLETION_CALLS.items()},
    **{f"chat: {name}": call for name, call in CHAT_CALLS.items()},
}

#: What the server refuses; it must be told in its words.
REFUSED: dict[str, Call] = {
    "too many tokens": {"prompt": "12+34=", "max_tokens": 100_000},
    "temperature": {"prompt": "12+34=", "temperature": -1.0},
    "top_p": {"prompt": "12+34=", "top_p": 7.0},
    "logprobs": {"prompt": "12+34=", "logprobs": 10_000},
    "model": {"prompt": "12+34=", "model": "another"},
    "prompt": {"prompt": [10**9]},
    "chat: no role": {"messages": [{"content": "12+34="}]},
    "chat: top_logprobs alone": {"messages": MESSAGES, "top_logprobs": 2},
    "chat: text": {"messages": "12+34="},
}


def client_for(url: str) -> OpenAI:
    return OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def method(client: Any, call: Call) -> Any:
    """The resource's `create` that the call is for."""
    return client.chat.completions if "messages" in call else client.completions


def plain(answer: BaseModel) -> Any:
    """Every field of an answer, of choices, messages and usage too, that does not name it."""
    return json.loads(answer.model_dump_json(), object_hook=comparable)


def asked(url: str, server: VllmServer, call: Call, *, stream: bool) -> Any:
    """With the synchronous client: the answer, or the chunks joined."""
    with client_for(url) as client:
        create = method(client, call).create
        if not stream:
            return plain(create(model=server.model, **call))
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(create(model=server.model, **call, **options))
        return [type(chunks[0]).__name__, joined([chunk.to_dict() for chunk in chunks])]


async def asked_async(url: str, server: VllmServer, call: Call, *, stream: bool) -> Any:
    async with client_of(url) as client:
        create = method(client, call).create
        if not stream:
            return plain(await create(model=server.model, **call))
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await create(model=server.model, **call, **options)]
        return [type(chunks[0]).__name__, joined([chunk.to_dict() for chunk in chunks])]


async def asked_in_thread(url: str, server: VllmServer, call: Call, *, stream: bool) -> Any:
    # The gateway runs in this thread's loop.
    return await asyncio.to_thread(asked, url, server, call, stream=stream)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("ask", [asked_in_thread, asked_async], ids=["sync", "async"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_the_client_gets_the_same(
    vllm_server: VllmServer, call: Call, ask: Callable[..., Any], stream: bool
) -> None:
    async with gateway_for(vllm_server, gate=None) as gateway:
        direct = await ask(vllm_server.url, vllm_server, call, stream=stream)
        through = await ask(gateway.url, vllm_server, call, stream=stream)
    assert rounded(direct) == rounded(json.loads(json.dumps(through), object_hook=comparable))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
async def test_the_client_is_refused_the_same(
    vllm_server: VllmServer, call: Call, stream: bool
) -> None:
    async with gateway_for(vllm_server, gate=STRICT) as gateway:
        errors = []
        for url in (vllm_server.url, gateway.url):
            async with client_of(url) as client:
                create = method(client, call).create
                with pytest.raises(APIError) as caught:  # noqa: PT012
                    answer = await create(**{"model": vllm_server.model, "stream": stream, **call})
                    # vLLM finds some mistakes only when its stream has begun.
                    async for _ in answer:
                        pass
                errors.append(caught.value)
    direct, through = errors
    assert through.body == direct.body
    # The gateway has an error status also where vLLM's stream has begun with a 200.
    assert type(through) is type(direct) or (stream and type(direct) is APIError)
    assert isinstance(through, APIStatusError)


async def test_raw_responses(vllm_server: VllmServer) -> None:
    call = COMPLETION_CALLS["greedy"]
    async with gateway_for(vllm_server, gate=None) as gateway:
        seen = []
        for url in (vllm_server.url, gateway.url):
            async with client_of(url) as client:
                raw = await client.completions.with_raw_response.create(
                    model=vllm_server.model, **call
                )
                lines = []
                async with client.completions.with_streaming_response.create(
                    model=vllm_server.model, stream=True, **call
                ) as streamed:
                    lines = [line async for line in streamed.iter_lines() if line]
                seen.append(
                    (
                        (raw.status_code, raw.headers["content-type"], plain(raw.parse())),
                        (streamed.status_code, streamed.headers["content-type"]),
                        lines[-1],
                        joined([json.loads(line[6:]) for line in lines[:-1]]),
                    )
                )
    assert seen[0] == seen[1]
    assert seen[0][2] == "data: [DONE]"


async def test_models(vllm_server: VllmServer) -> None:
    async with gateway_for(vllm_server, gate=None) as gateway:
        listed = []
        for url in (vllm_server.url, gateway.url):
            async with client_of(url) as client:
                models = [model async for model in client.models.list()]
                listed.append(
                    [plain(model.model_copy(update={"permission": []})) for model in models]
                )
    assert listed[0] == listed[1]
    assert len(listed[0]) == 1


OTHER_ROUTES: dict[str, tuple[str, Call]] = {
    "embeddings": ("/v1/embeddings", {"input": "12+34="}),
    "responses": ("/v1/responses", {"input": "12+34=", "temperature": 0.0, "max_output_tokens": 9}),
    "score": ("/v1/score", {"text_1": "1", "text_2": "2"}),
    "tokenize": ("/v1/tokenize", {"prompt": "12+34="}),
    "audio": ("/v1/audio/transcriptions", {}),
    "unknown": ("/v1/nothing/here", {}),
}
#: What differs from answer to answer.
NAMES = ("id", "created", "created_at", "request_id", "item_id", "completed_at")


@pytest.mark.parametrize(("path", "body"), OTHER_ROUTES.values(), ids=OTHER_ROUTES)
async def test_other_routes_answer_the_same(vllm_server: VllmServer, path: str, body: Call) -> None:
    def nameless(fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name not in NAMES}

    async with gateway_for(vllm_server, gate=None) as gateway:
        answers = []
        for url in (vllm_server.url, gateway.url):
            status, answer = await post(url + path, {"model": vllm_server.model, **body})
            answers.append((status, json.loads(json.dumps(answer), object_hook=nameless)))
    assert answers[0] == answers[1]


async def curl(url: str, path: str, body: Call) -> tuple[list[str], list[bytes]]:
    """Status line and content type; the events."""
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sN", "-D", "/dev/stderr", "-H", "Content-Type: application/json"),
        *("-d", json.dumps(body), url + path),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    events, head = await process.communicate()
    assert process.returncode == 0
    lines = head.decode().lower().splitlines()
    return sorted(x for x in lines if x.startswith(("http/", "content-type"))), events.split(
        b"\n\n"
    )


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_curl_gets_the_same_events(vllm_server: VllmServer, path: str, n: int) -> None:
    options = {"include_usage": True, "continuous_usage_stats": n == 1}
    body = body_for(vllm_server, path, **SEEDED, n=n, stream=True, stream_options=options)
    async with gateway_for(vllm_server, gate=None) as gateway:
        heads, streams = zip(
            *[await curl(url, path, body) for url in (vllm_server.url, gateway.url)], strict=True
        )
    assert heads[0] == heads[1]
    for events in streams:
        assert events[-2:] == [b"data: [DONE]", b""]
    chunks = [[json.loads(event[6:]) for event in events[:-2]] for events in streams]
    assert rounded(joined(chunks[0])) == rounded(joined(chunks[1]))
    # Field by field too, where vLLM has merged the same tokens: the same counts, chunk by chunk.
    counts = [[chunk["usage"] for chunk in stream] for stream in chunks] if n == 1 else [0, 1]
    if counts[0] == counts[1]:
        plains = [json.loads(json.dumps(c), object_hook=comparable) for c in chunks]
        assert plains[0] == plains[1]


@pytest_asyncio.fixture(loop_scope="session")
async def gateway_url(vllm_server: VllmServer, tmp_path: Path) -> AsyncIterator[str]:
    """A gateway in a process of its own: a client in its loop would hold up its decisions."""
    gate = tmp_path / "gate.json"
    gate.write_bytes(STRICT)
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "espo_gateway", "--upstream", vllm_server.url]
    process = await ServerProcess.start(
        [*command, "--port", str(port), "--gate", str(gate)],
        log_path=tmp_path / "gateway.log",
        ready_url=f"{url}/health",
    )
    yield url
    await process.stop()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_stop_frees_the_request_at_once(
    vllm_server: VllmServer, gateway_url: str, path: str, stream: bool
) -> None:
    """Over many stopped requests, 16 at a time: at most 2 tokens too many at the median.

    Asked up to three times: when other work takes the machine's cores, no abort is in time.
    """
    overshoots: list[float] = []
    while not overshoots or (overshoots[-1] > 2 and len(overshoots) < 3):
        overshoots.append(await median_overshoot(vllm_server, gateway_url, path, stream))
    assert overshoots[-1] <= 2, overshoots


async def median_overshoot(
    vllm_server: VllmServer, gateway_url: str, path: str, stream: bool
) -> float:
    """Of stopped requests; all the rest that must hold is asserted."""
    at_once, requests, length = asyncio.Semaphore(16), 160, 400
    fields: Call = {"max_tokens": length, "temperature": 1.0, "stream": stream}
    fields["extra_body"] = {"ignore_eos": True, "espo": {"min_tokens": 16}}

    async with client_of(gateway_url) as client:

        async def request(seed: int) -> Any:
            body = body_for(vllm_server, path, seed=seed, **fields)
            async with at_once:
                answer = await method(client, body).create(**body)
                if not stream:
                    return answer.choices[0]
                return [choice async for chunk in answer for choice in chunk.choices][-1]

        before = await settled(vllm_server)
        choices = await asyncio.gather(*map(request, range(requests)))
        spent = await settled(vllm_server) - before - 1
    assert {choice.finish_reason for choice in choices} == {"length"}
    records = [choice.espo for choice in choices]
    overshoot = [record["overshoot"] for record in records if record["stopped"]]
    kept = sum(record["cut"] or record["tokens"] for record in records)
    print(
        f"{path}, stream={stream}: {len(overshoot)} of {requests} stopped; overshoot at the median "
        f"{statistics.median(overshoot):g}, mean {statistics.mean(overshoot):.2f}, "
        f"most {max(overshoot)}; vLLM generated {spent:.0f} tokens for {kept} kept"
    )
    assert len(overshoot) > 0.9 * requests
    assert spent < requests * length / 2
    return statistics.median(overshoot)
