"""What Prometheus is told: well-formed, by its conventions, and back to zero after faults."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from typing import Any

import aiohttp
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from espo_gateway.front.gateway import Gateway
from espo_gateway.testing import FakeServer, Script
from espo_gateway.testing.critic import FakeCritic
from tests.helpers.gateway import (
    BAD,
    CHAT,
    COMPLETIONS,
    FAILING,
    GOOD,
    advance,
    chat_body,
    completion_body,
    gateway_for,
    get_text,
    post,
    post_stream,
    raw_request,
)


async def families(gateway: Gateway) -> dict[str, Metric]:
    text = await get_text(gateway.url + "/metrics")
    return {family.name: family for family in text_string_to_metric_families(text)}


async def samples(gateway: Gateway) -> dict[str, float]:
    """Every sample, as it is written: name{label="value"}."""
    return {
        sample.name
        + "{"
        + ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
        + "}": sample.value
        for family in (await families(gateway)).values()
        for sample in family.samples
    }


async def settled(gateway: Gateway) -> dict[str, float]:
    """The samples once every request is over."""
    while True:
        seen = await samples(gateway)
        if not seen["espo_gateway_requests_in_flight{}"]:
            return seen


async def test_the_exposition_is_well_formed() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        await post(gateway.url + COMPLETIONS, completion_body())
        text = await get_text(gateway.url + "/metrics")
        found = list(text_string_to_metric_families(text))
        names = [family.name for family in found]
        assert len(names) == len(set(names))
        for family in found:
            assert family.documentation, family.name
            assert family.type != "unknown", family.name
            assert family.name.startswith(("espo_gateway_", "process_")), family.name
            written = [(s.name, tuple(sorted(s.labels.items()))) for s in family.samples]
            assert len(written) == len(set(written)), family.name
            if family.type == "histogram":
                assert re.search(r"_(seconds|z|threshold)$", family.name), family.name
        for line in text.splitlines():
            if line.startswith("# TYPE espo_gateway") and line.endswith(" counter"):
                assert line.split()[2].endswith("_total"), line


async def test_a_stopped_choice() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        server.queue.append(Script([GOOD] * 20))
        await post(gateway.url + COMPLETIONS, completion_body())
        await post_stream(gateway.url + COMPLETIONS, completion_body(stream=True))
        seen = await settled(gateway)
        expected = {
            "espo_gateway_choices_total{end=completed}": 1,
            "espo_gateway_choices_total{end=early_stop}": 1,
            "espo_gateway_choices_total{end=length}": 0,
            "espo_gateway_choices_total{end=aborted}": 0,
            "espo_gateway_stops_total{mode=enforce,rule=regret-only}": 1,
            "espo_gateway_estimated_saved_tokens_total{}": 20 - 8,
            "espo_gateway_shadow_saved_tokens_total{}": 0,
            "espo_gateway_regret_z_count{decision=stop}": 1,
            "espo_gateway_regret_z_count{decision=none}": 1,
            "espo_gateway_decision_threshold_sum{rule=regret-only}": 1.0,
            "espo_gateway_time_to_first_token_seconds_count{endpoint=/v1/completions}": 2,
            "espo_gateway_time_per_output_token_seconds_count{}": 2,
        }
        assert {name: seen[name] for name in expected} == expected
        # z is 1.501. Where z may be negative there is no sum.
        below = {
            le: seen[f"espo_gateway_regret_z_bucket{{decision=stop,le={le}}}"] for le in (1.25, 2.0)
        }
        assert below == {1.25: 0, 2.0: 1}


async def test_a_decision_in_shadow_knows_what_it_would_have_saved() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        await post(gateway.url + COMPLETIONS, completion_body(espo={"mode": "shadow"}))
        seen = await settled(gateway)
        assert seen["espo_gateway_stops_total{mode=shadow,rule=regret-only}"] == 1
        assert seen["espo_gateway_shadow_saved_tokens_total{}"] == 16 - 8
        assert seen["espo_gateway_estimated_saved_tokens_total{}"] == 0
        assert seen["espo_gateway_choices_total{end=completed}"] == 1


async def test_the_first_token_is_told_while_the_rest_is_on_its_way() -> None:
    name = "espo_gateway_time_to_first_token_seconds_count{endpoint=/v1/chat/completions}"
    async with FakeServer(FAILING, gated=True) as server, gateway_for(server) as gateway:
        _, writer = await raw_request(gateway.url, CHAT, chat_body(stream=True, n=2))
        await server.until(lambda: server.running == 2)
        assert name not in await samples(gateway)
        server.release()
        while name not in (seen := await samples(gateway)):
            pass
        assert seen[name] == 1
        assert seen["espo_gateway_choices_in_flight{}"] == 2
        server.release()
        await server.until(lambda: server.generated == 2)
        assert (await samples(gateway))[name] == 1
        writer.transport.abort()
        await server.until(lambda: server.running == 0)


async def test_the_gate_in_force() -> None:
    gate = {"version": 9, "rule": "value-gated", "beta": 2.5, "epsilon": 0.3, "p_star": 0.02}
    async with FakeServer(FAILING) as server, gateway_for(server, gate=None) as gateway:
        seen = await samples(gateway)
        assert seen["espo_gateway_gate_info{rule=none,value=none}"] == 1
        gateway.push_gate(json.dumps(gate).encode())
        seen = await samples(gateway)
        assert seen["espo_gateway_gate_info{rule=value-gated,value=constant}"] == 1
        assert "espo_gateway_gate_info{rule=none,value=none}" not in seen
        numbers = [
            seen[f"espo_gateway_gate_{name}{{}}"]
            for name in ("version", "beta", "epsilon", "p_star")
        ]
        assert numbers == [9, 2.5, 0.3, 0.02]


async def test_critic_calls_asked_and_avoided() -> None:
    gate = {"rule": "value-gated", "beta": 4.0, "epsilon": 0.1, "value": "critic"}
    script = Script([GOOD] * 5 + [BAD] + [GOOD] * 14)  # 7 of its z lie above 0.4
    async with (
        FakeServer(script) as server,
        FakeCritic(lambda prefix: 0.5) as critic,
        gateway_for(server, gate=json.dumps(gate).encode(), critic=critic.url) as gateway,
    ):
        _, answer = await post(gateway.url + COMPLETIONS, completion_body(espo={"trace": True}))
        trace = answer["choices"][0]["espo"]["trace"]
        asked = sum(token["z"] > 4.0 * 0.1 for token in trace)
        # What was asked about is told with its answer, the rest with the least threshold.
        assert [token["value"] for token in trace].count(0.5) == asked
        assert {token["threshold"] for token in trace} == {4.0 * 0.1, 4.0 * 0.5}
        seen = await settled(gateway)
        assert 0 < asked < 20
        assert seen["espo_gateway_critic_tokens_total{outcome=asked}"] == asked
        assert seen["espo_gateway_critic_tokens_total{outcome=avoided}"] == 20 - asked


async def test_nobody_knows_what_a_server_that_decides_has_asked() -> None:
    gate = json.dumps({"rule": "value-gated", "value": "critic", "beta": 2.0}).encode()
    script = dataclasses.replace(FAILING, values=(0.0,) * 16)
    async with (
        FakeServer(script, decides=True, values=True) as server,
        gateway_for(server, gate=gate, critic="engine") as gateway,
    ):
        _, answer = await post(gateway.url + COMPLETIONS, completion_body())
        assert answer["choices"][0]["espo"]["stopped"]
        seen = await settled(gateway)
        assert not [name for name in seen if name.startswith("espo_gateway_critic_tokens_total")]


async def test_a_choice_is_over_when_its_own_last_token_has_come() -> None:
    def script(body: dict[str, Any]) -> Script:
        return Script([GOOD] * (3 if body["seed"] == 1 else 10))

    async with FakeServer(script, gated=True) as server, gateway_for(server) as gateway:
        asked = asyncio.create_task(post(gateway.url + COMPLETIONS, completion_body(n=2, seed=1)))
        await server.until(lambda: server.running == 2)
        sessions = list(gateway.sessions)
        short, long = sorted(sessions, key=lambda session: session.index)
        await advance(server, 8)
        await server.until(lambda: server.finished == 1)
        while short.over is None:
            await samples(gateway)
        assert long.over is None
        assert {short, long} == gateway.sessions
        server.release(100)
        await asked
        # Made known, it is by its own times.
        name = "espo_gateway_time_per_output_token_seconds"
        before = await settled(gateway)
        short.first_token, short.over = 1.0, 5.0
        gateway.metrics.count(short)
        after = await settled(gateway)
        assert after[f"{name}_count{{}}"] == before[f"{name}_count{{}}"] + 1 == 3
        assert after[f"{name}_bucket{{le=2.5}}"] == before[f"{name}_bucket{{le=2.5}}"] + 1


async def test_unmonitored_requests_by_reason() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        for fields in ({"espo": {"mode": "off"}}, {"echo": True}, {"best_of": 2}):
            await post(gateway.url + COMPLETIONS, completion_body(**fields))
        seen = await settled(gateway)
        for reason in ("asked for", "echo", "best_of"):
            assert seen[f"espo_gateway_unmonitored_requests_total{{reason={reason}}}"] == 1


async def test_no_label_is_a_clients_choice() -> None:
    marker = "chosen-by-a-client"
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        fields: dict[str, Any] = {"model": marker, "user": marker, "request_id": marker}
        headers = {"X-Request-Id": marker, "User-Agent": marker, "Host": marker}
        async with aiohttp.ClientSession() as session:
            for path in (
                COMPLETIONS,
                f"/v1/{marker}",
                f"/{marker}",
                f"/v1/models/{marker}?{marker}",
            ):
                url = gateway.url + path
                for method in ("POST", "GET", marker):
                    data = json.dumps(completion_body(**fields))
                    async with session.request(method, url, data=data, headers=headers) as answer:
                        await answer.read()
        assert marker not in await get_text(gateway.url + "/metrics")


async def fault_statuses(gateway: Gateway, server: FakeServer) -> None:
    url = gateway.url + COMPLETIONS
    for script in (
        Script([], status=500),
        Script([GOOD] * 9, fault="garbage", after=3),
        Script([GOOD] * 9, fault="reset", after=3),
        Script([GOOD] * 9, fault="error", after=3),
        Script([GOOD] * 9, logprobs=False),
    ):
        for stream in (True, False):
            server.queue.append(script)
            async with (
                aiohttp.ClientSession() as session,
                session.post(url, json=completion_body(stream=stream)) as answer,
            ):
                await answer.read()


async def test_after_faults_all_gauges_are_back() -> None:
    stalled = Script([GOOD] * 100, fault="stall", after=3)
    settings: dict[str, Any] = {"unmonitored": "refuse", "breaker_failures": 1000}
    async with FakeServer(stalled) as server, gateway_for(server, **settings) as gateway:
        before = await gauges(gateway)
        assert set(before.values()) == {0}
        await fault_statuses(gateway, server)
        for path, body in ((COMPLETIONS, completion_body(n=3)), (CHAT, chat_body(stream=True))):
            _, writer = await raw_request(gateway.url, path, body)
            await server.until(lambda: server.running > 0)
            assert (await gauges(gateway))["espo_gateway_requests_in_flight{}"] == 1
            writer.transport.abort()
            await server.until(lambda: server.running == 0)
            await settled(gateway)
        assert await gauges(gateway) == before
        seen = await samples(gateway)
        assert seen["espo_gateway_client_disconnects_total{}"] == 2
        assert seen["espo_gateway_choices_total{end=aborted}"] == 10 + 3 + 1


async def gauges(gateway: Gateway) -> dict[str, float]:
    """Those that tell what is under way."""
    return {
        name: value
        for name, value in (await samples(gateway)).items()
        if re.search(r"in_flight|queued|waiting|breaker_open", name)
    }
