"""Before a server that decides by itself a client gets what it gets where the gateway decides."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from espo_gateway.stop.estimate import FEATURES
from espo_gateway.stop.gate_json import gate_to_json
from espo_gateway.stop.rules import RULES
from espo_gateway.testing import Body, FakeServer, Script, Token
from espo_gateway.testing.critic import FakeCritic
from espo_gateway.vllm_plugin.monitor import Monitor
from espo_gateway.vllm_plugin.wire import FIELDS, ROUTE, stop_reason_of, told_by
from tests.helpers.gateway import (
    BAD,
    CHAT,
    COMPLETIONS,
    CRITIC_GATE,
    FAILING,
    GATE,
    GOOD,
    LONG,
    chat_body,
    completion_body,
    gateway_for,
    get_text,
    metric,
    post,
    post_stream,
    until_running,
)

TOKENS = "/inference/v1/generate"
PATHS = [COMPLETIONS, CHAT, TOKENS]
ESTIMATOR = {"weights": [0.0, -0.3, *[-0.2] * (len(FEATURES) - 3), -0.01], "bias": 3.0}
GATES: dict[str, Body] = {
    "none": {},
    "value-gated": {"beta": 1.0},
    "regret-only": {"beta": 1.0},
    "value-only": {"value": "stream", "estimator": ESTIMATOR, "p_star": 0.4},
    "success-probability": {"estimator": ESTIMATOR, "p_star": 0.4},
    "surprise": {"beta": 1.5},
    "confidence": {"confidence": 2.0, "confidence_window": 4, "confidence_top_k": 3},
    "random": {"hazard": 0.1},
    "length": {"beta": 7.0},
}


ASKING = {
    "rule": "success-probability",
    "estimator": {"weights": [0.0] * (len(FEATURES) + 1), "bias": 0.0, "sources": ["critic"]},
    "schedule": {"every": 4},
}


def body_of(path: str, **fields: Any) -> Body:
    if path == TOKENS:
        sampling = {"max_tokens": 100, "n": fields.pop("n", 1), "seed": fields.pop("seed", 5)}
        for name in ("logprobs", "stop"):
            if name in fields:
                sampling[name] = fields.pop(name)
        return {"model": "fake", "token_ids": [1, 2, 3], "sampling_params": sampling, **fields}
    return (chat_body if path == CHAT else completion_body)(**fields)


def ordered(body: Body) -> Body:
    """What the engine is told in a request that came to a server."""
    xargs: Body = body.get("vllm_xargs") or body.get("sampling_params", {}).get("extra_args") or {}
    return xargs


def random_script(seed: int) -> Script:
    chance = random.Random(seed)
    tokens = []
    for n in range(chance.randrange(1, 40)):
        top = -chance.random() / 4
        logprob = top if chance.random() < 0.6 else top - chance.expovariate(0.4)
        others = tuple(top - 1.0 - k for k in range(4))
        tokens.append(Token(chr(97 + n % 26), logprob, top, n, others))
    return Script(tokens, per_chunk=chance.randrange(1, 4))


async def answered(url: str, path: str, body: Body) -> Any:
    """A whole answer, or a stream's choices put together, whatever the chunks."""
    if not body.get("stream"):
        status, answer = await post(url + path, body)
        assert status == 200, answer
        return answer
    choices: dict[int, Body] = {}
    usage = None
    for chunk in await post_stream(url + path, body):
        usage = chunk.get("usage") or usage
        for part in chunk["choices"]:
            known = choices.setdefault(part["index"], {"text": "", "token_ids": []})
            text = known["text"] + (
                part.get("text") or (part.get("delta") or {}).get("content") or ""
            )
            ids = known["token_ids"] + (part.get("token_ids") or [])
            known |= {**part, "text": text, "token_ids": ids, "logprobs": None}
            known.pop("delta", None)
    return {"choices": [choices[n] for n in sorted(choices)], "usage": usage}


def comparable(answer: Body) -> Body:
    """Without what tells how the gateway came to it, and what vLLM tells of whole answers only."""
    for choice in answer["choices"]:
        record = choice["espo"]
        # The gateway sees tokens past the cut; an engine makes none.
        if record["stopped"]:
            record["tokens"] = record["cut"]
        record["overshoot"] = 0
        choice.pop("routed_experts", None)
        choice.pop("prompt_token_ids", None)
        for name in [name for name, value in choice.items() if value is None]:
            del choice[name]
        if "message" in choice:
            choice["message"] = {k: v for k, v in choice["message"].items() if v is not None}
    return {"choices": answer["choices"], "usage": answer["usage"]}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_the_same_answers_whoever_decides(path: str, stream: bool, rule: str) -> None:
    gate = json.dumps({"rule": rule, "version": 3, "weights_version": "w5", **GATES[rule]})
    answers: list[list[Any]] = []
    for decide in ("gateway", "engine"):
        server = FakeServer(lambda body: random_script(_seed(body)), decides=True)
        async with (
            server,
            gateway_for(server, gate=gate.encode(), decide=decide) as gateway,
        ):
            bodies = [
                body_of(path, stream=stream, seed=7 * n, n=3, espo={"mode": mode, "trace": n == 1})
                | ({"stream_options": {"include_usage": True}} if stream else {})
                for n, mode in enumerate(["enforce", "enforce", "shadow"])
            ]
            found = [await answered(gateway.url, path, body) for body in bodies]
            answers.append([comparable(answer) for answer in found])
            asked = [bool(ordered(body)) for body in server.bodies]
            assert asked == [decide == "engine"] * 9
            if decide == "engine":
                assert all(bool(body.get("stream")) == stream for body in server.bodies)
                assert all("logprobs" not in body for body in server.bodies)
    assert answers[0] == answers[1]
    cuts = [choice["espo"]["cut"] for answer in answers[1] for choice in answer["choices"]]
    assert rule == "none" or any(cut is not None for cut in cuts)


def _seed(body: Body) -> int:
    seed: int = body.get("seed", body.get("sampling_params", {}).get("seed"))
    return seed


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_what_is_asked_for_stays_the_clients(path: str, stream: bool) -> None:
    async with (
        FakeServer(FAILING, decides=True) as server,
        gateway_for(server, decide="engine") as gateway,
    ):
        wanted: Body = {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
        own = {"mine": 1}
        name = "extra_args" if path == TOKENS else "vllm_xargs"
        body = body_of(path, stream=stream, **wanted)
        place = body["sampling_params"] if path == TOKENS else body
        place[name] = own
        answer = await answered(gateway.url, path, body)
    [sent] = server.bodies
    assert ordered(sent)["mine"] == 1
    assert set(ordered(sent)) <= {"mine", *FIELDS}
    place = sent["sampling_params"] if path == TOKENS else sent
    assert {n: place[n] for n in wanted} == wanted
    [choice] = answer["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "espo")
    assert (
        choice["espo"].items()
        >= {
            **{"rule": "regret-only", "mode": "enforce", "stopped": True, "cut": 8, "tokens": 8},
            **{"overshoot": 0, "missing": 0, "threshold": 1.0, "beta": 1.0, "gate_version": 3},
            "weights_version": "w5",
        }.items()
    )
    if not stream:
        assert choice["logprobs"] is not None


async def test_the_word_for_a_stop_is_still_the_clients() -> None:
    async with (
        FakeServer(FAILING, decides=True) as server,
        gateway_for(server, decide="engine", finish_reason="early_stop") as gateway,
    ):
        _, answer = await post(gateway.url + COMPLETIONS, completion_body())
    assert answer["choices"][0]["finish_reason"] == "early_stop"


async def test_a_request_can_have_constants_history_and_audit_of_its_own() -> None:
    async with (
        FakeServer(FAILING, decides=True) as server,
        gateway_for(server, decide="engine") as gateway,
    ):
        espos: list[Body] = [{"beta": 99.0}, {"min_tokens": 9}, {"audit": 1.0}, {"history": 0.5}]
        records = []
        for espo in espos:
            _, answer = await post(gateway.url + COMPLETIONS, completion_body(espo=espo))
            records.append(answer["choices"][0]["espo"])
    assert [record["cut"] for record in records] == [None, 9, 8, 8]
    assert [record["stopped"] for record in records] == [False, True, False, True]
    assert (records[2]["audited"], records[2]["mode"], records[2]["tokens"]) == (True, "shadow", 16)
    assert ordered(server.bodies[2])["espo_mode"] == "shadow"
    assert ordered(server.bodies[3])["espo_history"] == 0.5


async def test_what_counts_counts() -> None:
    async with (
        FakeServer(FAILING, decides=True) as server,
        gateway_for(server, decide="engine") as gateway,
    ):
        for espo in ({}, {"mode": "shadow"}, {"beta": 99.0}):
            await post(gateway.url + COMPLETIONS, completion_body(n=2, espo=espo))
        names = ("choices", "generated_tokens", "stops", "overshoot_tokens", "missing_tokens")
        counts = [await metric(gateway, f"espo_gateway_{name}_total") for name in names]
        live = json.loads(await get_text(gateway.url + "/espo/live"))
    assert counts == [6, 2 * (8 + 16 + 16), 4, 0, 0]
    assert live["totals"]["early_stop"] == 2
    assert live["totals"]["shadow_stops"] == 2
    assert live["totals"]["tokens"] == counts[1]
    assert live["servers"][0]["decides"] is False  # nobody has asked


@pytest.mark.parametrize(
    ("gate", "value"),
    [
        ({"value": "stream", "estimator": ESTIMATOR, "p_star": 0.01}, None),
        ({"value": "constant", "constant": 0.6, "p_star": 0.01}, 0.6),
    ],
)
async def test_the_live_page_shows_no_v_that_was_not_told(gate: Body, value: float | None) -> None:
    given = json.dumps({"rule": "value-only", "version": 3, **gate}).encode()
    async with (
        FakeServer(Script([GOOD] * 6), decides=True) as server,
        gateway_for(server, decide="engine", gate=given) as gateway,
    ):
        await get_text(gateway.url + "/espo/live")  # what has ended is told to who looks
        await post(gateway.url + COMPLETIONS, completion_body())
        [stream] = json.loads(await get_text(gateway.url + "/espo/live"))["ended"]
    assert (stream["cut"], stream["tokens"], stream["value"]) == (None, 6, value)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_is_the_servers_end(stream: bool) -> None:
    """vLLM finds it outside its engine: what that has seen is not told, and the tokens are."""
    script = Script([GOOD] * 6, stop_reason="a")
    async with FakeServer(script, decides=True) as server:
        async with gateway_for(server, decide="engine") as gateway:
            body = completion_body(stop=["a"], stream=stream)
            answer = await answered(gateway.url, COMPLETIONS, body)
            measured = await metric(gateway, "espo_gateway_regret_z_count")
            shadow = completion_body(stop=["a"], espo={"mode": "shadow"})
            await post(gateway.url + COMPLETIONS, shadow)
        [choice] = answer["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "a")
        record = choice["espo"]
        assert (record["stopped"], record["cut"], record["tokens"]) == (False, None, 6)
        assert (record["z"], measured) == (None, 0)
        # Of one that is to be watched beyond its cut the gateway wants to know more.
        assert [bool(ordered(body)) for body in server.bodies] == [True, False]


@pytest.mark.parametrize("decide", ["auto", "gateway", "engine"])
async def test_who_decides_is_found_out_or_told(decide: str) -> None:
    for servers_decide in ([True], [False], [True, False], [True, True]):
        async with AsyncExitStack() as stack:
            servers = [
                await stack.enter_async_context(FakeServer(FAILING, decides=decides))
                for decides in servers_decide
            ]
            gateway = await stack.enter_async_context(gateway_for(*servers, decide=decide))
            await asyncio.gather(
                *(post(gateway.url + COMPLETIONS, completion_body()) for _ in range(4))
            )
        asked = {bool(ordered(body)) for server in servers for body in server.bodies}
        assert asked == {decide == "engine" or (decide == "auto" and all(servers_decide))}


async def test_a_server_that_comes_back_is_asked_again() -> None:
    async with (
        FakeServer(FAILING, decides=True) as server,
        gateway_for(server, health_interval=0.0) as gateway,
    ):
        upstream = gateway.pool.servers[0]
        assert upstream.decides
        server.decides = False
        await gateway.pool.ask_who_decides(10.0)
        assert not upstream.decides
        _, answer = await post(gateway.url + COMPLETIONS, completion_body())
        assert answer["choices"][0]["espo"]["cut"] == 8
        server.decides = True
        await gateway.pool.ask_who_decides(10.0)
        assert upstream.decides
        upstream.checked(False)
        assert not upstream.decides


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("refuse", [False, True])
async def test_a_server_that_does_not_decide_after_all_is_noticed(
    refuse: bool, stream: bool
) -> None:
    settings: Body = {"unmonitored": "refuse"} if refuse else {}
    async with (
        FakeServer(FAILING) as server,
        gateway_for(server, decide="engine", **settings) as gateway,
    ):
        body = completion_body(stream=stream)
        if refuse and not stream:
            status, answer = await post(gateway.url + COMPLETIONS, body)
            assert status == 502
            assert "does not decide" in answer["error"]["message"]
            return
        if refuse:
            last = (await post_stream(gateway.url + COMPLETIONS, body))[-1]
            assert "does not decide" in last["error"]["message"]
            return
        answer = await answered(gateway.url, COMPLETIONS, body)
        record = answer["choices"][0]["espo"]
        assert (record["mode"], record["stopped"], record["cut"]) == ("off", False, None)
        assert "does not decide" in record["reason"]
        assert await metric(gateway, "espo_gateway_unmonitored_requests_total") == 1


async def test_a_fault_in_the_engines_monitor_is_told() -> None:
    def faulty(choice: Body) -> Body:
        told = {"tokens": 16, "fault": "a fault in the engine's monitor: KeyError"}
        choice["choices"][0]["stop_reason"] = "espo:" + json.dumps(told)
        return choice

    script = Script(FAILING.tokens, rewrite=faulty)
    async with FakeServer(script) as server, gateway_for(server, decide="engine") as gateway:
        _, answer = await post(gateway.url + COMPLETIONS, completion_body())
    [choice] = answer["choices"]
    assert choice["stop_reason"] is None
    assert choice["espo"]["reason"] == "a fault in the engine's monitor: KeyError"
    assert choice["espo"]["tokens"] == 16


@pytest.mark.parametrize(
    ("settings", "espo"),
    [
        ({"target_share": 0.1}, {}),
        ({"record": "traces.jsonl"}, {}),
        ({}, {"probe": {"phrase": [1], "answer": [2]}}),
        ({"gate": CRITIC_GATE}, {}),
        ({"gate": json.dumps(ASKING).encode()}, {}),
    ],
    ids=["tuning", "recording", "a probe", "a critic", "an estimate that asks a critic"],
)
async def test_what_only_the_gateway_can_do_it_does(
    settings: Body, espo: Body, tmp_path: Any
) -> None:
    if "record" in settings:
        settings = {"record": tmp_path / settings["record"]}
    async with FakeServer(FAILING, decides=True) as server, FakeCritic(lambda ids: 0.1) as critic:
        if "gate" in settings:
            settings = {**settings, "critic": critic.url}
        async with gateway_for(server, decide="engine", **settings) as gateway:
            body = completion_body(espo=espo, return_token_ids=True)
            status, _ = await post(gateway.url + COMPLETIONS, body)
            assert status == 200
    assert not any(ordered(body) for body in server.bodies)


VALUED = replace(FAILING, values=(3.0,) * 9 + (0.0,) * 7)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_v_of_the_engine_is_a_critics(path: str, stream: bool) -> None:
    async with (
        FakeServer(VALUED, decides=True, values=True) as server,
        gateway_for(server, gate=CRITIC_GATE, critic="engine") as gateway,
    ):
        body = body_of(path, stream=stream)
        if stream and path != TOKENS:
            *_, answer = await post_stream(gateway.url + path, body)
        else:
            _, answer = await post(gateway.url + path, {**body, "stream": False})
    [choice] = answer["choices"]
    # z passes beta times epsilon, 1, at the 8th token; where V is 3 it would have to pass 6.
    assert (choice["espo"]["cut"], choice["espo"]["value"]) == (10, 0.0)
    assert all(ordered(body) for body in server.bodies)


async def test_of_servers_one_of_which_knows_no_v_none_decides() -> None:
    async with (
        FakeServer(VALUED, decides=True, values=True) as one,
        FakeServer(VALUED, decides=True) as other,
        gateway_for(one, other, gate=CRITIC_GATE, critic="engine") as gateway,
    ):
        answers = [await post(gateway.url + COMPLETIONS, completion_body()) for _ in range(4)]
        # Without V nothing stops; nobody's request fails.
        assert [answer["choices"][0]["espo"]["cut"] for _, answer in answers] == [None] * 4
        other.values = True
        await gateway.pool.ask_who_decides(10.0)
        _, answer = await post(gateway.url + COMPLETIONS, completion_body())
        assert answer["choices"][0]["espo"]["cut"] == 10


async def test_a_stream_without_the_engines_v_is_not_held_back() -> None:
    async with (
        FakeServer(VALUED, gated=True, decides=True) as server,
        gateway_for(server, gate=CRITIC_GATE, critic="engine") as gateway,
        aiohttp.ClientSession() as client,
    ):
        server.release(12)  # before the request: its status comes with the first token
        url, body = gateway.url + COMPLETIONS, completion_body(stream=True)
        async with asyncio.timeout(30), client.post(url, json=body) as response:
            # The gate asks from the 8th token on, and nobody answers.
            tokens = 0
            while tokens < 10:
                tokens += (await response.content.readline()).startswith(b"data: ")
            server.release(4)
            assert (await response.content.read()).endswith(b"data: [DONE]\n\n")


async def test_a_share_is_recorded_and_the_gateway_decides_of_that(tmp_path: Any) -> None:
    path = tmp_path / "traces.jsonl"
    async with FakeServer(FAILING, decides=True) as server:
        settings = {"record": path, "record_share": 0.5, "decide": "engine"}
        async with gateway_for(server, **settings) as gateway:
            _, answer = await post(gateway.url + COMPLETIONS, completion_body(n=64))
        assert {choice["espo"]["cut"] for choice in answer["choices"]} == {8}
        assert {choice["text"] for choice in answer["choices"]} == {"aaaaaabb"}
    recorded = len(path.read_text().splitlines())
    by_gateway = sum(not ordered(body) for body in server.bodies)
    assert 0 < recorded == by_gateway < 64


@pytest.mark.parametrize("stream", [False, True])
async def test_a_departure_ends_the_generation(stream: bool) -> None:
    async with (
        FakeServer(LONG, gated=True, decides=True) as server,
        gateway_for(server, decide="engine") as gateway,
    ):
        body = completion_body(stream=stream, max_tokens=10_000, espo={"beta": 99.0})
        request = asyncio.ensure_future(post(gateway.url + COMPLETIONS, body))
        await until_running(server, 1)
        assert len(gateway.sessions) == 1
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await server.until(lambda: server.aborted == 1)
        assert await metric(gateway, "espo_gateway_choices_total") == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 500])
async def test_a_refusal_is_handed_on(status: int, stream: bool) -> None:
    async with (
        FakeServer(Script([BAD], status=status), decides=True) as server,
        gateway_for(server, decide="engine") as gateway,
    ):
        found, answer = await post(gateway.url + COMPLETIONS, completion_body(stream=stream))
    assert found == status
    assert answer["error"]["message"] == "as scripted"


@pytest.mark.parametrize("fault", ["reset", "garbage", "half"])
async def test_a_broken_whole_answer_is_an_error(fault: Any) -> None:
    async with (
        FakeServer(Script([GOOD] * 5, fault=fault, after=2), decides=True) as server,
        gateway_for(server, decide="engine", attempts=1) as gateway,
    ):
        status, _ = await post(gateway.url + COMPLETIONS, completion_body())
    assert status in (502, 503)


async def test_the_route_is_not_the_gateways_own() -> None:
    """A gateway before a gateway does not take it for a server that decides."""
    async with (
        FakeServer(FAILING, decides=True) as server,
        gateway_for(server) as inner,
        gateway_for(inner, gate=GATE) as outer,
    ):
        assert not outer.pool.decides
        assert ROUTE not in inner.url


@pytest.mark.parametrize("stream", [False, True])
async def test_weights_that_come_meanwhile_are_not_those_that_it_began_with(stream: bool) -> None:
    async with (
        FakeServer(FAILING, gated=True, decides=True) as server,
        gateway_for(server, gate=GATE, decide="engine") as gateway,
    ):
        body = completion_body(stream=stream)
        asked = asyncio.ensure_future(answered(gateway.url, COMPLETIONS, body))
        await until_running(server, 1)
        [session] = gateway.sessions
        began = gateway.gate.weights_version
        gateway.push_gate(gate_to_json(replace(gateway.gate, weights_version="newer")))
        server.release(1000)
        await asked
        record = session.record
    assert (record.weights_version, record.weights_changes) == (began, None)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_server_says_whose_weights_the_tokens_are_of(
    stream: bool, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where weights have names: a server that nobody has given any calls them "default"."""
    unaware = Monitor.stop_reason

    def aware(self: Monitor, own: int | str | None, tokens: int) -> int | str | None:
        told = told_by(unaware(self, own, tokens))
        assert told is not None
        told.weights = [(0, "old"), (2, "new")]
        return stop_reason_of(told)

    monkeypatch.setattr(Monitor, "stop_reason", aware)
    gate = json.loads(GATE) | {"weights_version": "newest" if named else ""}
    async with (
        FakeServer(FAILING, decides=True) as server,
        gateway_for(server, gate=json.dumps(gate).encode(), decide="engine") as gateway,
    ):
        answer = await answered(gateway.url, COMPLETIONS, completion_body(stream=stream))
    [choice] = answer["choices"]
    record = choice["espo"]
    if named:
        assert (record["weights_version"], record["weights_changes"]) == ("old", [[2, "new"]])
    else:
        assert record["weights_version"] == ""
        assert "weights_changes" not in record
