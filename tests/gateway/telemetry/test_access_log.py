"""Request ids and the log: what is on a line, and what never is."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from multidict import CIMultiDict

from espo_gateway.critic.probe import AnswerProbe
from espo_gateway.errors import UpstreamError
from espo_gateway.stop.told import Probe
from espo_gateway.testing import FakeServer, Script
from espo_gateway.upstream.pool import UpstreamPool
from tests.helpers.gateway import (
    COMPLETIONS,
    CRITIC_GATE,
    FAILING,
    GATE,
    GOOD,
    completion_body,
    gateway_for,
    listening,
    post,
    raw_request,
    start,
)

HEX = re.compile(r"[0-9a-f]{32}")


async def ask(url: str, body: Any = None, request_id: str | None = None) -> tuple[int, str]:
    """The status, and the request id of the answer."""
    headers = {} if request_id is None else {"X-Request-Id": request_id}
    method = "GET" if body is None else "POST"
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, json=body, headers=headers) as response,
    ):
        await response.read()
        assert len(response.headers.getall("X-Request-Id")) == 1
        return response.status, response.headers["X-Request-Id"]


def seen(headers: Mapping[str, str]) -> str | None:
    """The request id that a server was sent."""
    return CIMultiDict(headers).get("X-Request-Id")


@pytest.mark.parametrize(
    "body",
    [
        completion_body(),
        completion_body(stream=True),
        completion_body(espo={"mode": "off"}),
        completion_body(espo={"mode": "off"}, stream=True),
    ],
)
async def test_a_clients_request_id_is_kept(body: dict[str, Any]) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        url = gateway.url + COMPLETIONS
        assert await ask(url, body, "mine-1") == (200, "mine-1")
        status, made = await ask(url, body)
        assert status == 200
        assert HEX.fullmatch(made)
        assert [seen(headers) for headers in server.headers] == ["mine-1", made]


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "é", "a\tb"])
async def test_an_unfit_request_id_is_replaced(bad: str) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        status, made = await ask(gateway.url + COMPLETIONS, completion_body(), bad)
        assert status == 200
        assert HEX.fullmatch(made)
        assert seen(server.headers[0]) == made


async def test_errors_have_it_too() -> None:
    async with (
        FakeServer(Script([GOOD], status=400)) as server,
        gateway_for(server) as gateway,
    ):
        for path, body in (
            ("/nowhere", None),
            ("/v1/nowhere", None),
            (COMPLETIONS, completion_body()),
            (COMPLETIONS, [1]),
            ("/health", None),
            ("/metrics", None),
        ):
            assert (await ask(gateway.url + path, body, "mine"))[1] == "mine"


async def test_choices_are_numbered_upstream() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        body = completion_body(prompt=["p", "q"], n=2)
        assert await ask(gateway.url + COMPLETIONS, body, "mine") == (200, "mine")
        ids = sorted(seen(headers) or "" for headers in server.headers)
        assert ids == [f"mine-{index}" for index in range(4)]


async def test_a_request_id_in_the_body_stays_the_servers_name_for_it() -> None:
    """vLLM would prefer the header to the body's."""
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        url = gateway.url + COMPLETIONS
        for espo in ({}, {"mode": "off"}):
            await ask(url, completion_body(request_id="theirs", espo=espo))
            assert seen(server.headers[-1]) is None
            assert server.bodies[-1]["request_id"] == "theirs"
            await ask(url, completion_body(request_id="theirs", espo=espo), "mine")
            assert seen(server.headers[-1]) == "mine"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    names = ("levelname", "method", "route", "path", "status", "tokens", "stopped")
    records = [r for r in caplog.records if r.name == "espo_gateway.access"]
    return [{name: getattr(record, name) for name in names} for record in records]


async def test_one_line_a_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "espo_gateway")
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        await ask(gateway.url + COMPLETIONS, completion_body(n=2))
        await ask(gateway.url + COMPLETIONS, completion_body(espo={"mode": "shadow"}))
        await ask(gateway.url + COMPLETIONS, completion_body(n=0))
        await ask(gateway.url + "/v1/models?secret=1")
        await ask(gateway.url + "/no%0Awhere?secret=1")
        await ask(gateway.url + "/health")
    stop, shadow, bad, models, nowhere, health = lines(caplog)
    generation = {"levelname": "INFO", "method": "POST", "route": COMPLETIONS, "path": COMPLETIONS}
    assert stop.pop("tokens") >= 16
    assert stop == {**generation, "status": 200, "stopped": ["regret-only"] * 2}
    assert shadow == {**generation, "status": 200, "tokens": 16, "stopped": []}
    assert bad == {**generation, "status": 400, "tokens": 0, "stopped": []}
    assert (models["route"], models["path"]) == ("/v1/{path}", "/v1/models")
    assert (nowhere["route"], nowhere["path"], nowhere["status"]) == (
        *("unknown", "/no%0Awhere"),
        404,
    )
    assert health["levelname"] == "DEBUG"
    ours = "".join(str(vars(r)) for r in caplog.records if r.name.startswith("espo_gateway"))
    assert "secret" not in ours
    assert "stopped by regret-only" in caplog.text


async def test_a_client_that_left_has_a_line_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with FakeServer(FAILING, gated=True) as server, gateway_for(server) as gateway:
        _, writer = await raw_request(gateway.url, COMPLETIONS, completion_body())
        await server.until(lambda: server.running == 1)
        writer.transport.abort()
        await server.until(lambda: server.aborted == 1)
    assert [line["status"] for line in lines(caplog)] == [499]


class Says(FakeServer):
    """Answers everything it is asked to generate, or to value, with this."""

    def __init__(self, text: str, *, decides: bool = False, **answer: Any) -> None:
        super().__init__(FAILING, decides=decides)
        self._answer = {"text": text, "content_type": "text/event-stream", **answer}

    def _add_routes(self, app: web.Application) -> None:
        super()._add_routes(app)
        app.router.add_post("/pooling", self._generate)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        return web.Response(**self._answer)


@pytest.mark.parametrize(
    "answer",
    [
        {"text": "data: secret\n\n"},
        {"text": 'data: {"choices": [{"text": ["secret"]}]}\n\n'},
        {"text": 'data: {"choices": [{"logprobs": {"token_logprobs": ["secret"]}}]}\n\n'},
        {"text": 'data: {"error": {"message": "secret"}}\n\n'},
        {"text": "secret", "content_type": "application/json"},
        {"text": "secret", "decides": True},
        {"text": '{"choices": [{"text": ["secret"]}]}', "decides": True},
        {"text": "secret", "status": 400},
        {"text": "", "status": 307, "headers": {"Location": "http://elsewhere/v1?secret"}},
    ],
    ids=str,
)
async def test_what_a_server_answers_is_told_and_not_logged(
    answer: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "espo_gateway")
    async with Says(**answer) as server, gateway_for(server, unmonitored="refuse") as gateway:
        status, told = await post(gateway.url + COMPLETIONS, completion_body())
        assert status >= 400
        # Where it quotes the server at all.
        assert "[" in answer["text"] or "secret" in told["error"]["message"]
    assert "WARNING" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("status", [200, 400])
async def test_nor_is_what_a_critic_or_a_probe_answers(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "espo_gateway")
    answer = '{"data": ["secret"], "choices": ["secret"]}'
    async with (
        Says(answer, status=status) as says,
        FakeServer(FAILING) as server,
        gateway_for(server, gate=CRITIC_GATE, critic=says.url) as gateway,
    ):
        assert (await post(gateway.url + COMPLETIONS, completion_body()))[0] == 200
        with pytest.raises(UpstreamError):
            async with UpstreamPool([says.url]) as pool:
                await AnswerProbe(pool).ask(Probe([1], [2]), "fake", [3])
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [line.partition(":")[0] for line in warned] == ["critic", "answer probe"]
    assert "secret" not in caplog.text


@pytest.mark.parametrize("style", ["json", "text"])
async def test_the_log_of_the_command(style: str, tmp_path: Any) -> None:
    (tmp_path / "gate.json").write_bytes(GATE)
    async with FakeServer(FAILING) as server:
        process = await start(
            *("--upstream", server.url, "--port", "0", "--gate", f"{tmp_path}/gate.json"),
            *("--log-format", style),
        )
        try:
            url, logged = await listening(process)
            await ask(url + COMPLETIONS, completion_body(prompt="secret"), "mine")
            server.script = Script([GOOD], status=418)
            await ask(url + COMPLETIONS, completion_body(n=2), "other")
        finally:
            process.terminate()
            assert process.stderr is not None
            logged += (await process.stderr.read()).decode()
            assert await process.wait() == 0
    assert "secret" not in logged
    if style == "text":
        assert re.search(
            r"INFO espo_gateway.access: POST /v1/completions 200 in .* \[mine\]", logged
        )
        assert re.search(r"WARNING .*status 418 \[other\]", logged)
        return
    entries = [json.loads(line) for line in logged.splitlines()]
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in entries)
    served, failed = [entry for entry in entries if entry["logger"] == "espo_gateway.access"]
    assert served["request_id"] == "mine"
    assert (served["level"], served["route"], served["status"]) == ("INFO", COMPLETIONS, 200)
    assert (served["stopped"], served["tokens"] >= 8) == (["regret-only"], True)
    assert (failed["request_id"], failed["status"]) == ("other", 418)
    warned = [entry for entry in entries if entry["level"] == "WARNING"]
    assert {entry["request_id"] for entry in warned} == {"other"}
