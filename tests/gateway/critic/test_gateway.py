"""A critic server in the gateway: only what could stop is asked, and the cut is where V says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from espo_gateway.app import running
from espo_gateway.config import Config
from espo_gateway.critic import server as critic_module
from espo_gateway.critic.inquiry import MAX_UNANSWERED
from espo_gateway.critic.server import CONCURRENCY
from espo_gateway.front.gateway import Gateway
from espo_gateway.testing import FakeServer, Script, Token
from espo_gateway.testing.critic import FakeCritic
from tests.helpers.critics import ASKED, FAULTS, PROMPT, LockedCritic, gateway_with, stop_at, total
from tests.helpers.gateway import (
    COMPLETIONS,
    CRITIC_GATE,
    FAILING,
    LONG,
    completion_body,
    gateway_for,
    get_text,
    metric,
    post,
    post_stream,
    raw_request,
    until_running,
)


@pytest.mark.parametrize("stream", [True, False])
async def test_the_cut_is_where_the_critic_says(stream: bool) -> None:
    ids = [Token(t.text, t.logprob, t.max_logprob, i) for i, t in enumerate(FAILING.tokens)]
    async with (
        FakeServer(Script(ids)) as server,
        FakeCritic(stop_at(10)) as critic,
        gateway_with(server, critic) as gateway,
    ):
        if stream:
            chunks = await post_stream(gateway.url + COMPLETIONS, completion_body(stream=True))
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            record = chunks[-1]["choices"][0]["espo"]
        else:
            _, answer = await post(gateway.url + COMPLETIONS, completion_body())
            text, record = answer["choices"][0]["text"], answer["choices"][0]["espo"]
        assert text == "aaaaaabbbb"
        assert (record["cut"], record["value"], record["threshold"]) == (10, 0.0, 1.0)
        asked = [prefix for request in critic.requests for prefix in request]
        assert asked[:3] == [[*PROMPT, *range(token)] for token in (8, 9, 10)]
        assert await metric(gateway, "espo_gateway_critic_questions_total") >= len(asked)


async def test_a_critic_is_shown_the_upstream_key_that_is_in_force(tmp_path: Path) -> None:
    (path := tmp_path / "key").write_text("right")
    async with (
        FakeServer(FAILING) as server,
        LockedCritic(stop_at(10)) as critic,
        gateway_with(server, critic, upstream_key_file=path) as gateway,
    ):
        for key in ("right", "another"):
            path.write_text(key)
            critic.key = key
            gateway.reload()
            _, answer = await post(gateway.url + COMPLETIONS, completion_body())
            assert answer["choices"][0]["espo"]["cut"] == 10


async def test_what_a_critic_says_is_read_in_its_own_unit() -> None:
    """-1 for a wrong answer and 1 for a right one: 0 is a chance of one half."""
    gate = json.dumps(
        {**json.loads(CRITIC_GATE), "critic_wrong": -1.0, "critic_right": 1.0}
    ).encode()
    async with (
        FakeServer(FAILING) as server,
        FakeCritic(lambda prefix: 0.0) as critic,
        gateway_with(server, critic, gate=gate) as gateway,
    ):
        body = completion_body(espo={"mode": "shadow", "trace": True})
        _, answer = await post(gateway.url + COMPLETIONS, body)
        record = answer["choices"][0]["espo"]
        assert record["value"] == 0.5
        assert {one["value"] for one in record["trace"]} == {None, 0.5}


async def test_only_tokens_that_could_stop_are_asked_about() -> None:
    async with (
        FakeServer(FAILING) as server,
        FakeCritic(stop_at(0)) as critic,
        gateway_with(server, critic) as gateway,
    ):
        await post(gateway.url + COMPLETIONS, completion_body())
        lengths = [len(prefix) for request in critic.requests for prefix in request]
        assert sorted(lengths) == [len(PROMPT) + token for token in ASKED]
        assert await metric(gateway, "espo_gateway_critic_questions_total") == len(ASKED)
        assert await metric(gateway, "espo_gateway_critic_answer_duration_seconds_count") == len(
            ASKED
        )


async def waiting(gateway: Gateway) -> float:
    return await metric(gateway, "espo_gateway_critic_questions_waiting")


async def reach_waiting(server: FakeServer, critic: FakeCritic, gateway: Gateway) -> None:
    """Let the server send until questions wait behind those that are out."""
    server.release(8)
    for out in range(1, CONCURRENCY + 1):
        await until_running(critic, out)
        server.release(1)
    while not await waiting(gateway):
        pass


async def test_a_departed_clients_questions_are_dropped() -> None:
    async with (
        FakeServer(LONG, gated=True) as server,
        FakeCritic(stop_at(0), gated=True) as critic,
        gateway_with(server, critic) as gateway,
    ):
        body = completion_body(max_tokens=10_000)
        _, writer = await raw_request(gateway.url, COMPLETIONS, body)
        await reach_waiting(server, critic, gateway)
        writer.transport.abort()
        await server.until(lambda: server.aborted == 1)
        while await waiting(gateway):
            pass
        critic.release(CONCURRENCY)
        await critic.until(lambda: critic.running == 0)
        assert critic.questions == CONCURRENCY


async def test_a_settled_cut_drops_the_questions_after_it() -> None:
    async with (
        FakeServer(LONG, gated=True) as server,
        FakeCritic(stop_at(8), gated=True) as critic,
        gateway_with(server, critic) as gateway,
    ):
        body = completion_body(max_tokens=10_000)
        request = asyncio.create_task(post(gateway.url + COMPLETIONS, body))
        await reach_waiting(server, critic, gateway)
        critic.release(1)  # the answer to the first question, and to no other
        while not await metric(gateway, "espo_gateway_critic_questions_total"):
            pass
        server.release(1)  # a read, after which the answer is seen
        _, answer = await request
        assert answer["choices"][0]["espo"]["cut"] == 8
        await server.until(lambda: server.aborted == 1)
        assert await waiting(gateway) == 0


async def test_in_shadow_it_does_too_and_the_stream_goes_on() -> None:
    async with (
        FakeServer(FAILING, gated=True) as server,
        FakeCritic(stop_at(8), gated=True) as critic,
        gateway_with(server, critic) as gateway,
    ):
        body = completion_body(espo={"mode": "shadow"})
        request = asyncio.create_task(post(gateway.url + COMPLETIONS, body))
        await reach_waiting(server, critic, gateway)
        critic.release(1)
        while not await metric(gateway, "espo_gateway_critic_questions_total"):
            pass
        server.release(1)
        while await waiting(gateway):
            pass
        assert critic.questions <= CONCURRENCY + 1
        server.release(16)
        _, answer = await request
        [choice] = answer["choices"]
        assert (choice["text"], choice["espo"]["cut"]) == ("a" * 6 + "b" * 10, 8)


async def test_many_streams_share_few_requests_and_all_get_their_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(critic_module, "BATCH_QUESTIONS", 32)
    streams = 64

    def script(body: dict[str, Any]) -> Script:
        first = Token("a", -0.1, None, body["seed"])
        return Script([first, *list(FAILING.tokens)[1:], *list(FAILING.tokens)[6:] * 20])

    def value(prefix: list[int]) -> float:
        return 0.0 if len(prefix) - len(PROMPT) == 10 + prefix[len(PROMPT)] else 100.0

    async with (
        FakeServer(script) as server,
        FakeCritic(value) as critic,
        gateway_with(server, critic) as gateway,
    ):
        url = gateway.url + COMPLETIONS
        requests = [
            post(url, completion_body(max_tokens=200, seed=seed)) for seed in range(streams)
        ]
        cuts = [
            answer["choices"][0]["espo"]["cut"] for _, answer in await asyncio.gather(*requests)
        ]
        assert cuts == [10 + seed for seed in range(streams)]
        assert critic.most <= CONCURRENCY
        assert max(len(request) for request in critic.requests) == 32


async def test_a_stream_that_waits_for_values_is_read_no_further() -> None:
    """Memory is bounded when the critic does not keep up: the upstream is slowed down."""
    script = Script([*LONG.tokens] * 10)
    async with (
        FakeServer(script) as server,
        FakeCritic(stop_at(0), gated=True) as critic,
        gateway_with(server, critic) as gateway,
    ):
        body = completion_body(max_tokens=100_000)
        _, writer = await raw_request(gateway.url, COMPLETIONS, body)
        seen = -1
        while server.generated != seen:  # until it has come to a halt
            seen = server.generated
            await asyncio.sleep(0.3)
        assert server.running == 1
        # A read brings many chunks, and what it brought is asked.
        assert MAX_UNANSWERED < await waiting(gateway) + critic.questions < 2_000
        writer.transport.abort()
        await server.until(lambda: server.aborted == 1)


@pytest.mark.parametrize("policy", ["pass", "refuse"])
async def test_an_upstream_without_token_ids_cannot_be_monitored(policy: str) -> None:
    script = Script(FAILING.tokens, token_ids=False)
    async with (
        FakeServer(script) as server,
        FakeCritic(stop_at(0)) as critic,
        gateway_with(server, critic, unmonitored=policy) as gateway,
    ):
        status, answer = await post(gateway.url + COMPLETIONS, completion_body())
        if policy == "refuse":
            assert status == 502
            assert "return_token_ids" in answer["error"]["message"]
        else:
            [choice] = answer["choices"]
            assert "return_token_ids" in choice["espo"]["reason"]
            assert (choice["finish_reason"], choice["espo"]["tokens"]) == ("stop", 16)
        assert critic.questions == 0


async def test_a_critic_with_several_policies() -> None:
    async with (
        FakeServer(FAILING) as one,
        FakeServer(FAILING) as two,
        FakeCritic(stop_at(9)) as critic,
        running(Config((one.url, two.url), critic=critic.url, port=0, gate=CRITIC_GATE)) as gateway,
    ):
        url = gateway.url + COMPLETIONS
        answers = await asyncio.gather(*(post(url, completion_body()) for _ in range(8)))
        assert {answer["choices"][0]["espo"]["cut"] for _, answer in answers} == {9}
        assert min(len(one.bodies), len(two.bodies)) > 0
        ready = json.loads(await get_text(gateway.url + "/ready"))
        assert ready["critic"] == {"url": critic.url, "answers": True}
        await one.stop()
        _, answer = await post(url, completion_body())
        assert answer["choices"][0]["espo"]["cut"] == 9
        await critic.stop()
        ready = json.loads(await get_text(gateway.url + "/ready"))
        assert ready["critic"]["answers"] is False
        assert ready["status"] == "ok; the critic does not answer"
        # Nothing stops, but everything is served.
        status, answer = await post(url, completion_body())
        assert (status, answer["choices"][0]["espo"]["cut"]) == (200, None)


async def test_a_gate_that_needs_a_critic_says_how_to_give_one() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        status, answer = await put(gateway.url + "/espo/gate", CRITIC_GATE)
        assert (status, answer["error"]["param"]) == (400, "value")
        assert "--critic URL" in answer["error"]["message"]
    async with (
        FakeServer(FAILING) as server,
        FakeCritic(total) as critic,
        gateway_with(server, critic) as gateway,
    ):
        status, _ = await put(gateway.url + "/espo/gate", CRITIC_GATE)
        assert status == 200


async def put(url: str, data: bytes) -> tuple[int, Any]:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.put(url, data=data) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_stops_nothing(fault: Any) -> None:
    async with (
        FakeServer(FAILING) as server,
        FakeCritic(stop_at(9), fault=fault) as critic,
        gateway_with(server, critic, critic_timeout=0.2) as gateway,
    ):
        _, answer = await post(gateway.url + COMPLETIONS, completion_body())
        [choice] = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("a" * 6 + "b" * 10, "stop")
        assert choice["espo"]["cut"] is None
        assert await metric(gateway, "espo_gateway_critic_questions_total") == len(ASKED)
        # The next request finds the critic well again.
        critic.fault = None
        _, answer = await post(gateway.url + COMPLETIONS, completion_body())
        assert answer["choices"][0]["espo"]["cut"] == 9
