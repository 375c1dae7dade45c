"""Answers that no monitor can follow are served as they are and say so, or are refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from aiohttp import web

from espo_gateway.telemetry.metrics import total
from espo_gateway.testing import Body, FakeServer, Script
from tests.helpers.gateway import (
    CHAT,
    COMPLETIONS,
    FAILING,
    chat_body,
    completion_body,
    gateway_for,
    generate,
    post,
    post_stream,
)


def _comparable(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k != "espo" and v is not None}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
async def test_without_logprobs_an_answer_is_served_and_says_so(chat: bool, stream: bool) -> None:
    script = dataclasses.replace(FAILING, logprobs=False)
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        choice = await generate(gateway.url, chat=chat, stream=stream)
        assert choice["text"] == "a" * 6 + "b" * 10
        assert choice["finish_reason"] == "stop"
        assert choice["espo"]["mode"] == "off"
        assert choice["espo"]["z"] is None
        assert "sends no logprobs" in choice["espo"]["reason"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
async def test_without_logprobs_an_answer_is_refused(chat: bool, stream: bool) -> None:
    script = dataclasses.replace(FAILING, logprobs=False)
    body = (chat_body if chat else completion_body)(stream=stream)
    path = CHAT if chat else COMPLETIONS
    async with FakeServer(script) as server, gateway_for(server, unmonitored="refuse") as gateway:
        status, answer = await post(gateway.url + path, body)
        assert status == 502
        assert "no logprobs" in answer["error"]["message"]
        await server.until(lambda: server.running == 0)


class Refuses(FakeServer):
    """Takes at most so many logprobs a token, none for -1, and says so as vLLM does."""

    def __init__(self, most: int, *, in_stream: bool) -> None:
        super().__init__(FAILING)
        self.most, self.in_stream = most, in_stream

    async def _play(self, request: web.Request, body: Body, script: Script) -> web.StreamResponse:
        asked = body.get("logprobs")
        top = -1 if asked in (None, False) else body.get("top_logprobs") or int(asked)
        if top <= self.most:
            return await super()._play(request, body, script)
        error = {"error": {"message": f"{top} logprobs", "code": 400}}
        if not (self.in_stream and body.get("stream")):
            return web.json_response(error, status=400)
        text = f"data: {json.dumps(error)}\n\ndata: [DONE]\n\n"
        return web.Response(text=text, content_type="text/event-stream")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("in_stream", [True, False])
async def test_where_logprobs_are_refused_an_answer_is_served_and_says_so(
    chat: bool, stream: bool, in_stream: bool
) -> None:
    async with Refuses(-1, in_stream=in_stream) as server, gateway_for(server) as gateway:
        choice = await generate(gateway.url, chat=chat, stream=stream)
        assert choice["text"] == "a" * 6 + "b" * 10
        assert choice["espo"]["mode"] == "off"
        assert "refuses logprobs" in choice["espo"]["reason"]
        assert [body.get("logprobs") for body in server.bodies] == [True if chat else 1, None]
        assert total(gateway.metrics.unmonitored, reason="the upstream refuses logprobs") == 1
        # What the client itself asks for is the server's to refuse, and it is told so once.
        fields = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
        body = (chat_body if chat else completion_body)(**fields)
        status, answer = await post(gateway.url + (CHAT if chat else COMPLETIONS), body)
        assert (status, answer["error"]["message"]) == (400, "2 logprobs")
        assert len(server.bodies) == 3


@pytest.mark.parametrize("stream", [True, False])
async def test_a_chat_has_the_logprobs_it_asks_for_where_more_are_refused(stream: bool) -> None:
    async with Refuses(1, in_stream=True) as server, gateway_for(server) as gateway:
        choice = await generate(gateway.url, chat=True, stream=stream, logprobs=True)
        assert choice["text"] == "a" * 6 + "b" * 10
        assert choice["logprobs"]["content"]
        assert choice["espo"]["mode"] == "off"
        choice = await generate(gateway.url, chat=False, stream=stream)
        assert choice["espo"]["cut"] == 8


async def test_where_logprobs_are_refused_so_is_the_request_if_that_is_insisted_on() -> None:
    async with (
        Refuses(-1, in_stream=True) as server,
        gateway_for(server, unmonitored="refuse") as gateway,
    ):
        status, answer = await post(gateway.url + CHAT, chat_body())
        assert (status, answer["error"]["message"]) == (400, "2 logprobs")
    async with (
        Refuses(-1, in_stream=True) as server,
        gateway_for(server, gate=None, unmonitored="refuse") as gateway,
    ):
        assert (await post(gateway.url + CHAT, chat_body()))[0] == 200


async def test_a_rule_that_never_stops_needs_no_logprobs() -> None:
    script = dataclasses.replace(FAILING, logprobs=False)
    async with FakeServer(script) as server, gateway_for(server, gate=None) as gateway:
        choice = await generate(gateway.url, chat=True, stream=False)
    assert choice["text"] == "a" * 6 + "b" * 10
    assert choice["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"use_beam_search": True, "n": 2}, "beam search"),
        ({"logprobs": 1, "logprob_token_ids": [5, 6]}, "logprob_token_ids"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_cannot_be_monitored_says_so(
    fields: dict[str, Any], reason: str, stream: bool
) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        choice = await generate(gateway.url, chat=False, stream=stream, **fields)
    assert choice["text"] == "a" * 6 + "b" * 10
    assert choice["espo"]["mode"] == "off"
    assert reason in choice["espo"]["reason"]
    assert server.bodies[0].items() >= fields.items()


def listed(answer: dict[str, Any]) -> dict[str, Any]:
    """With listed tokens' logprobs in the place of the likeliest, as for `logprob_token_ids`."""
    for choice in answer["choices"]:
        logprobs = choice["logprobs"] or {}
        tops = [{"token": str(i), "logprob": -9.0 - i} for i in range(3)]
        for entry in logprobs.get("content") or ():
            entry["top_logprobs"] = tops
        if "tokens" in logprobs:
            found = {top["token"]: top["logprob"] for top in tops}
            logprobs["top_logprobs"] = [found] * len(logprobs["tokens"])
    return answer


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
async def test_of_the_logprobs_a_client_lists_it_gets_all(chat: bool, stream: bool) -> None:
    fields = {"logprobs": True if chat else 1, "logprob_token_ids": [5, 6, 7], "stream": stream}
    body = (chat_body if chat else completion_body)(**fields)
    path = CHAT if chat else COMPLETIONS
    async with (
        FakeServer(dataclasses.replace(FAILING, rewrite=listed)) as server,
        gateway_for(server) as gateway,
    ):
        asked = [(post_stream if stream else post)(s.url + path, body) for s in (server, gateway)]
        straight, through = [json.dumps(await one) for one in asked]
        assert "espo" in through
        without = [json.loads(one, object_hook=_comparable) for one in (straight, through)]
        assert without[0] == without[1]
        assert server.bodies[0] == server.bodies[1]
    async with FakeServer(FAILING) as server, gateway_for(server, unmonitored="refuse") as gateway:
        status, answer = await post(gateway.url + path, body)
        assert status == 400
        assert "logprob_token_ids" in answer["error"]["message"]


@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=str)
async def test_calls_are_read_as_the_client_asked_for_them(fields: dict[str, Any]) -> None:
    """Whole answers of a server that reads calls out of them, and not out of a stream."""

    def parsed(answer: dict[str, Any]) -> dict[str, Any]:
        (choice,) = answer["choices"]
        if "message" in choice:
            choice["message"] = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
        return answer

    body = chat_body(tools=[{"type": "function", "function": {"name": "f"}}], **fields)
    script = dataclasses.replace(FAILING, rewrite=parsed)
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        if fields:
            chunks = await post_stream(gateway.url + CHAT, body)
            assert chunks[-1]["choices"][0]["espo"]["cut"] == 8
            return
        _, answer = await post(gateway.url + CHAT, body)
    (choice,) = answer["choices"]
    assert choice["message"]["tool_calls"] == [{"id": "1"}]
    assert choice["espo"]["mode"] == "off"
    assert "stream" in choice["espo"]["reason"]
