"""The pool of servers: health, breaker, retries, timeouts; nothing of a request stays behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from espo_gateway.errors import UpstreamError, UpstreamTimeout, UpstreamUnavailable
from espo_gateway.testing import FakeServer, Script
from espo_gateway.upstream.connection import Limits
from espo_gateway.upstream.pool import UpstreamPool
from tests.helpers.cancelling import cancel_everywhere
from tests.helpers.clock import Clock
from tests.helpers.gateway import (
    COMPLETIONS,
    FAILING,
    GOOD,
    completion_body,
    gateway_for,
    metric,
    post,
)
from tests.helpers.wire import WireServer

HEADERS = {"Content-Type": "application/json"}
BODY = b'{"model": "fake", "prompt": "p", "max_tokens": 16, "stream": true}'
WHOLE = BODY.replace(b"true", b"false")


class Server(FakeServer):
    """Also fails health checks, and says when to come back."""

    def __init__(self, script: Any = FAILING, **options: Any) -> None:
        super().__init__(script, **options)
        self.ill = False
        self.checks = 0
        self.retry_after: str | None = None

    async def _health(self, request: web.Request) -> web.Response:
        await self._count(checks=1)
        return web.Response(status=503 if self.ill else 200)

    async def _play(self, *arguments: Any) -> web.StreamResponse:
        response = await super()._play(*arguments)
        if response.status != 200 and self.retry_after is not None:
            response.headers["Retry-After"] = self.retry_after
        return response

    async def checked(self) -> None:
        """Wait until a check that begins now has been taken notice of."""
        # A server's checks follow one another, so the second to come says the first is over.
        checks = self.checks + 2
        await self.until(lambda: self.checks >= checks)


@asynccontextmanager
async def pool_of(*servers: FakeServer, **settings: Any) -> AsyncIterator[UpstreamPool]:
    async with UpstreamPool([server.url for server in servers], **settings) as pool:
        yield pool
        assert [server.in_flight for server in pool.servers] == [0] * len(servers)


async def ask(pool: UpstreamPool, data: bytes = BODY, **options: Any) -> int:
    """The status of a whole answer."""
    async with pool.open("POST", COMPLETIONS, headers=HEADERS, data=data, **options) as response:
        await response.body()
        return response.status


async def eventually(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 (the product has no event for it)
        await asyncio.sleep(0.002)


# -- health checks -----------------------------------------------------------------------------


async def test_a_server_that_fails_its_check_gets_nothing_until_it_passes_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Server() as ill, Server() as well, pool_of(ill, well, health_interval=0.01) as pool:
        caplog.set_level("INFO", "espo_gateway")
        ill.ill = True
        await ill.checked()
        assert [server.healthy for server in pool.servers] == [False, True]
        for _ in range(3):
            assert await ask(pool) == 200
        assert (len(ill.bodies), len(well.bodies)) == (0, 3)
        ill.ill = False
        await ill.checked()
        assert await ask(pool) == 200
        assert (len(ill.bodies), len(well.bodies)) == (1, 3)
        said = [record.message for record in caplog.records if "health" in record.message]
    # Once for each change, however many checks there were.
    assert [message.split(" health")[0] for message in said] == [
        f"{ill.url} fails its",
        f"{ill.url} passes its",
    ]


async def test_a_server_that_died_is_noticed_and_taken_back_on_the_same_port() -> None:
    async with (
        Server() as dead,
        Server() as well,
        pool_of(dead, well, health_interval=0.01) as pool,
    ):
        await dead.stop()
        await eventually(lambda: not pool.servers[0].healthy)
        assert await ask(pool) == 200
        assert pool.servers[0].requests == 0
        async with Server(port=int(dead.url.rsplit(":", 1)[1])) as back:
            await back.checked()
            assert await ask(pool) == 200
            assert len(back.bodies) == 1


async def test_a_server_whose_check_hangs_does_not_hold_up_the_others() -> None:
    class Hanging(Server):
        async def _health(self, request: web.Request) -> web.Response:
            await self._count(checks=1)
            await asyncio.Event().wait()
            raise AssertionError

    async with Hanging() as one, Server() as two, pool_of(one, two, health_interval=0.01):
        await two.checked()
        assert one.checks == 1


@pytest.mark.parametrize("interval", [0.0, 60.0])
async def test_no_task_outlives_the_pool(interval: float) -> None:
    async with Server() as server:
        before = len(asyncio.all_tasks())
        async with pool_of(server, health_interval=interval) as pool:
            if interval:
                await server.until(lambda: server.checks == 1)
            assert await ask(pool) == 200
        await server.until(lambda: server.running == 0)
        await eventually(lambda: len(asyncio.all_tasks()) <= before)
        assert server.checks == bool(interval)


# -- the breaker -------------------------------------------------------------------------------


async def test_a_failing_server_is_left_alone_then_tried_by_one_request() -> None:
    clock = Clock()
    settings = {"attempts": 1, "breaker_failures": 3, "breaker_timeout": 10.0, "clock": clock}
    async with Server(gated=True) as bad, Server() as good, pool_of(bad, good, **settings) as pool:
        first = pool.servers[0]
        bad.script = Script([], status=503)
        for _ in range(3):  # with nothing else to do the first server is the least loaded
            assert await ask(pool) == 503
        assert (first.breaker.state, first.failures) == ("open", 3)
        assert await ask(pool) == 200
        assert (len(bad.bodies), len(good.bodies)) == (3, 1)
        clock.now += 10
        assert first.breaker.state == "half-open"
        assert await ask(pool) == 503
        assert first.breaker.state == "open"
        clock.now += 10
        bad.script = Script([GOOD] * 2)
        trial = asyncio.create_task(ask(pool, WHOLE))  # no headers before its end
        await bad.until(lambda: bad.running == 1)
        assert await ask(pool) == 200
        assert (len(bad.bodies), len(good.bodies)) == (5, 2)
        bad.release(2)
        assert await trial == 200
        assert first.breaker.state == "closed"
        assert await asyncio.wait_for(_released(bad, pool), 10) == 200
        assert len(bad.bodies) == 6


async def _released(server: Server, pool: UpstreamPool) -> int:
    server.release(2)
    return await ask(pool)


async def test_a_health_check_lets_the_trial_come() -> None:
    settings = {"attempts": 1, "breaker_failures": 1, "breaker_timeout": 1e6, "clock": Clock()}
    async with Server() as server, pool_of(server, health_interval=0.01, **settings) as pool:
        server.queue.append(Script([], status=500))
        server.ill = True
        await server.checked()
        assert await ask(pool) == 500
        breaker = pool.servers[0].breaker
        assert breaker.state == "open"
        server.ill = False
        await server.checked()
        assert breaker.state == "half-open"
        assert await ask(pool) == 200
        assert breaker.state == "closed"


@pytest.mark.parametrize("status", [400, 404, 422, 429])
async def test_what_is_no_fault_of_the_server_neither_opens_nor_closes(status: int) -> None:
    clock = Clock()
    settings = {"attempts": 1, "breaker_failures": 2, "clock": clock}
    async with Server(Script([], status=status)) as server, pool_of(server, **settings) as pool:
        for _ in range(4):
            assert await ask(pool) == status
        upstream = pool.servers[0]
        assert (upstream.breaker.state, upstream.failures, upstream.requests) == ("closed", 0, 4)
        for _ in range(2):
            upstream.start(again=False).failed()
        clock.now += 10
        for _ in range(2):
            assert await ask(pool) == status
            assert (upstream.breaker.state, upstream.breaker.ready) == ("half-open", True)
        upstream.in_flight = 0


async def test_the_list_of_models_does_not_show_that_a_server_works() -> None:
    settings = {"attempts": 1, "breaker_failures": 2}
    async with Server(Script([], status=500)) as server, pool_of(server, **settings) as pool:
        for _ in range(2):
            assert await ask(pool) == 500
            async with pool.open("GET", "/v1/models", headers={}) as response:
                assert response.status == 200
        assert pool.servers[0].breaker.state == "open"


@pytest.mark.parametrize("fault", ["reset", "stall"])
async def test_a_server_that_breaks_off_counts_as_failing(fault: Any) -> None:
    """Though its headers were good; so one that hangs is found out."""
    script = Script([GOOD] * 4, fault=fault, after=2)
    settings = {"limits": Limits(idle=0.02), "breaker_failures": 2}
    async with Server(script) as server, pool_of(server, **settings) as pool:
        for _ in range(2):
            with pytest.raises(UpstreamTimeout if fault == "stall" else UpstreamUnavailable):
                await ask(pool)
        assert (pool.servers[0].breaker.state, pool.servers[0].failures) == ("open", 2)


@pytest.mark.parametrize(
    "script", [Script([], status=503), Script([GOOD] * 4, fault="error", after=2)]
)
async def test_a_failure_counts_once_at_the_head_of_an_answer_or_within(script: Script) -> None:
    async with FakeServer(script) as server, gateway_for(server, attempts=1) as gateway:
        status, _ = await post(gateway.url + COMPLETIONS, completion_body())
        assert status in (500, 503)
        assert [upstream.failures for upstream in gateway.pool.servers] == [1]


async def test_a_malformed_answer_may_be_the_requests_fault() -> None:
    script = Script([GOOD] * 4, fault="garbage", after=2)
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        status, _ = await post(gateway.url + COMPLETIONS, completion_body())
        assert status == 502
        assert [upstream.failures for upstream in gateway.pool.servers] == [0]


async def test_a_client_that_leaves_is_no_failure() -> None:
    async with Server(gated=True) as server, pool_of(server, breaker_failures=1) as pool:
        for data in (BODY, WHOLE):
            request = asyncio.create_task(ask(pool, data))
            await server.until(lambda: server.running == 1)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            await server.until(lambda: server.running == 0)
        assert (pool.servers[0].failures, pool.servers[0].breaker.state) == (0, "closed")
        assert server.aborted == 2


# -- all down ----------------------------------------------------------------------------------


async def test_when_all_seem_down_one_is_asked_all_the_same() -> None:
    """A server that was restarted a moment ago serves at once, whatever is held against it."""
    settings = {"breaker_failures": 1, "breaker_timeout": 1e6, "clock": Clock()}
    async with Server() as one, Server() as two, pool_of(one, two, **settings) as pool:
        await one.stop()
        await two.stop()
        with pytest.raises(UpstreamUnavailable) as caught:
            await ask(pool)
        assert caught.value.headers == {"Retry-After": "1000000"}
        assert [server.breaker.state for server in pool.servers] == ["open", "open"]
        async with Server(port=int(two.url.rsplit(":", 1)[1])) as back:
            assert await ask(pool) == 200
            assert len(back.bodies) == 1
            assert [server.breaker.state for server in pool.servers] == ["open", "closed"]


async def test_a_client_is_told_when_to_come_back_when_all_are_down() -> None:
    async with Server() as server, gateway_for(server, health_interval=7.5) as gateway:
        await server.stop()
        async with (
            aiohttp.ClientSession() as session,
            session.post(gateway.url + COMPLETIONS, json=completion_body()) as response,
        ):
            assert (response.status, response.headers["Retry-After"]) == (503, "8")
            assert (await response.json())["error"]["type"] == "upstream_unavailable"


# -- retries -----------------------------------------------------------------------------------


async def test_each_try_goes_to_a_server_that_had_none_and_is_counted() -> None:
    bad = Script([], status=503)
    async with (
        Server(bad) as one,
        Server(bad) as two,
        Server() as three,
        pool_of(one, two, three) as pool,
    ):
        assert await ask(pool) == 200
        assert [server.requests for server in pool.servers] == [1, 1, 1]
        assert [server.retries for server in pool.servers] == [0, 1, 1]
        assert [server.failures for server in pool.servers] == [1, 1, 0]


async def test_an_overloaded_server_is_left_for_another_however_long_it_asks_to_wait() -> None:
    async with Server(Script([], status=429)) as full, Server() as free:
        full.retry_after = "3600"
        async with pool_of(full, free) as pool:
            assert await ask(pool) == 200
            assert (len(full.bodies), len(free.bodies)) == (1, 1)
            assert pool.servers[0].failures == 0


@pytest.mark.parametrize("retry_after", ["3600", "inf", "Fri, 31 Dec 9999 23:59:59 GMT"])
async def test_a_wait_that_is_too_long_is_the_clients(retry_after: str) -> None:
    async with Server(Script([], status=429)) as server, pool_of(server) as pool:
        server.retry_after = retry_after
        async with pool.open("POST", COMPLETIONS, headers=HEADERS, data=BODY) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, retry_after)
        assert len(server.bodies) == 1


PAST = ["Fri, 31 Dec 1999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 -0000", "-1"]


@pytest.mark.parametrize("retry_after", ["0.1", "soon", "nan", *PAST])
async def test_a_short_wait_is_waited_for(retry_after: str) -> None:
    async with Server() as server, pool_of(server) as pool:
        server.queue.append(Script([], status=429))
        server.retry_after = retry_after
        started = asyncio.get_running_loop().time()
        assert await ask(pool) == 200
        if retry_after == "0.1":
            assert asyncio.get_running_loop().time() - started >= 0.1
        assert (pool.servers[0].requests, pool.servers[0].retries) == (2, 1)


# -- timeouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [BODY, WHOLE], ids=["headers come", "no headers"])
async def test_an_answer_must_begin_in_time(data: bytes) -> None:
    """Also when headers come at once and tokens never; the idle timeout is not meant yet."""
    limits = Limits(first=0.1, idle=0.01)
    async with Server(gated=True) as server, pool_of(server, limits=limits) as pool:
        started = asyncio.get_running_loop().time()
        with pytest.raises(UpstreamTimeout):
            await ask(pool, data)
        assert asyncio.get_running_loop().time() - started >= 0.1
        await server.until(lambda: server.aborted == 1)
        assert (len(server.bodies), pool.servers[0].failures) == (1, 1)


@pytest.mark.parametrize(
    "fields", [{}, {"stream": True}, {"n": 2}, {"stream": True, "espo": {"mode": "off"}}]
)
async def test_a_generation_that_does_not_begin_is_an_error(fields: dict[str, Any]) -> None:
    async with (
        FakeServer(FAILING, gated=True) as server,
        gateway_for(server, first_token_timeout=0.02) as gateway,
    ):
        status, answer = await post(gateway.url + COMPLETIONS, completion_body(**fields))
        assert (status, answer["error"]["type"]) == (504, "upstream_timeout")
        await server.until(lambda: server.running == 0)


class Responding(FakeServer):
    def _add_routes(self, app: web.Application) -> None:
        super()._add_routes(app)
        app.router.add_post("/v1/responses", self._generate)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"espo": {"mode": "off"}}),
        (COMPLETIONS, {"use_beam_search": True}),
        ("/v1/responses", {}),
    ],
)
async def test_an_answer_that_is_not_streamed_begins_when_all_of_it_is_there(
    path: str, fields: dict[str, Any]
) -> None:
    async with (
        Responding(FAILING, gated=True) as server,
        gateway_for(server, first_token_timeout=0.02) as gateway,
    ):
        whole = asyncio.create_task(post(gateway.url + path, completion_body(**fields)))
        await server.until(lambda: server.running == 1)
        # One that may not take as long, begun later, has been given up.
        status, _ = await post(gateway.url + COMPLETIONS, completion_body())
        assert status == 504
        server.release(100)
        status, answer = await whole
        assert (status, answer["choices"][0]["text"]) == (200, "aaaaaabbbbbbbbbb")


async def test_an_unmonitored_stream_that_stalls_ends_in_words() -> None:
    script = Script([GOOD] * 4, fault="stall", after=1)
    body = completion_body(stream=True, use_beam_search=True)
    async with (
        FakeServer(script) as server,
        gateway_for(server, idle_timeout=0.02) as gateway,
        aiohttp.ClientSession() as session,
        session.post(gateway.url + COMPLETIONS, json=body) as response,
    ):
        *_, told, done, end = (await response.text()).split("\n\n")
        assert json.loads(told.removeprefix("data: "))["error"]["type"] == "upstream_timeout"
        assert (done, end) == ("data: [DONE]", "")


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 2}])
async def test_a_generation_that_stalls_is_ended(fields: dict[str, Any]) -> None:
    script = Script([GOOD] * 4, fault="stall", after=1)
    async with FakeServer(script) as server, gateway_for(server, idle_timeout=0.02) as gateway:
        async with (
            aiohttp.ClientSession() as session,
            session.post(gateway.url + COMPLETIONS, json=completion_body(**fields)) as response,
        ):
            assert "upstream_timeout" in await response.text()
        await server.until(lambda: server.aborted == fields.get("n", 1))
        while await metric(gateway, "espo_gateway_requests_in_flight"):
            pass
        assert gateway.pool.servers[0].failures >= 1


# -- a client that leaves, at any moment -------------------------------------------------------


@pytest.mark.parametrize("half_open", [False, True])
async def test_a_departure_at_any_moment_leaves_nothing(half_open: bool) -> None:
    """Connecting, waiting for headers, between two tries, while it reads."""
    clock = Clock()
    settings = {"breaker_failures": 1 if half_open else 100, "clock": clock}
    async with Server() as server, pool_of(server, **settings) as pool:
        upstream = pool.servers[0]

        async def work() -> None:
            server.queue.clear()
            server.queue.append(Script([], status=503))
            if half_open:
                clock.now += 10  # of the failure before this one
            assert await ask(pool) == 200

        async def check() -> None:
            assert upstream.in_flight == 0
            clock.now += 10
            assert upstream.breaker.ready
            await server.until(lambda: server.running == 0)

        points = await cancel_everywhere(work, check)
        assert points > 5
        assert server.aborted > 0
        assert upstream.retries > 0


# -- affinity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["session", "prefix"])
async def test_what_is_passed_through_goes_where_its_session_is(kind: Any) -> None:
    async with (
        WireServer(b"{}", headers={"Content-Type": "application/json"}) as one,
        WireServer(b"{}", headers={"Content-Type": "application/json"}) as two,
        gateway_for(one, two, affinity=kind) as gateway,
    ):
        for i in range(16):
            for path in ("embeddings", "responses", "responses", "tokenize"):
                body = {"input": f"session {i}", "user": str(i)}
                assert (await post(f"{gateway.url}/v1/{path}", body))[0] == 200
            assert len(one.bodies) % 4 == len(two.bodies) % 4 == 0
        assert one.bodies
        assert two.bodies


@pytest.mark.parametrize("fields", [{}, {"espo": {"mode": "off"}}, {"n": 2}])
async def test_a_session_stays_on_one_server_and_moves_when_that_is_gone(
    fields: dict[str, Any],
) -> None:
    async with (
        Server() as one,
        Server() as two,
        gateway_for(one, two, affinity="session", breaker_failures=1) as gateway,
    ):
        url = gateway.url + COMPLETIONS

        def counts() -> list[int]:
            return [len(server.bodies) for server in (one, two)]

        users = [f"user-{i}" for i in range(16)]
        homes = {}
        for user in users:
            before = counts()
            for _ in range(3):
                status, _ = await post(url, completion_body(user=user, **fields))
                assert status == 200
            grown = [after - b for after, b in zip(counts(), before, strict=True)]
            assert sorted(grown) == [0, 3 * fields.get("n", 1)]
            homes[user] = grown.index(max(grown))
        assert set(homes.values()) == {0, 1}
        await one.stop()
        for user in users:
            status, _ = await post(url, completion_body(user=user, **fields))
            assert status == 200


async def test_requests_of_one_prefix_share_a_server_as_far_as_its_load_allows() -> None:
    async with Server(gated=True) as one, Server(gated=True) as two, pool_of(one, two) as pool:
        key = b"prefix"
        requests = [asyncio.create_task(ask(pool, key=key)) for _ in range(20)]
        await eventually(lambda: one.running + two.running == 20)
        assert 1 < abs(one.running - two.running) < 20
        for request in requests:
            request.cancel()
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError | UpstreamError) for r in results)
