"""A critic server behind the gateway: questions share requests; no fault of it costs a token."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from espo_gateway.critic import server as critic_module
from espo_gateway.critic.server import CONCURRENCY, CriticServer
from espo_gateway.errors import UpstreamError
from espo_gateway.testing.critic import FakeCritic
from tests.helpers.critics import FAULTS, total
from tests.helpers.gateway import (
    until_running,
)


@asynccontextmanager
async def asking(
    critic: FakeCritic, **settings: Any
) -> AsyncIterator[tuple[CriticServer, Callable[[str, str], float]]]:
    """A CriticServer, and its metrics by name and outcome."""
    registry = CollectorRegistry()

    def counted(name: str, outcome: str) -> float:
        name = f"espo_gateway_critic_{name}_total"
        return registry.get_sample_value(name, {"outcome": outcome}) or 0.0

    async with CriticServer(critic.url, registry=registry, **settings) as server:
        yield server, counted


def ask(server: CriticServer, *prefixes: list[int]) -> list[asyncio.Task[float]]:
    return [asyncio.create_task(server.value(prefix[:1], prefix[1:])) for prefix in prefixes]


# -- batches -----------------------------------------------------------------------------------


async def test_questions_of_one_moment_share_a_request() -> None:
    async with FakeCritic(total) as critic, asking(critic) as (server, counted):
        prefixes = [[n] * (n % 7 + 1) for n in range(1, 101)]
        values = await asyncio.gather(*ask(server, *prefixes))
        assert values == [total(prefix) for prefix in prefixes]
        assert [len(request) for request in critic.requests] == [100]
        assert counted("questions", "answered") == 100
        assert counted("requests", "answered") == 1


async def test_what_is_asked_while_requests_are_under_way_goes_into_the_next() -> None:
    async with FakeCritic(total, gated=True) as critic, asking(critic) as (server, _):
        tasks = []
        for under_way in range(1, CONCURRENCY + 1):
            tasks += ask(server, [under_way])
            await until_running(critic, under_way)
        for n in range(50):  # one by one, each in a turn of the event loop of its own
            tasks += ask(server, [n])
            await asyncio.sleep(0)
        critic.release()
        await critic.until(lambda: critic.questions == CONCURRENCY + 50)
        assert [len(request) for request in critic.requests] == [1] * CONCURRENCY + [50]
        critic.release(CONCURRENCY)
        await asyncio.gather(*tasks)
        assert critic.most == CONCURRENCY


async def test_a_request_is_bounded_in_questions_and_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(critic_module, "BATCH_QUESTIONS", 8)
    monkeypatch.setattr(critic_module, "BATCH_TOKENS", 20)
    async with FakeCritic(total) as critic, asking(critic) as (server, _):
        prefixes = [*([[n] for n in range(20)]), [1] * 15, [2] * 15, [3] * 50, [4]]
        values = await asyncio.gather(*ask(server, *prefixes))
    assert values == [total(prefix) for prefix in prefixes]
    sizes = [[len(prefix) for prefix in request] for request in critic.requests]
    assert sizes == [[1] * 8, [1] * 8, [1] * 4 + [15], [15], [50], [1]]
    assert critic.most <= CONCURRENCY


async def test_a_question_taken_back_is_not_sent() -> None:
    async with FakeCritic(total, gated=True) as critic, asking(critic) as (server, counted):
        first = []
        for n in range(CONCURRENCY):
            first += ask(server, [n])
            await until_running(critic, n + 1)
        waiting = ask(server, [7], [8])
        await asyncio.sleep(0)
        waiting[0].cancel()
        first[0].cancel()  # of one that was sent the answer is of no use to anyone
        critic.release(3)
        assert await waiting[1] == 8.0
        assert critic.requests[-1] == [[8]]
        assert counted("questions", "dropped") == 2


# -- faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_means_no_value_until_it_is_over(fault: Any) -> None:
    async with (
        FakeCritic(total, fault=fault) as critic,
        asking(critic, timeout=0.2) as (server, counted),
    ):
        with pytest.raises(UpstreamError, match=FAULTS[fault]):
            await server.value([1], [2])
        critic.fault = None
        assert await server.value([1], [2]) == 3.0
        assert (counted("questions", "failed"), counted("requests", "failed")) == (1, 1)


async def test_nobody_waits_for_a_server_that_hangs() -> None:
    async with FakeCritic(total, fault="hang") as critic, asking(critic) as (server, _):
        server.timeout = 0.2
        with pytest.raises(UpstreamError, match="no values within"):
            await server.value([1], [])
        await critic.until(lambda: critic.running == 0)
        server.timeout = 60.0
        [trial] = ask(server, [1])
        await critic.until(lambda: critic.running == 1)
        for _ in range(5):  # while one request tries it, the others go on without a value
            with pytest.raises(UpstreamError, match="no values at the moment"):
                await server.value([2], [])
        assert not trial.done()
        assert critic.most == 1


async def test_all_that_waits_when_a_request_fails_gets_no_value() -> None:
    async with (
        FakeCritic(total, fault="error", gated=True) as critic,
        asking(critic) as (server, counted),
    ):
        tasks = []
        for n in range(CONCURRENCY):
            tasks += ask(server, [n])
            await until_running(critic, n + 1)
        tasks += ask(server, *[[n] for n in range(20)])
        critic.release(1)
        for task in tasks[CONCURRENCY:]:
            with pytest.raises(UpstreamError):
                await task
        critic.release(CONCURRENCY)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert counted("questions", "failed") == len(tasks)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
async def test_a_value_that_is_no_number_is_the_trouble_of_its_question(bad: float) -> None:
    # Infinities are not JSON, so a server that sends them has the whole answer refused.
    worst = math.nan if math.isnan(bad) else math.copysign(1e300 * 1e300, bad)
    async with (
        FakeCritic(lambda prefix: worst if prefix == [7] else 1.0) as critic,
        asking(critic) as (server, _),
    ):
        results = await asyncio.gather(*ask(server, [6], [7], [8]), return_exceptions=True)
    assert isinstance(results[1], UpstreamError)
    if math.isnan(bad):
        assert [results[0], results[2]] == [1.0, 1.0]


async def test_a_prefix_that_is_too_long_spares_the_others() -> None:
    async with FakeCritic(total, max_model_len=3) as critic, asking(critic) as (server, _):
        results = await asyncio.gather(
            *ask(server, [1], [1, 1, 1], [1, 1, 1, 1]), return_exceptions=True
        )
        assert results[:2] == [1.0, 3.0]
        assert "longer than its --max-model-len of 3" in str(results[2])
        with pytest.raises(UpstreamError, match="longer than"):
            await server.value([1, 1], [1, 1])
        assert len(critic.requests) == 1


async def test_a_server_that_dies_half_way_and_comes_back() -> None:
    async with FakeCritic(total, gated=True) as critic, asking(critic) as (server, _):
        tasks = ask(server, [1], [2])
        await critic.until(lambda: critic.running == 1)
        await critic.stop()
        for task in tasks:
            with pytest.raises(UpstreamError):
                await task
        with pytest.raises(UpstreamError):
            await server.value([1], [2])
        port = int(critic.url.rsplit(":", 1)[1])
        async with FakeCritic(total, port=port, max_model_len=2) as other:
            assert await server.value([1], [2]) == 3.0
            # What it is, it is asked anew.
            with pytest.raises(UpstreamError, match="longer than"):
                await server.value([1], [2, 3])
            assert other.questions == 1


async def test_the_log_hears_of_faults_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeCritic(total, fault="error") as critic, asking(critic) as (server, _):
        for _ in range(20):
            with pytest.raises(UpstreamError):
                await server.value([1], [])
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 1
    assert "HTTP 500" in lines[0]
