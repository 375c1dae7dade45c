"""A real vLLM decides by itself, as the gateway does: token for token, for any client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from espo_gateway.vllm_plugin.wire import ROUTE, told_by
from tests.helpers.gateway import get_text, post
from tests.helpers.vllm import (
    CHAT,
    COMPLETIONS,
    STRICT,
    VllmServer,
    body_for,
    settled,
)

pytestmark = pytest.mark.vllm

LENGTH = 200


async def test_the_server_says_that_it_decides(vllm_server: VllmServer) -> None:
    assert json.loads(await get_text(vllm_server.url + ROUTE))["decides"] is True


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_any_client_can_have_its_request_stopped(vllm_server: VllmServer, path: str) -> None:
    order = {"espo_gate": STRICT.decode()}
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
