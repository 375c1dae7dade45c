"""A real vLLM decides by itself, as the gateway does: token for token, for any client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from espo_gateway.stop.estimate import FEATURES
from espo_gateway.stop.gate_json import gate_from_json
from espo_gateway.stop.tracks import token_confidence
from espo_gateway.stop.watch import Watch
from espo_gateway.vllm_plugin.wire import ROUTE, told_by
from tests.helpers.gateway import gateway_for, get_text, metric, post, post_stream
from tests.helpers.models import random_model
from tests.helpers.vllm import (
    BASE_SEED,
    CHAT,
    COMPLETIONS,
    STRICT,
    VllmServer,
    body_for,
    generated,
    publish,
    serve,
    settled,
)

pytestmark = pytest.mark.vllm

LENGTH = 200


async def test_the_server_says_that_it_decides(vllm_server: VllmServer) -> None:
    assert json.loads(await get_text(vllm_server.url + ROUTE))["decides"] is True


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_any_client_can_have_its_request_stopped(vllm_server: VllmServer, path: str) -> None:
    order: dict[str, Any] = {"espo_gate": STRICT.decode()}
    fields = {"max_tokens": LENGTH, "temperature": 1.0, "ignore_eos": True, "n": 8, "seed": 3}
    body = body_for(vllm_server, path, return_token_ids=True, **fields)
    before = await settled(vllm_server)
    _, stopped = await post(vllm_server.url + path, {**body, "vllm_xargs": order})
    spent = await settled(vllm_server) - before - 1
    order |= {"espo_mode": "shadow", "espo_record": 1}
    _, whole = await post(vllm_server.url + path, {**body, "vllm_xargs": order})
    kept = 0
    for one, other in zip(stopped["choices"], whole["choices"], strict=True):
        told = told_by(other["stop_reason"])
        assert told is not None
        assert told.tokens == LENGTH
        assert one["token_ids"] == other["token_ids"][: told.cut]
        assert (one["finish_reason"], one["stop_reason"]) == ("length", "espo")
        assert one["logprobs"] is None
        kept += len(one["token_ids"])
    assert kept == stopped["usage"]["completion_tokens"] < 8 * LENGTH / 2
    # One token at most of each is sampled in vain, and vLLM's counter is of those that count.
    assert spent == kept


@pytest.mark.parametrize(
    ("orders", "said"),
    [
        ({"espo_gate": "{"}, "espo_gate: not valid JSON"),
        ({"espo_gate": '{"rule": "regretonly"}'}, "espo_gate: rule:"),
        ({"espo_gate": '{"bta": 1}'}, "did you mean beta?"),
        ({"espo_gate": '{"rule": "confidence", "confidence_top_k": 30}'}, "confidence_top_k is 30"),
        ({"espo_gate": STRICT.decode(), "espo_mode": "x"}, "espo_mode: must be one of"),
        ({"espo_gate": STRICT.decode(), "espo_moed": "x"}, "did you mean espo_mode?"),
    ],
)
async def test_a_wrong_order_is_a_400(
    vllm_server: VllmServer, orders: dict[str, Any], said: str
) -> None:
    body = body_for(vllm_server, COMPLETIONS, max_tokens=4, vllm_xargs=orders)
    status, answer = await post(vllm_server.url + COMPLETIONS, body)
    assert status == 400
    assert said in answer["error"]["message"]
    assert answer["error"]["param"] == f"vllm_xargs.{said.split(':')[0]}" or " " in said


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_stop_string_on_the_decision_token_is_vllms_end(
    vllm_server: VllmServer, path: str
) -> None:
    gate = json.dumps({"rule": "random", "hazard": 1.0, "min_tokens": 6})

    async def choice(seed: int, **fields: Any) -> dict[str, Any]:
        body = body_for(vllm_server, path, seed=seed, max_tokens=30, temperature=1.0, **fields)
        return (await post(vllm_server.url + path, body))[1]["choices"][0]

    plain = {"return_token_ids": True, "ignore_eos": True, "vllm_xargs": {"espo_gate": gate}}
    cuts = await asyncio.gather(*(choice(seed, **plain) for seed in range(8)))
    for seed, cut in enumerate(cuts):
        assert len(cut["token_ids"]) == 6
        text = cut["text"] if path == COMPLETIONS else cut["message"]["content"]
        if not text or text[-1] in text[:-1]:
            continue
        ended = await choice(seed, stop=[text[-1]], **plain)
        assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", text[-1])


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"regex": "[0-9]{3,40}"}},
        {"structured_outputs": {"regex": "[0-9]{3,40}"}, "n": 3},
        {"min_tokens": 20},
        {"repetition_penalty": 1.5, "top_k": 5, "min_p": 0.01},
        {"logit_bias": {"9": 3.0}},
    ],
    ids=["structured", "structured, n=3", "min_tokens", "penalties", "biased"],
)
async def test_whatever_else_is_asked_for(
    vllm_server: VllmServer, fields: dict[str, Any], stream: bool, path: str
) -> None:
    """vLLM's `min_tokens` is about its own ends, as behind a gateway."""
    gate = json.dumps({"rule": "random", "hazard": 1.0, "min_tokens": 5})
    order = {"espo_gate": gate, "espo_record": 1}
    body = body_for(vllm_server, path, max_tokens=60, vllm_xargs=order, seed=1, **fields)
    body |= {"stream": stream, "ignore_eos": True, "temperature": 1.0}
    if stream:
        chunks = await post_stream(vllm_server.url + path, body)
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
    else:
        choices = (await post(vllm_server.url + path, body))[1]["choices"]
    ended = [choice for choice in choices if choice["finish_reason"]]
    assert len(ended) == fields.get("n", 1)
    for choice in ended:
        told = told_by(choice["stop_reason"])
        assert told is not None
        assert (told.cut, told.tokens, choice["finish_reason"]) == (5, 5, "length")


ESTIMATOR = {"weights": [0.0, -0.15, *[-0.1] * (len(FEATURES) - 3), -0.01], "bias": 3.0}
GATES: dict[str, dict[str, Any]] = {
    "value-gated": {"beta": 1.8, "constant": 0.5},
    "regret-only": {"beta": 0.9},
    "success-probability": {"estimator": ESTIMATOR, "p_star": 0.3},
    "surprise": {"beta": 2.0},
    "confidence": {"confidence": 2.65, "confidence_window": 16, "confidence_top_k": 8},
    "random": {"hazard": 0.02},
}
#: By rule; in all at least 500.
ROLLOUTS = 90


@pytest.mark.parametrize("rule", GATES)
async def test_the_same_cut_on_both_sides_under_load(vllm_server: VllmServer, rule: str) -> None:
    """The engine's is what the watch makes of the very numbers that the client was sent."""
    gate = json.dumps({"rule": rule, **GATES[rule]}).encode()

    async def side(decide: str) -> list[dict[str, Any]]:
        async with gateway_for(vllm_server, gate=gate, decide=decide) as gateway:

            async def choice(seed: int) -> dict[str, Any]:
                fields = {"max_tokens": 96, "temperature": 1.0, "seed": seed, "logprobs": 8}
                body = body_for(vllm_server, COMPLETIONS, return_token_ids=True, **fields)
                return (await post(gateway.url + COMPLETIONS, body))[1]["choices"][0]

            choices = await asyncio.gather(*map(choice, range(ROLLOUTS)))
            if decide == "engine":
                assert await metric(gateway, "espo_gateway_overshoot_tokens_total") == 0
        return choices

    by_engine, by_gateway = await asyncio.gather(side("engine"), side("gateway"))
    assert len({check_cut(choice, rule) for choice in by_engine}) > 3
    same = 0
    for one, other in zip(by_engine, by_gateway, strict=True):
        found, expected = one["espo"], other["espo"]
        if found["cut"] != expected["cut"]:
            # In other company a logprob has other last bits, and a z at its threshold another side.
            length = min(len(one["token_ids"]), len(other["token_ids"]))
            assert one["token_ids"][:length] == other["token_ids"][:length]
            continue
        same += 1
        assert one["token_ids"] == other["token_ids"]
        for name in ("finish_reason", "stop_reason"):
            assert one[name] == other[name]
        assert found["z"] == pytest.approx(expected["z"], abs=1e-3)
    # The draws of "random" are of these bits, which on a GPU often differ.
    alike = 0.3 if rule == "random" and torch.cuda.is_available() else 0.97
    assert same >= alike * ROLLOUTS


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            ("--data-parallel-size", "2"),
            marks=pytest.mark.skipif(torch.cuda.device_count() == 1, reason="takes two GPUs"),
            id="two engines",
        ),
        pytest.param(
            (
                "--speculative-config",
                json.dumps(
                    {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
                ),
            ),
            id="speculative decoding",
        ),
    ],
)
async def test_in_another_setup_of_the_engine(tmp_path: Path, flags: tuple[str, ...]) -> None:
    server = await serve(tmp_path, *flags)
    try:
        for rule in ("regret-only", "success-probability", "confidence"):
            gate = json.dumps({"rule": rule, **GATES[rule]}).encode()
            async with gateway_for(server, gate=gate) as gateway:
                fields = {"max_tokens": 96, "temperature": 0.7, "n": 32, "logprobs": 8}
                body = body_for(server, COMPLETIONS, return_token_ids=True, seed=5, **fields)
                _, answer = await post(gateway.url + COMPLETIONS, body)
                assert await metric(gateway, "espo_gateway_overshoot_tokens_total") == 0
            # Of a completion's choices the first alone tells the prompt's ids.
            ids = answer["choices"][0]["prompt_token_ids"]
            cuts = [
                check_cut({**choice, "prompt_token_ids": ids}, rule) for choice in answer["choices"]
            ]
            assert len(set(cuts)) > 3
    finally:
        await server.process.stop()


def check_cut(choice: dict[str, Any], rule: str) -> int | None:
    """By a replay of the logprobs in the answer, to the last bit."""
    gate = gate_from_json(json.dumps({"rule": rule, **GATES[rule]}).encode(), has_critic=False)
    record, logprobs = choice["espo"], choice["logprobs"]
    prompt_tokens = len(choice["prompt_token_ids"])
    watch, k = Watch(gate, prompt_tokens), gate.top_logprobs
    count = len(choice["token_ids"])
    for n, (sampled, top) in enumerate(
        zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True), 1
    ):
        assert watch.cut is None
        confidence = token_confidence([*top.values()], k) if k > 1 else None
        last = n == count and choice["finish_reason"] == "stop"
        watch.push(sampled, max(sampled, *top.values()), last=last, confidence=confidence)
    assert watch.cut == record["cut"] == (count if record["stopped"] else None)
    assert (watch.z, watch.threshold, watch.value, watch.missing) == (
        *(record["z"], record["threshold"], record["value"], record["missing"]),
    )
    assert record["tokens"] == count
    return record["cut"]


async def test_new_weights_on_the_way(vllm_server: VllmServer) -> None:
    """A pause and a reload cost the monitor no token."""
    order = {"espo_gate": json.dumps({"rule": "regret-only", "beta": 1e9}), "espo_record": 1}
    fields = {"max_tokens": 480, "ignore_eos": True, "n": 64, "vllm_xargs": order}
    body = body_for(vllm_server, COMPLETIONS, **fields)
    before = await settled(vllm_server)
    request = asyncio.ensure_future(post(vllm_server.url + COMPLETIONS, body))
    while await generated(vllm_server) == before:
        pass
    try:
        running = not request.done()
        await publish(vllm_server, random_model(BASE_SEED + 1), "other")
        _, answer = await request
    finally:
        await publish(vllm_server, random_model(BASE_SEED), "base")
    assert running
    for choice in answer["choices"]:
        told = told_by(choice["stop_reason"])
        assert told is not None
        assert (told.tokens, told.missing, told.fault) == (480, 0, None)
