"""A user's own class as the critic: it decides, and no fault of it costs a request."""

from __future__ import annotations

import asyncio
import logging

import pytest
from prometheus_client import CollectorRegistry

from espo_gateway.critic.custom import CALLS, CustomCritic, load_critic
from espo_gateway.errors import InvalidRequest, UpstreamError
from espo_gateway.testing import FakeServer
from tests.helpers import own_critics
from tests.helpers.gateway import (
    COMPLETIONS,
    CRITIC_GATE,
    FAILING,
    completion_body,
    gateway_for,
    metric,
    post,
)


async def test_it_decides_where_to_stop_and_is_entered_and_left() -> None:
    async with FakeServer(FAILING) as server:
        async with gateway_for(
            server, gate=CRITIC_GATE, critic="tests.helpers.own_critics:Good"
        ) as gateway:
            status, answer = await post(gateway.url + COMPLETIONS, completion_body())
            assert (status, answer["choices"][0]["espo"]["cut"]) == (200, 10)
            assert await metric(gateway, "espo_gateway_critic_questions_total") >= 1
        assert own_critics.made[-1].left


@pytest.mark.parametrize("name", ["Hanging", "Raising", "NotANumber"])
async def test_one_that_fails_costs_stops_not_requests(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with (
        FakeServer(FAILING) as server,
        gateway_for(
            server,
            gate=CRITIC_GATE,
            critic=f"tests.helpers.own_critics:{name}",
            critic_timeout=0.05,
        ) as gateway,
    ):
        for _ in range(3):
            status, answer = await post(gateway.url + COMPLETIONS, completion_body())
            assert status == 200
            assert answer["choices"][0]["espo"]["cut"] is None
            assert len(answer["choices"][0]["text"]) == 16
    assert f"tests.helpers.own_critics:{name}" in caplog.text


async def test_its_calls_are_bounded() -> None:
    async with CustomCritic(own_critics.Crowded(), name="c") as critic:
        values = await asyncio.gather(*(critic.value([1], [2]) for _ in range(3 * CALLS)))
    assert set(values) == {0.5}
    assert own_critics.Crowded.most == CALLS


async def test_nobody_waits_for_one_that_hangs_and_it_is_tried_again() -> None:
    own = own_critics.Hanging()
    async with CustomCritic(own, name="c", timeout=0.02) as critic:
        with pytest.raises(UpstreamError, match=r"within 0\.02 s"):
            await critic.value([1], [2])
        trial = asyncio.create_task(critic.value([1], [2]))
        await asyncio.sleep(0)
        with pytest.raises(UpstreamError, match="at the moment"):
            await critic.value([1], [2])
        own.hangs = False
        with pytest.raises(UpstreamError):
            await trial
        assert await critic.value([1], [2]) == 0.0
        assert await asyncio.gather(*(critic.value([1], [2]) for _ in range(5))) == [0.0] * 5


async def test_a_question_taken_back_leaves_nothing_behind() -> None:
    own, registry = own_critics.Hanging(), CollectorRegistry()
    waiting = "espo_gateway_critic_questions_waiting"
    async with CustomCritic(own, name="c", registry=registry) as critic:
        for _ in range(2):  # the second time, too, every place is free
            tasks = [asyncio.create_task(critic.value([1], [2])) for _ in range(2 * CALLS)]
            await asyncio.sleep(0)
            assert (own.running, registry.get_sample_value(waiting)) == (CALLS, CALLS)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (own.running, registry.get_sample_value(waiting)) == (0, 0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:Critic", "No module named 'no_such_module'.*PYTHONPATH"),
        ("tests.helpers.own_critics:Missing", "Missing.*name a class"),
        ("tests.helpers.own_critics:Needy", "made without arguments"),
        ("tests.helpers.own_critics:Synchronous", "no method `async def value"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_the_fix(path: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"--critic {path}: .*{message}"):
        load_critic(path)


async def test_one_that_cannot_be_entered_is_a_start_up_error() -> None:
    async with FakeServer(FAILING) as server:
        with pytest.raises(InvalidRequest, match="Unopened: entering it failed: no such model"):
            async with gateway_for(
                server, gate=CRITIC_GATE, critic="tests.helpers.own_critics:Unopened"
            ):
                pass
