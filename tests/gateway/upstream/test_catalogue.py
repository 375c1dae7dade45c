"""Which server a model is asked of, and what clients see of several servers' models."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from weakref import ref

import aiohttp
import pytest
from aiohttp import web

from espo_gateway.config import Config
from espo_gateway.front.auth import read_keys
from espo_gateway.front.gateway import Gateway
from espo_gateway.startup import check_servers
from espo_gateway.testing import FakeServer
from espo_gateway.upstream.breaker import Breaker
from espo_gateway.upstream.catalogue import Catalogue, Models
from espo_gateway.upstream.server import Upstream
from tests.helpers.clock import Clock
from tests.helpers.gateway import (
    CHAT,
    COMPLETIONS,
    FAILING,
    chat_body,
    completion_body,
    gateway_for,
    post,
)

# -- the catalogue -----------------------------------------------------------------------------


class World:
    """Servers a, b, ... with these models each, None for one that does not say."""

    def __init__(self, *models: str | None) -> None:
        self.clock = Clock()
        self.servers = [Upstream(f"http://{n}", Breaker(5, 1.0, self.clock)) for n in "abcd"]
        self.servers = self.servers[: len(models)]
        self.models = dict(zip(self.servers, models, strict=True))
        self.hanging: set[Upstream] = set()
        self.asked: list[str] = []
        self.tasks: list[ref[asyncio.Task[object]]] = []
        self.catalogue = Catalogue(self.servers, self._ask, self.clock)

    async def _ask(self, server: Upstream, headers: Mapping[str, str]) -> Models | None:
        self.asked.append(server.url[-1])
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(ref(task))
        if server in self.hanging:
            await asyncio.Event().wait()
        models = self.models[server]
        return None if models is None else [{"id": model} for model in models.split()]

    async def serving(self, model: object) -> str:
        return "".join(s.url[-1] for s in await self.catalogue.serving(model, {}))


@pytest.mark.parametrize(
    ("models", "wanted", "served"),
    [
        (["x", "y"], "x", "a"),
        (["x", "y"], "y", "b"),
        (["x y", "y"], "y", "ab"),
        (["x", "x", "y"], "x", "ab"),
        # Nobody has it: the server refuses it in its own words.
        (["x", "y"], "z", "ab"),
        # One that does not say may have it.
        (["x", None], "z", "b"),
        (["x", None], "x", "a"),
        ([None, None], "x", "ab"),
        (["", "x"], "x", "b"),
        # Asked for none, or for what is none.
        (["x", "y"], None, "ab"),
        (["x", "y"], 5, "ab"),
        (["x", "y"], "", "ab"),
    ],
)
async def test_who_has_a_model(models: list[str | None], wanted: object, served: str) -> None:
    assert await World(*models).serving(wanted) == served


async def test_nobody_is_asked_where_there_is_one_server() -> None:
    world = World("x")
    assert await world.serving("y") == "a"
    assert world.asked == []


async def test_a_model_that_was_loaded_since_is_found() -> None:
    world = World("x", "y")
    assert await world.serving("z") == "ab"
    world.models[world.servers[1]] = "y z"
    # Not for every request: any client can ask for what does not exist.
    assert (await world.serving("z"), len(world.asked)) == ("ab", 2)
    world.clock.now += 1.0
    assert (await world.serving("z"), len(world.asked)) == ("b", 4)
    assert (await world.serving("z"), len(world.asked)) == ("b", 4)


async def test_a_server_that_comes_up_later_gets_its_share() -> None:
    world = World("x", None)
    assert await world.serving("x") == "a"
    world.models[world.servers[1]] = "x"
    world.clock.now += 1.0
    assert await world.serving("x") == "a"  # not waited for
    for _ in range(3):
        await asyncio.sleep(0)
    assert await world.serving("x") == "ab"


async def test_one_that_hangs_holds_up_only_what_nobody_else_has() -> None:
    world = World("x", "y")
    world.hanging.add(world.servers[0])
    assert await world.serving("y") == "b"
    waiting = [asyncio.create_task(world.serving("z")) for _ in range(2)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    world.catalogue.close()
    assert await asyncio.gather(*waiting) == ["a", "a"]


async def test_what_has_been_answered_is_forgotten() -> None:
    world = World("x", None)
    for _ in range(20):
        assert await world.serving("x") == "a"
        world.clock.now += 1.0
        for _ in range(3):
            await asyncio.sleep(0)
    gc.collect()
    assert len(world.asked) == 40
    assert [task for task in world.tasks if task() is not None] == []


async def test_when_those_that_have_it_are_down_one_that_does_not_say_may_try() -> None:
    world = World("x", None, "y")
    assert await world.serving("x") == "a"
    world.servers[0].checked(False)
    assert await world.serving("x") == "ab"


# -- the gateway -------------------------------------------------------------------------------


class Serving(FakeServer):
    """Has these models, and answers a 404 to any other; knows what it was asked."""

    def __init__(self, *models: str, locked: bool = False, mute: bool = False) -> None:
        super().__init__(FAILING)
        self.models, self.locked, self.mute = list(models), locked, mute
        self.asked: list[str] = []

    def _add_routes(self, app: web.Application) -> None:
        super()._add_routes(app)
        app.router.add_route("*", "/v1/{path:.*}", self._any)

    async def _any(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        return web.json_response({"from": self.models})

    async def _models(self, request: web.Request) -> web.Response:
        if self.mute or (self.locked and request.headers.get("Authorization") != "Bearer k"):
            return web.json_response({"error": {"message": "no"}}, status=401)
        data = [
            {"id": model, "object": "model", "owned_by": self.models[0]} for model in self.models
        ]
        return web.json_response({"object": "list", "data": data})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if (await request.json())["model"] not in self.models:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        return await super()._generate(request)


@asynccontextmanager
async def serving(*servers: Serving, **settings: Any) -> AsyncIterator[Gateway]:
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server)
        yield await stack.enter_async_context(gateway_for(*servers, **settings))


@pytest.mark.parametrize("interval", [0.0, 5.0])
@pytest.mark.parametrize("affinity", ["none", "prefix"])
async def test_a_generation_goes_to_a_server_of_its_model(interval: float, affinity: str) -> None:
    one, two, both = Serving("x"), Serving("y"), Serving("x", "y")
    settings: dict[str, Any] = {"health_interval": interval, "affinity": affinity}
    async with serving(one, two, both, **settings) as gateway:
        for i in range(6):
            for model in ("x", "y"):
                for path, body in ((COMPLETIONS, completion_body), (CHAT, chat_body)):
                    fields: dict[str, Any] = {"model": model, "user": str(i), "stream": False}
                    fields |= {"espo": {"mode": "off"}} if i % 2 else {"n": 2}
                    status, answer = await post(gateway.url + path, body(**fields))
                    assert status == 200, answer
        assert {body["model"] for body in one.bodies} <= {"x"}
        assert {body["model"] for body in two.bodies} <= {"y"}
        status, answer = await post(gateway.url + COMPLETIONS, completion_body(model="z"))
        assert (status, answer["error"]["message"]) == (404, "no such model")


@pytest.mark.parametrize(
    ("content_type", "data"),
    [
        ("application/json", json.dumps({"input": "a", "model": "y"}).encode()),
        ("multipart/form-data; boundary=b", None),
        ("application/json", b""),
    ],
)
async def test_so_does_every_other_request(content_type: str, data: bytes | None) -> None:
    one, two = Serving("x"), Serving("y")
    if data is None:
        part = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        data = part % (b"file", b"model=x") + part % (b"model", b"y") + b"--b--\r\n"
    path = "/v1/audio/transcriptions" if data else "/v1/models/y"
    async with serving(one, two) as gateway, aiohttp.ClientSession() as session:
        for _ in range(4):
            headers = {"Content-Type": content_type}
            method = "POST" if data else "GET"
            async with session.request(
                method, gateway.url + path, data=data or None, headers=headers
            ) as response:
                assert (await response.json())["from"] == ["y"]
        assert (one.asked, two.asked) == ([], [path] * 4)


async def listed(gateway: Gateway, key: str | None = None) -> tuple[int, Any]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession() as session,
        session.get(gateway.url + "/v1/models", headers=headers) as response,
    ):
        return response.status, await response.json()


async def test_the_models_of_all_servers_are_listed_once_each() -> None:
    async with serving(Serving("x", "y"), Serving("y", "z"), Serving("w", mute=True)) as gateway:
        status, answer = await listed(gateway)
        assert (status, answer["object"]) == (200, "list")
        assert [model["id"] for model in answer["data"]] == ["x", "y", "z"]
        # As the first server that has it tells of it.
        assert [model["owned_by"] for model in answer["data"]] == ["x", "x", "y"]


@pytest.mark.parametrize("settings", [{}, {"upstream_key": "k"}])
async def test_servers_that_want_a_key_are_asked_with_it(settings: dict[str, Any]) -> None:
    one, two = Serving("x", locked=True), Serving("y", locked=True)
    async with serving(one, two, **settings) as gateway:
        status, answer = await listed(gateway, None if settings else "k")
        assert (status, [model["id"] for model in answer["data"]]) == (200, ["x", "y"])
        for model in ("x", "y", "y", "y"):
            async with (
                aiohttp.ClientSession(headers={"Authorization": "Bearer k"}) as session,
                session.post(
                    gateway.url + COMPLETIONS, json=completion_body(model=model)
                ) as response,
            ):
                assert response.status == 200
        if not settings:
            assert await listed(gateway, "wrong") == (401, {"error": {"message": "no"}})


async def test_one_server_is_passed_through_as_it_answers() -> None:
    class Odd(Serving):
        async def _models(self, request: web.Request) -> web.Response:
            return web.json_response({"odd": request.query_string}, status=203)

    async with (
        serving(Odd("x")) as gateway,
        aiohttp.ClientSession() as session,
        session.get(gateway.url + "/v1/models?a=1") as response,
    ):
        assert (response.status, await response.json()) == (203, {"odd": "a=1"})


@pytest.mark.parametrize(
    "listing",
    [
        *(None, [], {}, "x", 5, {"data": None}, {"data": 5}, {"data": "xy"}, {"data": {"id": "x"}}),
        *({"data": [None]}, {"data": [{}]}, {"data": [{"id": None}]}, {"data": [{"id": [1]}]}),
    ],
)
async def test_whatever_a_server_lists_requests_are_served(listing: Any) -> None:
    class Odd(Serving):
        async def _models(self, request: web.Request) -> web.Response:
            return web.json_response(listing)

    async with serving(Odd("x"), Serving("y")) as gateway:
        for model in ("x", "y"):
            status, _ = await post(gateway.url + COMPLETIONS, completion_body(model=model))
            assert status == 200
        status, answer = await listed(gateway)
        assert (status, [model["id"] for model in answer["data"]]) == (200, ["y"])


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"model": 5}', b'{"model": "\xff"}', b"[1]"])
async def test_a_body_that_names_no_model_goes_to_any_server(data: bytes) -> None:
    async with serving(Serving("x"), Serving("y")) as gateway, aiohttp.ClientSession() as session:
        headers = {"Content-Type": "application/json"}
        for _ in range(2):
            async with session.post(
                gateway.url + "/v1/score", data=data, headers=headers
            ) as response:
                assert response.status == 200


async def test_where_a_model_is_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Serving("x") as one, Serving("y", "z") as two, FakeServer(FAILING) as three:
        config = Config((one.url, two.url, three.url))
        await check_servers(config, read_keys(config))
        told = f"by its model ({one.url}: x; {two.url}: y, z; {three.url}: fake)"
        assert told in caplog.text
    async with serving(Serving("x"), Serving("y")) as gateway:
        await post(gateway.url + COMPLETIONS, completion_body(model="y"))
        async with (
            aiohttp.ClientSession() as session,
            session.get(gateway.url + "/ready") as response,
        ):
            upstreams = (await response.json())["upstreams"]
        assert [upstream["models"] for upstream in upstreams] == [["x"], ["y"]]
