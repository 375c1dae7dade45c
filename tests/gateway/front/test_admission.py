"""So many generations at a time, the others in line, and then no more."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import InternalServerError, RateLimitError

from espo_gateway.errors import TooManyRequests
from espo_gateway.front.admission import Admission
from espo_gateway.front.gateway import Gateway
from espo_gateway.testing import FakeServer
from tests.helpers.cancelling import cancel_everywhere
from tests.helpers.clock import Clock
from tests.helpers.gateway import (
    COMPLETIONS,
    FAILING,
    client_of,
    completion_body,
    gateway_for,
    get_text,
    post,
    raw_request,
)


class Visitor:
    """Takes a slot and stays until told to go; a task of its own."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.may_go = asyncio.Event()
        self.served = False
        self.task = asyncio.create_task(self._visit())

    async def _visit(self) -> None:
        async with self._admission.slot():
            self.served = True
            await self.may_go.wait()

    async def go(self) -> None:
        self.may_go.set()
        await self.task

    async def vanish(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def visitors(admission: Admission, count: int) -> list[Visitor]:
    made = [Visitor(admission) for _ in range(count)]
    await settled()
    return made


async def settled() -> None:
    """Whoever can go on has done so."""
    for _ in range(4):
        await asyncio.sleep(0)


def counts(admission: Admission) -> tuple[int, int, int]:
    return admission.in_flight, admission.queued, admission.refused


async def test_first_come_first_served() -> None:
    admission = Admission(2, 3)
    made = await visitors(admission, 5)
    assert [visitor.served for visitor in made] == [True, True, False, False, False]
    assert counts(admission) == (2, 3, 0)
    for i in range(5):
        await made[i].go()
        await settled()
        assert [visitor.served for visitor in made] == [j < i + 3 for j in range(5)]
    assert counts(admission) == (0, 0, 0)


async def test_no_room_in_the_queue() -> None:
    admission = Admission(1, 1)
    made = await visitors(admission, 4)
    for visitor in made[2:]:
        with pytest.raises(TooManyRequests, match="1 requests are being served and 1 wait"):
            await visitor.task
    assert counts(admission) == (1, 1, 2)
    for visitor in made[:2]:
        await visitor.go()
    assert counts(admission) == (0, 0, 2)


async def test_whoever_leaves_the_queue_is_passed_over() -> None:
    admission = Admission(1, 3)
    made = await visitors(admission, 4)
    await made[1].vanish()
    assert counts(admission) == (1, 2, 0)
    await made[0].go()
    await settled()
    assert [visitor.served for visitor in made] == [True, False, True, False]
    for visitor in made[2:]:
        await visitor.go()
    assert counts(admission) == (0, 0, 0)


async def test_a_slot_given_to_one_who_leaves_in_that_moment_goes_to_the_next() -> None:
    admission = Admission(1, 2)
    async with admission.slot():
        second, third = await visitors(admission, 2)
    # second's turn has come, and it has not run yet.
    second.task.cancel()
    await settled()
    assert (second.served, third.served) == (False, True)
    assert counts(admission) == (1, 0, 0)
    await third.go()
    assert counts(admission) == (0, 0, 0)


async def test_both_leave_at_once() -> None:
    admission = Admission(1, 2)
    first, second, third = await visitors(admission, 3)
    second.task.cancel()
    first.may_go.set()
    await settled()
    assert (second.served, third.served) == (False, True)
    await third.go()
    assert counts(admission) == (0, 0, 0)


async def test_a_failure_within_gives_the_slot_back() -> None:
    admission = Admission(1, 0)
    with pytest.raises(ZeroDivisionError):
        async with admission.slot():
            _ = 1 / 0
    assert admission.in_flight == 0


@given(st.floats(0, 1e6), st.integers(1, 64), st.integers(0, 8))
def test_when_to_come_back(duration: float, slots: int, waiting: int) -> None:
    """The time in which those who wait are served, as long as clients will wait for that."""

    async def refused() -> int:
        clock = Clock()
        admission = Admission(slots, waiting, clock=clock)
        async with admission.slot():
            start = clock.now
            clock.now += duration
        taken = clock.now - start
        made = await visitors(admission, slots + waiting)
        with pytest.raises(TooManyRequests) as caught:
            async with admission.slot():
                pass
        for visitor in made:
            await visitor.go()
        seconds = int(caught.value.headers["Retry-After"])
        assert seconds == min(max(1, math.ceil(taken * (waiting + 1) / slots)), 60)
        return seconds

    assert 1 <= asyncio.run(refused()) <= 60


STEPS = st.lists(
    st.tuples(st.sampled_from(["come", "go", "vanish"]), st.integers(0, 9), st.booleans()),
    max_size=40,
)


@given(STEPS, st.integers(1, 3), st.integers(0, 3))
def test_whatever_happens(steps: list[tuple[str, int, bool]], slots: int, places: int) -> None:
    """As in a model that is a list: those served are the first of those who stay."""

    async def play() -> None:
        admission = Admission(slots, places)
        inside: list[Visitor] = []
        refused = 0
        for what, number, settle in steps:
            if what == "come":
                await settled()
                visitor = Visitor(admission)
                await settled()
                if len(inside) < slots + places:
                    inside.append(visitor)
                else:
                    refused += 1
                    assert isinstance(visitor.task.exception(), TooManyRequests)
            elif inside:
                visitor = inside.pop(number % len(inside))
                if what == "vanish":
                    visitor.task.cancel()
                else:
                    visitor.may_go.set()
                if not visitor.served and what == "go":
                    visitor.task.cancel()
                if settle:
                    await asyncio.sleep(0)
            assert admission.in_flight <= slots
            if settle:
                await settled()
                assert [visitor.served for visitor in inside] == [
                    i < slots for i in range(len(inside))
                ]
        await settled()
        assert counts(admission) == (
            min(len(inside), slots),
            max(0, len(inside) - slots),
            refused,
        )
        for visitor in inside:
            await visitor.vanish()
        assert counts(admission) == (0, 0, refused)

    asyncio.run(play())


async def test_a_departure_at_any_moment_leaves_nothing() -> None:
    admission = Admission(1, 1)

    async def work() -> None:
        async with admission.slot():
            await asyncio.sleep(0)

    async def crowded() -> None:
        async def leave() -> None:
            async with admission.slot():
                await asyncio.sleep(0)

        other = asyncio.create_task(leave())
        try:
            await asyncio.sleep(0)
            await work()
        finally:
            await other

    async def check() -> None:
        assert counts(admission) == (0, 0, 0)

    assert await cancel_everywhere(work, check) == 1
    assert await cancel_everywhere(crowded, check) >= 3


# -- several choices ---------------------------------------------------------------------------


async def test_choices_are_what_is_counted() -> None:
    admission = Admission(4, 2)
    async with admission.slot(3) as slots:
        assert (slots.held, admission.in_flight) == (3, 3)
        large = asyncio.create_task(hold(admission, 2))
        await settled()
        # A small one would fit, and is not let past the large one.
        small = asyncio.create_task(hold(admission, 1))
        await settled()
        assert counts(admission) == (3, 2, 0)
        async with slots.one():
            pass
        await settled()
        assert counts(admission) == (4, 1, 0)
        async with slots.one():
            pass
        await settled()
        assert counts(admission) == (4, 0, 0)
    for task in (large, small):
        task.cancel()
    await asyncio.gather(large, small, return_exceptions=True)
    assert counts(admission) == (0, 0, 0)


async def hold(admission: Admission, choices: int) -> None:
    async with admission.slot(choices):
        await asyncio.Event().wait()


async def test_a_large_one_that_leaves_the_queue_lets_a_small_one_in() -> None:
    admission = Admission(2, 2)
    async with admission.slot(1):
        large, small = (asyncio.create_task(hold(admission, count)) for count in (2, 1))
        await settled()
        assert counts(admission) == (1, 2, 0)
        large.cancel()
        await settled()
        assert counts(admission) == (2, 0, 0)
        small.cancel()
        await settled()
    assert counts(admission) == (0, 0, 0)


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 19))
def test_choices_take_turns(slots: int, choices: int, failing: int) -> None:
    """Never more at a time than there are slots, which are free again however it ends."""

    async def play() -> None:
        admission = Admission(slots, 0)
        running, most, done = 0, 0, 0

        async def one(number: int, taken: Any) -> None:
            nonlocal running, most, done
            async with taken.one():
                running += 1
                most = max(most, running)
                assert admission.in_flight >= running
                await asyncio.sleep(0)
                running -= 1
                done += 1
                if number == failing:
                    raise ZeroDivisionError

        try:
            async with admission.slot(choices) as taken, asyncio.TaskGroup() as group:
                for number in range(choices):
                    group.create_task(one(number, taken))
        except* ZeroDivisionError:
            assert failing < choices
        else:
            assert done == choices
            assert failing >= choices
        assert most <= slots
        assert most == min(slots, choices) or failing < choices
        assert counts(admission) == (0, 0, 0)

    asyncio.run(play())


# -- in the gateway ----------------------------------------------------------------------------


@asynccontextmanager
async def crowded(**settings: Any) -> AsyncIterator[tuple[FakeServer, Gateway]]:
    async with (
        FakeServer(FAILING, gated=True) as server,
        gateway_for(server, **settings) as gateway,
    ):
        yield server, gateway


async def queued(gateway: Gateway, count: int) -> None:
    while gateway.admission.queued != count:  # noqa: ASYNC110 (the product has no event for it)
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"espo": {"mode": "off"}}, {"n": 2}])
async def test_the_gateway_queues_and_refuses(fields: dict[str, Any]) -> None:
    async with (
        crowded(max_in_flight=fields.get("n", 1), max_queue=1) as (server, gateway),
        client_of(gateway.url) as client,
    ):
        create: Any = client.completions.create

        async def whole(**more: Any) -> None:
            extra = {"extra_body": {"espo": fields["espo"]}} if "espo" in fields else {}
            plain = {name: value for name, value in fields.items() if name != "espo"}
            answer = await create(**completion_body(**plain, **more), **extra)
            if fields.get("stream"):
                assert [chunk async for chunk in answer]

        first = asyncio.create_task(whole())
        await server.until(lambda: server.running == fields.get("n", 1))
        second = asyncio.create_task(whole(user="second"))
        await queued(gateway, 1)
        assert len(gateway.sessions) == (0 if "espo" in fields else fields.get("n", 1))
        with pytest.raises(RateLimitError) as caught:
            await whole(user="third")
        assert caught.value.response.headers["Retry-After"] == "1"
        assert caught.value.type == "too_many_requests"
        # What generates nothing does not wait, and a bad request is told at once.
        assert "fake" in await get_text(gateway.url + "/v1/models")
        status, _ = await post(gateway.url + COMPLETIONS, completion_body(n=0))
        assert status == 400
        server.release(1000)
        await asyncio.gather(first, second)
        assert server.bodies[-1]["user"] == "second"
        assert counts(gateway.admission) == (0, 0, 1)


async def test_a_client_that_leaves_the_queue_never_reaches_a_server() -> None:
    async with crowded(max_in_flight=1) as (server, gateway):
        first = asyncio.create_task(post(gateway.url + COMPLETIONS, completion_body()))
        await server.until(lambda: server.running == 1)
        _, writer = await raw_request(gateway.url, COMPLETIONS, completion_body())
        await queued(gateway, 1)
        writer.transport.abort()
        await queued(gateway, 0)
        server.release(16)
        assert (await first)[0] == 200
        assert len(server.bodies) == 1
        assert counts(gateway.admission) == (0, 0, 0)


async def test_a_gateway_that_drains_serves_those_it_has_taken() -> None:
    async with (
        crowded(max_in_flight=1) as (server, gateway),
        client_of(gateway.url) as client,
    ):
        url = gateway.url + COMPLETIONS
        taken = [asyncio.create_task(post(url, completion_body()))]
        await server.until(lambda: server.running == 1)
        taken.append(asyncio.create_task(post(url, completion_body())))
        await queued(gateway, 1)
        gateway.drain()
        with pytest.raises(InternalServerError) as caught:
            await client.completions.create(**completion_body())
        assert caught.value.status_code == 503
        headers = caught.value.response.headers
        assert (headers["Connection"], headers["Retry-After"]) == ("close", "1")
        server.release(32)
        assert [status for status, _ in await asyncio.gather(*taken)] == [200, 200]


class Counting(FakeServer):
    """Knows how many generations there were at once."""

    most = 0

    async def _count(self, **changes: int) -> None:
        await super()._count(**changes)
        self.most = max(self.most, self.running)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("slots", [1, 3, 50])
async def test_choices_of_one_request_take_turns(stream: bool, slots: int) -> None:
    async with (
        Counting(FAILING) as server,
        gateway_for(server, max_in_flight=slots, max_queue=0) as gateway,
        client_of(gateway.url) as client,
    ):
        create: Any = client.completions.create
        answer = await create(**completion_body(n=20, stream=stream))
        if stream:
            chunks = [chunk async for chunk in answer]
            assert {choice.index for chunk in chunks for choice in chunk.choices} == set(range(20))
        else:
            assert [choice.index for choice in answer.choices] == list(range(20))
        assert len(server.bodies) == 20
        assert server.most <= min(slots, 20)
        assert counts(gateway.admission) == (0, 0, 0)


@pytest.mark.parametrize(
    ("fields", "choices"),
    [
        ({"n": 5}, 5),
        ({"n": 1000}, 1000),
        ({"prompt": ["a"] * 5}, 5),
        ({"prompt": [[1]] * 3, "n": 2}, 6),
    ],
)
async def test_a_request_for_too_many_choices_names_the_bound(
    fields: dict[str, Any], choices: int
) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server, max_choices=4) as gateway:
        status, answer = await post(gateway.url + COMPLETIONS, completion_body(**fields))
        assert (status, answer["error"]["param"]) == (400, "n")
        assert f"is {choices}, and this gateway takes 4 at most" in answer["error"]["message"]
        assert "max_choices" in answer["error"]["message"]
        assert server.bodies == []
        status, _ = await post(gateway.url + COMPLETIONS, completion_body(n=4))
        assert (status, len(server.bodies)) == (200, 4)


@pytest.mark.parametrize(
    ("fields", "taken"), [({"n": 3}, 3), ({"prompt": ["a", "b"], "n": 2}, 4), ({"n": "x"}, 1)]
)
async def test_what_is_not_monitored_counts_its_choices_too(
    fields: dict[str, Any], taken: int
) -> None:
    async with crowded() as (server, gateway):
        body = completion_body(espo={"mode": "off"}, **fields)
        asked = asyncio.create_task(post(gateway.url + COMPLETIONS, body))
        await server.until(lambda: server.running == 1)
        assert gateway.admission.in_flight == taken
        server.release(100)
        await asked
        assert gateway.admission.in_flight == 0
