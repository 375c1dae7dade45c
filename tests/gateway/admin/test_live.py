"""/espo/live: what runs now, what has ended, the sums, the servers; and no text of anybody's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from espo_gateway.front.gateway import Gateway
from espo_gateway.telemetry.metrics import WINDOW, Savings
from espo_gateway.testing import FakeServer, Script, Token
from espo_gateway.upstream.pool import UpstreamPool
from tests.helpers.gateway import (
    BAD,
    COMPLETIONS,
    FAILING,
    GOOD,
    advance,
    completion_body,
    gateway_for,
    get_text,
    post,
    raw_request,
)

ENDLESS = Script([GOOD] * 10_000)


async def snapshot(gateway: Gateway) -> dict[str, Any]:
    return json.loads(await get_text(gateway.url + "/espo/live"))


async def until(gateway: Gateway, **totals: float) -> dict[str, Any]:
    """The first snapshot with these sums."""
    while True:
        seen = await snapshot(gateway)
        if totals.items() <= seen["totals"].items():
            return seen


async def test_an_idle_gateway() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        seen = await snapshot(gateway)
        assert (seen["running"], seen["streams"], seen["ended"], seen["queued"]) == (0, [], [], 0)
        assert seen["gate"] == {
            "rule": "regret-only",
            "value": None,
            "beta": 1.0,
            "epsilon": 0.2,
            "p_star": 0.05,
            "confidence": 1.0,
            "hazard": 0.0,
            "version": 3,
        }
        assert seen["servers"] == [
            {
                "url": server.url,
                "healthy": True,
                "breaker": "closed",
                "in_flight": 0,
                "retries": 0,
                "decides": False,
            }
        ]
        assert seen["totals"]["stop_share"] is None
        assert seen["tokens_per_second"] is None
        assert (await snapshot(gateway))["tokens_per_second"] == 0.0


async def test_running_streams_and_then_a_stop() -> None:
    async with FakeServer(FAILING, gated=True) as server, gateway_for(server) as gateway:
        request = asyncio.create_task(post(gateway.url + COMPLETIONS, completion_body(n=2)))
        await server.until(lambda: server.running == 2)
        await advance(server, 14)
        seen = await until(gateway, tokens=14)
        assert seen["running"] == 2
        assert seen["servers"][0]["in_flight"] == 2
        assert sum(stream["tokens"] for stream in seen["streams"]) == 14
        first, second = sorted(seen["streams"], key=lambda stream: stream["index"])
        assert (first["index"], second["index"]) == (0, 1)
        assert first["id"] != second["id"]
        for stream in seen["streams"]:
            assert stream["name"] == "cmpl-1"
            assert stream["model"] == "fake"
            assert (stream["measure"], stream["threshold"], stream["value"]) == ("z", 1.0, None)
            assert (stream["mode"], stream["cut"]) == ("enforce", None)
        server.release(20)
        _, answer = await request
        z = answer["choices"][0]["espo"]["z"]
        seen = await snapshot(gateway)
        assert (seen["running"], seen["streams"]) == (0, [])
        assert {stream["id"] for stream in seen["ended"]} == {first["id"], second["id"]}
        for stream in seen["ended"]:
            assert (stream["end"], stream["cut"], stream["z"]) == ("early_stop", 8, z)
        totals = seen["totals"]
        assert (totals["requests"], totals["early_stop"], totals["stop_share"]) == (1, 2, 1.0)


async def test_every_end_has_its_sum() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        server.queue.extend([Script([GOOD] * 20), Script([GOOD] * 20), FAILING, FAILING])
        url = gateway.url + COMPLETIONS
        await post(url, completion_body())
        await post(url, completion_body(max_tokens=12))
        await post(url, completion_body())
        await post(url, completion_body(espo={"mode": "shadow"}))
        await post(url, completion_body(espo={"mode": "off"}))
        server.queue.append(Script([GOOD] * 20, fault="reset", after=5))
        await post(url, completion_body())
        seen = await until(gateway, in_flight=0)
        assert seen["totals"] == {
            "requests": 6,
            "in_flight": 0,
            "completed": 2,
            "length": 1,
            "early_stop": 1,
            "aborted": 1,
            "stop_share": 0.25,
            "shadow_stops": 1,
            "tokens": seen["totals"]["tokens"],  # the overshoot is a matter of timing
            "saved_estimate": (12 + 4) / 2,
            "shadow_saved": 8,
            "overshoot": seen["totals"]["overshoot"],
            "unmonitored": 1,
            "errors": 1,
            "disconnects": 0,
            "critic_asked": 0,
            "critic_avoided": 0,
        }
        assert seen["totals"]["tokens"] == 20 + 12 + 8 + 16 + 5 + seen["totals"]["overshoot"]


async def test_at_most_200_streams_the_longest_first() -> None:
    tokens = iter(range(1, 211))

    def script(body: dict[str, Any]) -> Script:
        return Script([GOOD] * next(tokens), fault="stall", after=1000)

    async with FakeServer(script) as server, gateway_for(server) as gateway:
        request = asyncio.create_task(
            post(gateway.url + COMPLETIONS, completion_body(n=210, max_tokens=1000))
        )
        seen = await until(gateway, tokens=sum(range(1, 211)))
        assert seen["running"] == 210
        lengths = [stream["tokens"] for stream in seen["streams"]]
        assert lengths == list(range(210, 10, -1))
        request.cancel()
        await server.until(lambda: server.running == 0)


@pytest.mark.parametrize(
    ("gate", "measure", "threshold", "value"),
    [
        ({"rule": "none"}, "z", None, None),
        ({"rule": "random", "hazard": 0.0}, "z", None, None),
        ({"rule": "value-gated", "beta": 3.0, "constant": 0.5}, "z", 1.5, 0.5),
        ({"rule": "value-gated", "beta": 3.0, "constant": 0.1}, "z", 3.0 * 0.2, 0.1),
        ({"rule": "value-only", "p_star": 0.1, "constant": 0.5}, "value", 0.1, 0.5),
    ],
    ids=lambda x: str(x),
)
async def test_what_each_rule_compares(
    gate: dict[str, Any], measure: str, threshold: float | None, value: float | None
) -> None:
    async with (
        FakeServer(ENDLESS, gated=True) as server,
        gateway_for(server, gate=json.dumps(gate).encode()) as gateway,
    ):
        _, writer = await raw_request(gateway.url, COMPLETIONS, completion_body())
        server.release(5)
        [stream] = (await until(gateway, tokens=5))["streams"]
        assert (stream["measure"], stream["value"]) == (measure, value)
        assert stream["threshold"] == pytest.approx(threshold)
        writer.transport.abort()
        await server.until(lambda: server.running == 0)


class Half:
    """Every V is 0.5."""

    async def value(self, prompt_token_ids: object, token_ids: object) -> float:
        return 0.5


async def test_a_threshold_moves_with_the_critics_answer() -> None:
    gate = {"rule": "value-gated", "beta": 4.0, "epsilon": 0.1, "value": "critic"}
    script = Script([GOOD] * 5 + [BAD] + [GOOD] * 1000)  # z is 0.79, above 0.4 and below 2
    async with (
        FakeServer(script, gated=True) as server,
        gateway_for(server, gate=json.dumps(gate).encode(), critic=Half()) as gateway,
    ):
        _, writer = await raw_request(gateway.url, COMPLETIONS, completion_body())
        server.release(5)
        [before] = (await until(gateway, tokens=5))["streams"]
        assert (before["threshold"], before["value"]) == (pytest.approx(0.4), None)
        server.release(5)
        [after] = (await until(gateway, tokens=10))["streams"]
        assert (after["threshold"], after["value"], after["cut"]) == (2.0, 0.5, None)
        writer.transport.abort()
        await server.until(lambda: server.running == 0)
        seen = await until(gateway, in_flight=0)
        asked = seen["totals"]["critic_asked"]
        assert asked >= 1
        assert asked + seen["totals"]["critic_avoided"] == 10


async def test_no_text_of_a_request_or_an_answer() -> None:
    script = Script([Token("confidential", -0.1)] * 1000)
    async with FakeServer(script, gated=True) as server, gateway_for(server) as gateway:
        body = completion_body(prompt="a private question", user="somebody")
        _, writer = await raw_request(gateway.url, COMPLETIONS, body)
        server.release(5)
        await until(gateway, tokens=5)
        text = await get_text(gateway.url + "/espo/live") + await get_text(gateway.url + "/metrics")
        for secret in ("confidential", "private", "somebody"):
            assert secret not in text
        writer.transport.abort()
        await server.until(lambda: server.running == 0)


async def test_nothing_is_remembered_for_nobody() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        await post(gateway.url + COMPLETIONS, completion_body())
        assert (await snapshot(gateway))["ended"] == []
        await post(gateway.url + COMPLETIONS, completion_body())
        assert len((await snapshot(gateway))["ended"]) == 1


def test_passwords_of_servers_are_not_told() -> None:
    pool = UpstreamPool(["http://u:secret@host:1/x@y"])
    pool.servers[0].in_flight = 2
    [state] = pool.states()
    assert (state["url"], state["in_flight"]) == ("http://host:1/x@y", 2)


async def test_the_pages_headers() -> None:
    async with (
        FakeServer(FAILING) as server,
        gateway_for(server) as gateway,
        aiohttp.ClientSession() as session,
    ):
        async with session.get(gateway.url + "/espo", allow_redirects=False) as response:
            # Relative, for a proxy that has put a path before it.
            assert (response.status, response.headers["Location"]) == (302, "espo/")
        for name, kind in [("", "text/html"), ("page.js", "text/javascript")]:
            async with session.get(f"{gateway.url}/espo/{name}") as response:
                assert (response.status, response.content_type) == (200, kind)
                policy = response.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy
                assert "unsafe" not in policy
        for name in ("__init__.py", "../live.py", "%2e%2e/live.py", "nothing.js"):
            async with session.get(f"{gateway.url}/espo/{name}") as response:
                assert response.status == 404


def test_savings_are_the_mean_remaining_length() -> None:
    savings = Savings()
    assert savings.estimate(10) == 0.0
    for length in (5, 20, 40):
        savings.ended(length)
    assert savings.estimate(10) == (10 + 30) / 2
    assert savings.estimate(30) == 10.0
    assert savings.estimate(50) == 0.0


def test_savings_follow_the_traffic() -> None:
    savings = Savings()
    savings.ended(10_000)
    for _ in range(WINDOW):
        savings.ended(20)
    assert savings.estimate(10) == 10.0
