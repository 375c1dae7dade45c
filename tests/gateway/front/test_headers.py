"""Headers of the servers' answers on every kind of the gateway's: other origins, redirects."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict
from yarl import URL

from espo_gateway.front.gateway import Gateway
from espo_gateway.front.headers import answered_headers
from espo_gateway.testing import Fake, FakeServer, Script
from tests.helpers.gateway import (
    CHAT,
    COMPLETIONS,
    FAILING,
    GOOD,
    chat_body,
    completion_body,
    gateway_for,
)

PAGE = "https://page.example"


class Open(FakeServer):
    """Lets pages of some origins read everything, as vLLM's `--allowed-origins` does."""

    allowed = "*"

    def _add_routes(self, app: web.Application) -> None:
        super()._add_routes(app)
        app.router.add_route("OPTIONS", "/{path:.*}", self._preflight)
        app.on_response_prepare.append(self._allow)

    async def _preflight(self, request: web.Request) -> web.Response:
        assert "Authorization" not in request.headers
        return web.Response(text="OK", headers={"Access-Control-Allow-Methods": "GET, POST"})

    async def _allow(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Server-Says"] = "1"
        if self.allowed in ("*", request.headers.get("Origin")):
            response.headers["Access-Control-Allow-Origin"] = self.allowed
            response.headers["Access-Control-Expose-Headers"] = "X-Server-Says"
            response.headers.add("Vary", "Origin")


class Choosy(Open):
    allowed = PAGE


async def ask(
    gateway: Gateway, path: str, method: str = "POST", origin: str | None = PAGE, **request: Any
) -> tuple[int, CIMultiDict[str], bytes]:
    headers = {**request.pop("headers", {}), **({} if origin is None else {"Origin": origin})}
    async with (
        aiohttp.ClientSession() as session,
        session.request(
            method,
            URL(gateway.url + path, encoded=True),
            headers=headers,
            allow_redirects=False,
            **request,
        ) as response,
    ):
        return response.status, CIMultiDict(response.headers), await response.read()


@asynccontextmanager
async def pages(server: FakeServer, **settings: Any) -> AsyncIterator[tuple[FakeServer, Gateway]]:
    async with server, gateway_for(server, **settings) as gateway:
        yield server, gateway


OFF = {"mode": "off"}
#: How a request is answered: monitored or not, streamed or not, well or with an error of each side.
KINDS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "completion": (200, COMPLETIONS, {"json": completion_body()}),
    "streamed": (200, COMPLETIONS, {"json": completion_body(stream=True)}),
    "chat": (200, CHAT, {"json": chat_body()}),
    "streamed chat": (200, CHAT, {"json": chat_body(stream=True)}),
    "choices": (200, COMPLETIONS, {"json": completion_body(n=3)}),
    "streamed choices": (200, COMPLETIONS, {"json": completion_body(n=3, stream=True)}),
    "unmonitored": (200, COMPLETIONS, {"json": completion_body(espo=OFF)}),
    "unmonitored stream": (200, COMPLETIONS, {"json": completion_body(espo=OFF, stream=True)}),
    "passed": (200, "/v1/embeddings", {"json": {}}),
    "server's 405": (405, "/v1/nothing", {"json": {}}),
    "server's 429": (429, COMPLETIONS, {"json": completion_body(user="429")}),
    "server's 500": (500, CHAT, {"json": chat_body(user="500", stream=True)}),
    "server's 400, unmonitored": (400, CHAT, {"json": chat_body(user="400", espo=OFF)}),
    "bad JSON": (400, COMPLETIONS, {"data": b"{", "headers": {"Content-Type": "application/json"}}),
    "bad field": (400, CHAT, {"json": chat_body(n=0)}),
    "bad path": (400, "/v1/a//b", {"json": {}}),
    "too large": (413, COMPLETIONS, {"json": completion_body(prompt="x" * 2000)}),
    "no logprobs": (502, COMPLETIONS, {"json": completion_body(user="silent")}),
}


def play(body: dict[str, Any]) -> Script:
    user = str(body.get("user"))
    if user == "silent":
        return Script([GOOD], logprobs=False)
    return Script([GOOD], status=int(user)) if user.isdigit() else FAILING


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("server", [Open, Choosy])
async def test_what_the_server_lets_pages_read_they_may_read_of_every_answer(
    kind: str, server: type[Open]
) -> None:
    status, path, request = KINDS[kind]
    settings: dict[str, Any] = {"attempts": 1, "max_request_bytes": 1000, "unmonitored": "pass"}
    if kind == "no logprobs":
        settings["unmonitored"] = "refuse"
    async with pages(server(play), **settings) as (_, gateway):
        got, headers, _ = await ask(gateway, path, **request)
        assert got == status
        assert headers.getall("Access-Control-Allow-Origin") == [server.allowed]
        assert headers["Access-Control-Expose-Headers"] == "X-Server-Says"
        assert "Origin" in headers["Vary"]
        # The server has told nobody else that it may.
        _, headers, _ = await ask(gateway, path, origin="https://other.example", **request)
        assert headers.get("Access-Control-Allow-Origin") == ("*" if server is Open else None)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/models", "/v1/responses"])
async def test_a_page_asks_first_and_without_a_key(path: str) -> None:
    async with pages(Open(FAILING), api_keys=("key-1",), upstream_key=None) as (_, gateway):
        preflight = {"Access-Control-Request-Method": "POST"}
        status, headers, _ = await ask(gateway, path, "OPTIONS", headers=preflight)
        assert (status, headers["Access-Control-Allow-Methods"]) == (200, "GET, POST")
        assert headers["Access-Control-Allow-Origin"] == "*"
        # The page's own request then needs the key, and it may read that it was the wrong one.
        for authorization in ({}, {"Authorization": "Bearer wrong"}):
            status, headers, _ = await ask(gateway, path, json={}, headers=authorization)
            assert (status, headers["Access-Control-Allow-Origin"]) == (401, "*")


@pytest.mark.parametrize("path", ["/espo", "/espo/gate", "/metrics", "/openapi.json", "/elsewhere"])
async def test_only_what_servers_answer_is_open_to_that_question(path: str) -> None:
    async with pages(Open(FAILING), api_keys=("key-1",)) as (_, gateway):
        status, headers, _ = await ask(gateway, path, "OPTIONS")
        assert status in (401, 403)
        assert "Access-Control-Allow-Origin" not in headers


async def test_a_page_may_read_that_the_gateway_is_full_or_ends_or_has_no_server() -> None:
    body: dict[str, Any] = {"json": completion_body()}
    async with pages(Open(FAILING, gated=True), max_in_flight=1, max_queue=0) as (server, gateway):
        async with gateway.admission.slot():
            status, headers, _ = await ask(gateway, COMPLETIONS, **body)
            assert (status, headers["Access-Control-Allow-Origin"]) == (429, "*")
        gateway.drain()
        status, headers, _ = await ask(gateway, COMPLETIONS, **body)
        assert (status, headers["Access-Control-Allow-Origin"]) == (503, "*")
        gateway.traffic.draining = False
        await server.stop()
        status, headers, _ = await ask(gateway, COMPLETIONS, **body)
        assert (status, headers["Access-Control-Allow-Origin"]) == (503, "*")


async def test_a_server_that_lets_no_page_read_is_obeyed() -> None:
    async with pages(FakeServer(FAILING)) as (_, gateway):
        for _, path, request in KINDS.values():
            _, headers, _ = await ask(gateway, path, **request)
            assert "Access-Control-Allow-Origin" not in headers


async def test_the_gateways_own_words_stay() -> None:
    async with pages(Open(FAILING)) as (server, gateway):
        _, headers, body = await ask(gateway, COMPLETIONS, json=completion_body())
        assert headers["X-Server-Says"] == "1"
        assert len(headers.getall("Content-Type")) == len(headers.getall("Date")) == 1
        assert int(headers["Content-Length"]) == len(body)
        _, headers, body = await ask(gateway, COMPLETIONS, json=completion_body(stream=True))
        assert headers.getall("Content-Type") == ["text/event-stream; charset=utf-8"]
        assert headers.getall("Transfer-Encoding") == ["chunked"]
        assert len(headers.getall("X-Request-Id")) == 1
        assert body.endswith(b"data: [DONE]\n\n")
        assert len(server.bodies) == 2


# -- redirects ---------------------------------------------------------------------------------

SERVERS = ["http://one:8000", "https://two", "http://three:1/base"]


@pytest.mark.parametrize(
    ("location", "led"),
    [
        ("http://one:8000/v1/models", "/v1/models"),
        ("http://ONE:8000/v1/models?a=1", "/v1/models?a=1"),
        ("//one:8000/v1/models", "/v1/models"),
        ("https://two/pause", "/pause"),
        ("https://two:443/v1/x", "/v1/x"),
        ("http://three:1/base/v1/x/", "/v1/x/"),
        ("/base/v1/x", "/v1/x"),
        ("http://one:8000", "/"),
        ("http://user@one:8000/v1/x", "/v1/x"),
        # By another name of its own, or past another gateway.
        ("http://10.0.0.7:8000/v1/chat/completions", "/v1/chat/completions"),
        ("https://one:8000//v1/x", "/v1/x"),
        ("\\\\one:8000\\v1\\x", "/v1/x"),
        ("http:/v1/x", "/v1/x"),
        (" http://one:8000/v1/x ", "/v1/x"),
        ("http://[one/v1/x", "/"),
        # What is elsewhere, and does not generate.
        ("https://files.example/signed?x=1", "https://files.example/signed?x=1"),
        ("/v1/models", "/v1/models"),
        ("models", "models"),
        ("?page=2", "?page=2"),
    ],
)
def test_no_address_of_a_server_reaches_a_client(location: str, led: str) -> None:
    for name in ("Location", "content-location"):
        headers = answered_headers(CIMultiDict({name: location}), SERVERS, anew=False)
        assert list(headers.items()) == [(name, led)]


@given(
    st.sampled_from(["http://", "https://", "//", "HTTP://", "http:/", "http:///"]),
    st.sampled_from(["one:8000", "two", "three:1", "One:8000", "a@one:8000", "10.0.0.1", ""]),
    st.sampled_from(["", "/", "/v1/x", "//v1/x", "/base/v1/x", "\\v1\\x", "/v1/../pause"]),
    st.sampled_from(["", "?a=1", "#f", "?a=1#f"]),
)
def test_however_it_is_written(scheme: str, host: str, path: str, rest: str) -> None:
    headers = CIMultiDict({"Location": scheme + host + path + rest})
    led = answered_headers(headers, SERVERS, anew=False)["Location"]
    address = urlsplit(led)
    elsewhere = host == "" or (host == "10.0.0.1" and not path.startswith("/v1/"))
    assert elsewhere or (address.netloc == "" and not led.startswith("//"))


class Redirects(Fake):
    """Sends every request somewhere else, with the status and to the place of its query."""

    def _add_routes(self, app: web.Application) -> None:
        app.router.add_route("*", "/{path:.*}", self._redirect)

    async def _models(self, request: web.Request) -> web.Response:
        return await self._redirect(request)

    async def _redirect(self, request: web.Request) -> web.Response:
        # As FastAPI does for a slash too many: by the Host that it was asked with.
        where = request.query.get("to", f"http://{request.host}/v1/other")
        return web.Response(status=307, headers={"Location": where})


async def test_a_passed_redirect_leads_back_to_the_gateway() -> None:
    async with Redirects() as server, gateway_for(server) as gateway:
        for method in ("GET", "POST", "DELETE"):
            status, headers, _ = await ask(gateway, "/v1/models", method)
            assert (status, headers["Location"]) == (307, "/v1/other")


async def test_a_redirect_in_a_circle_is_told_for_what_it_is() -> None:
    async with Redirects() as server, gateway_for(server) as gateway:
        target = "/v1/files?to=https%3A%2F%2Fserver.example%2Fv1%2Ffiles"
        status, _, body = await ask(gateway, target, "GET")
        assert status == 307  # the query is another one
        for path, body_ in ((COMPLETIONS, completion_body()), (CHAT, chat_body(espo=OFF))):
            status, _, body = await ask(gateway, path, json=body_)
            assert status == 502
            assert "the upstream redirects;" in json.loads(body)["error"]["message"]
            assert "--upstream" in json.loads(body)["error"]["message"]
