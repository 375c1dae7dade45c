"""Clients that leave, servers that fail: nothing keeps running, nothing is counted twice."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, InternalServerError

from espo_gateway.__main__ import main
from espo_gateway.errors import UpstreamProtocolError
from espo_gateway.front.gateway import Gateway
from espo_gateway.stop.gate_json import gate_from_json
from espo_gateway.stream.request import plan
from espo_gateway.stream.session import Session
from espo_gateway.testing import FakeServer, Script, Token
from espo_gateway.testing.critic import FakeCritic
from tests.helpers.gateway import (
    CHAT,
    COMPLETIONS,
    CRITIC_GATE,
    FAILING,
    GATE,
    GOOD,
    LONG,
    chat_body,
    client_of,
    completion_body,
    gateway_for,
    listening,
    metric,
    post,
    post_stream,
    raw_request,
    start,
)

UNSTOPPED = Script([GOOD] * 10_000)


async def idle(gateway: Gateway, server: FakeServer) -> None:
    """Wait until the server is; then every counter must have come back."""
    await server.until(lambda: server.running == 0)
    # The handler's last steps follow the closing of its connection to the server.
    while await metric(gateway, "espo_gateway_requests_in_flight"):
        pass
    assert [upstream.in_flight for upstream in gateway.pool.servers] == [0] * len(
        gateway.pool.servers
    )


@pytest.mark.parametrize("tokens", [0, 1, 5], ids="after {} tokens".format)
@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"espo": {"mode": "off"}}], ids=str)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_departed_client_ends_the_generation(
    path: str, stream: bool, fields: dict[str, Any], tokens: int
) -> None:
    make = chat_body if path == CHAT else completion_body
    body = make(stream=stream, max_tokens=10_000, **fields)
    count = 1 if not fields.get("n") else 3
    async with FakeServer(UNSTOPPED, gated=True) as server, gateway_for(server) as gateway:
        reader, writer = await raw_request(gateway.url, path, body)
        await server.until(lambda: server.running == count)
        server.release(tokens)
        await server.until(lambda: server.generated == tokens)
        if stream and tokens:
            await reader.readuntil(b"data: ")
        writer.transport.abort()
        await idle(gateway, server)
        assert (server.aborted, server.finished, server.generated) == (count, 0, tokens)
        assert await metric(gateway, "espo_gateway_client_disconnects_total") == 1


async def sent_or_ended(server: FakeServer, tokens: int) -> None:
    await server.until(lambda: server.generated >= tokens or not server.running)


async def test_a_client_that_reads_slowly_slows_the_server() -> None:
    """Memory of a stream is bounded: the gateway takes no more than the client does."""
    script = Script([Token("x" * 1000, -0.1)] * 100_000)
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        body = completion_body(stream=True, max_tokens=100_000)
        _, writer = await raw_request(gateway.url, COMPLETIONS, body)
        assert isinstance(writer.transport, asyncio.Transport)
        writer.transport.pause_reading()
        seen = -1
        while server.generated != seen:  # until it has come to a halt
            seen = server.generated
            await asyncio.sleep(0.3)
        assert server.generated < 50_000
        assert server.running == 1
        writer.transport.abort()
        await idle(gateway, server)


@pytest.mark.parametrize("status", [429, 503])
async def test_an_overloaded_server_is_tried_again(status: int) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        server.queue.append(Script([], status=status))
        server.queue.append(Script([], fault="reset"))
        code, answer = await post(gateway.url + COMPLETIONS, completion_body())
        assert code == 200
        assert answer["choices"][0]["espo"]["cut"] == 8
        assert len(server.bodies) == 3
        await idle(gateway, server)


async def test_another_server_takes_over() -> None:
    async with (
        FakeServer(Script([], status=503)) as bad,
        FakeServer(FAILING) as good,
        gateway_for(bad, good) as gateway,
    ):
        for _ in range(4):
            code, _ = await post(gateway.url + COMPLETIONS, completion_body())
            assert code == 200
        assert len(good.bodies) == 4
        await bad.stop()
        code, _ = await post(gateway.url + COMPLETIONS, completion_body())
        assert code == 200


async def test_when_all_tries_fail_the_last_answer_is_told() -> None:
    async with (
        FakeServer(Script([], status=503)) as server,
        gateway_for(server, attempts=2) as gateway,
    ):
        code, answer = await post(gateway.url + COMPLETIONS, completion_body())
        assert (code, answer["error"]["message"]) == (503, "as scripted")
        assert len(server.bodies) == 2
        assert await metric(gateway, "espo_gateway_upstream_errors_total") == 1
        await idle(gateway, server)


@pytest.mark.parametrize("status", [400, 404, 500])
@pytest.mark.parametrize("mode", ["enforce", "off"])
async def test_an_error_status_is_handed_on_at_once(status: int, mode: str) -> None:
    async with FakeServer(Script([], status=status)) as server, gateway_for(server) as gateway:
        body = completion_body(espo={"mode": mode})
        code, answer = await post(gateway.url + COMPLETIONS, body)
        assert (code, answer["error"]["code"]) == (status, status)
        assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("reset", 503, "broke off"),
        ("garbage", 502, "no JSON object"),
        ("error", 500, "engine died"),
        ("eof", 502, "ended before"),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
async def test_a_generation_that_breaks_is_an_error(
    fault: Any, status: int, message: str, n: int
) -> None:
    """Never retried once tokens have been read, never an answer that only looks whole."""
    script = dataclasses.replace(UNSTOPPED, fault=fault, after=3)
    async with FakeServer(script) as server, gateway_for(server) as gateway:
        code, answer = await post(gateway.url + COMPLETIONS, completion_body(n=n))
        assert code == status
        assert message in answer["error"]["message"]
        assert len(server.bodies) == n
        await idle(gateway, server)


@pytest.mark.parametrize(
    "chunk",
    [
        {},
        {"choices": 3},
        {"choices": [None]},
        {"choices": [{"index": 0, "text": "a", "logprobs": {"token_logprobs": [-1], "tokens": 3}}]},
    ],
    ids=str,
)
def test_a_malformed_chunk_is_the_upstreams_error(chunk: dict[str, Any]) -> None:
    planned = plan(completion_body(), chat=False)
    gate = gate_from_json(GATE, has_critic=False)
    session = Session(gate, planned.control, planned.asked, planned.singles[0], chat=False)
    with pytest.raises(UpstreamProtocolError):
        session.receive(json.dumps(chunk).encode())


@pytest.mark.parametrize("fault", ["reset", "garbage", "error", "eof"])
async def test_a_stream_that_breaks_tells_the_official_client(fault: Any) -> None:
    script = dataclasses.replace(UNSTOPPED, fault=fault, after=3)
    async with (
        FakeServer(script, gated=True) as server,
        gateway_for(server) as gateway,
        client_of(gateway.url) as client,
    ):
        server.release(1)
        stream = await client.completions.create(**completion_body(stream=True))
        texts = []
        with pytest.raises(APIError):  # noqa: PT012
            async for chunk in stream:
                texts.append(chunk.choices[0].text)
                server.release(1)
        assert texts == ["a"] * 3
        assert await metric(gateway, "espo_gateway_upstream_errors_total") == 1
        await idle(gateway, server)


async def test_silence_ends_in_a_timeout() -> None:
    script = dataclasses.replace(UNSTOPPED, fault="stall", after=3)
    async with (
        FakeServer(script) as server,
        gateway_for(server, idle_timeout=0.2) as gateway,
        client_of(gateway.url) as client,
    ):
        with pytest.raises(InternalServerError) as caught:
            await client.completions.create(**completion_body())
        assert caught.value.status_code == 504
        await idle(gateway, server)
        assert server.aborted == 1


async def test_no_server_at_all() -> None:
    async with FakeServer(FAILING) as server:
        pass
    async with gateway_for(server, attempts=2) as gateway:
        code, answer = await post(gateway.url + COMPLETIONS, completion_body())
        assert (code, answer["error"]["type"]) == (503, "upstream_unavailable")
        assert await metric(gateway, "espo_gateway_requests_in_flight") == 0


# -- a critic ----------------------------------------------------------------------------------

#: z first passes β·ε = 1 at token 8; there, at 9 and so on, V decides.
ASKED = [8, 9, 10, 11, 12, 13, 14, 15, 16]


class Critic:
    """Answers V as told, when told."""

    def __init__(self, values: dict[int, float | Exception]) -> None:
        self.values = values
        self.asked: list[int] = []
        self.prefixes: list[list[int]] = []
        self.ready = asyncio.Event()

    async def value(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        self.asked.append(len(token_ids))
        self.prefixes.append([*prompt_token_ids, *token_ids])
        await self.ready.wait()
        value = self.values.get(len(token_ids), 100.0)
        if isinstance(value, Exception):
            raise value
        return value


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("late", [True, False])
async def test_a_critic_cuts_at_the_token_it_was_asked_for(
    path: str, stream: bool, late: bool
) -> None:
    critic = Critic({10: 0.0})
    make = chat_body if path == CHAT else completion_body
    ids = [Token(t.text, t.logprob, t.max_logprob, i) for i, t in enumerate(FAILING.tokens)]
    if not late:
        critic.ready.set()
    async with (
        FakeServer(Script(ids), gated=True) as server,
        gateway_for(server, gate=CRITIC_GATE, critic=critic) as gateway,
    ):
        request = asyncio.create_task(
            (post_stream if stream else post)(gateway.url + path, make(stream=stream))
        )
        if late:  # every answer comes after the server's last token
            server.release(16)
            await server.until(lambda: server.finished == 1)
            critic.ready.set()
        else:
            for sent in range(1, 17):
                server.release(1)
                await sent_or_ended(server, sent)
        answer: Any = await request
    if stream:
        choices = [chunk["choices"][0] for chunk in answer]
        texts = [c["text"] if path == COMPLETIONS else c["delta"].get("content") for c in choices]
        text, choice = "".join(texts), choices[-1]
    else:
        choice = answer[1]["choices"][0]
        text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    assert text == "aaaaaabbbb"
    record = choice["espo"]
    assert (record["stopped"], record["cut"], record["value"]) == (True, 10, 0.0)
    assert record["threshold"] == 1.0
    assert record["overshoot"] == record["tokens"] - 10
    assert critic.asked[:3] == [8, 9, 10]
    assert critic.prefixes[2] == [1, 2, 3, *range(10)]
    assert "token_ids" not in choice


async def test_a_critic_that_fails_stops_nothing() -> None:
    critic = Critic({token: RuntimeError("down") for token in ASKED})
    critic.ready.set()
    async with (
        FakeServer(FAILING) as server,
        gateway_for(server, gate=CRITIC_GATE, critic=critic) as gateway,
    ):
        _, answer = await post(gateway.url + COMPLETIONS, completion_body())
    assert critic.asked == ASKED[:-1]  # the last token completes the rollout
    assert answer["choices"][0]["espo"]["cut"] is None
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_a_departed_client_also_ends_its_questions() -> None:
    critic = Critic({})
    async with (
        FakeServer(LONG, gated=True) as server,
        gateway_for(server, gate=CRITIC_GATE, critic=critic) as gateway,
    ):
        body = completion_body(max_tokens=10_000)
        _, writer = await raw_request(gateway.url, COMPLETIONS, body)
        server.release(10)
        await server.until(lambda: server.generated == 10)
        writer.transport.abort()
        await idle(gateway, server)
        assert server.aborted == 1
        waiting = [t for t in asyncio.all_tasks() if "Critic.value" in repr(t)]
        await asyncio.gather(*waiting, return_exceptions=True)  # cancelled: they come to an end


# -- the process -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_command(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "gate.json").write_bytes(GATE)
    async with FakeServer(LONG, gated=True) as server:
        process = await start(
            "--upstream", server.url, "--port", "0", "--gate", str(tmp_path / "gate.json")
        )
        try:
            server.release(2)  # of what is asked at the start
            url, logged = await listening(process)
            assert "serves fake" in logged
            # As started in production: a dropped connection must end the generation.
            _, writer = await raw_request(url, CHAT, chat_body(max_tokens=10_000))
            await server.until(lambda: server.running == 1)
            writer.transport.abort()
            await server.until(lambda: server.aborted == 1)
            server.release(20)
            _, answer = await post(url + COMPLETIONS, completion_body())
            assert answer["choices"][0]["espo"]["cut"] == 8
            process.send_signal(number)
            assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()


async def test_the_command_waits_for_its_servers() -> None:
    async with FakeServer(FAILING) as server:
        port = int(server.url.rsplit(":", 1)[1])
    process = await start("--upstream", server.url, "--port", "0", "--wait", "30")
    try:
        async with FakeServer(FAILING, port=port):
            _, logged = await listening(process)
            assert "serves fake" in logged
    finally:
        process.terminate()
        assert await process.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wait", "0.1"], "no answer within 0.1 s"),
        (["--wait", "0.1", "--critic", "http://127.0.0.1:7"], "http://127.0.0.1:7"),
    ],
)
async def test_the_command_refuses(arguments: list[str], message: str) -> None:
    process = await start("--upstream", "http://127.0.0.1:9", "--port", "0", *arguments)
    _, stderr = await process.communicate()
    assert process.returncode == 1
    assert message in stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--critic", "127.0.0.1:7"], "must be like http://host:port"),
        (["--critic-timeout", "0"], "--critic-timeout: Input should be greater than 0"),
        (["--gate", "/nowhere/gate.json"], "No such file"),
        (["--upstream", "ftp://x"], "must be like http://host:port"),
        (["--attempts", "0"], "attempts: Input should be greater than or equal to 1"),
    ],
)
def test_the_command_refuses_settings(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--upstream", "http://127.0.0.1:9", "--port", "0", *arguments])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


async def test_the_command_with_a_critic(tmp_path: Path) -> None:
    (tmp_path / "gate.json").write_text(CRITIC_GATE.decode())
    async with FakeServer(FAILING) as server, FakeCritic(lambda prefix: 0.0) as critic:
        arguments = ["--upstream", server.url, "--port", "0", "--gate", f"{tmp_path}/gate.json"]
        process = await start(*arguments, "--critic", critic.url)
        try:
            url, logged = await listening(process)
            assert f"{critic.url} serves critic" in logged
            _, answer = await post(url + COMPLETIONS, completion_body())
            assert answer["choices"][0]["espo"]["cut"] == 8
        finally:
            process.terminate()
            assert await process.wait() == 0


async def test_the_command_refuses_a_critic_that_is_none() -> None:
    async with FakeServer(FAILING) as server:
        process = await start(*("--upstream", server.url, "--port", "0", "--critic", server.url))
        _, stderr = await process.communicate()
    assert process.returncode == 1
    last = stderr.decode().splitlines()[-1]
    assert f"--critic {server.url} gives no values" in last
    assert "HTTP 404" in last
    assert "vllm_plugin MODEL --critic" in last


async def test_a_bad_address_and_a_bad_gate_are_told(tmp_path: Path) -> None:
    (tmp_path / "gate.json").write_text('{"rule": "regret-only", "bta": 1}')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--host", "300.1.1.1"], "choose another with --host"),
            (
                ["--port", "0", "--gate", str(tmp_path / "gate.json")],
                f"--gate {tmp_path}/gate.json: bta: unknown field",
            ),
        ):
            process = await start("--upstream", "http://127.0.0.1:9", *arguments)
            _, stderr = await process.communicate()
            assert process.returncode == 1
            assert message in stderr.decode().splitlines()[-1]
