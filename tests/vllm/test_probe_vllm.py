"""The answer probe on a real vLLM: what it says is the policy's own likelihood of the answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from espo_gateway.stop.gate_json import gate_to_json
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import Schedule
from tests.helpers.gateway import COMPLETIONS, gateway_for, post
from tests.helpers.models import random_model
from tests.helpers.vllm import BASE_SEED, VllmServer, body_for, publish

pytestmark = pytest.mark.vllm

PROMPT, PHRASE = [3, 4, 5, 6], [7, 8]


def logprobs_after(model: PreTrainedModel, prefix: list[int], answer: list[int]) -> Tensor:
    """log π of each token of the answer and of all others, [answer, vocabulary]."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([[*prefix, *answer]])).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)[len(prefix) - 1 : -1]


async def test_it_is_the_models_likelihood_up_to_where_it_says_another_thing(
    vllm_server: VllmServer,
) -> None:
    gate = gate_to_json(Gate(schedule=Schedule(every=5, growth=0.0)))
    # Other tests leave weights of their own.
    model = random_model(BASE_SEED)
    await publish(vllm_server, model, version="base")
    said: Any = model.generate(
        torch.tensor([[*PROMPT, *PHRASE]]), max_new_tokens=2, do_sample=False, min_new_tokens=2
    )
    # Its own word first, and then another than its own.
    own = said[0, -2:].tolist()
    answer = [own[0], 9 if own[1] != 9 else 10, 11]
    body = body_for(
        vllm_server,
        COMPLETIONS,
        prompt=PROMPT,
        max_tokens=24,
        ignore_eos=True,
        seed=3,
        return_token_ids=True,
        espo={"probe": {"phrase": PHRASE, "answer": answer}},
    )
    async with gateway_for(vllm_server, gate=gate) as gateway:
        status, whole = await post(gateway.url + COMPLETIONS, body)
    assert status == 200, whole
    choice = whole["choices"][0]
    probes = choice["espo"]["probes"]
    assert [probe[0] for probe in probes] == [5, 10, 15, 20]
    for token, first, likelihood, best in probes:
        prefix = [*PROMPT, *choice["token_ids"][:token], *PHRASE]
        rows = logprobs_after(model, prefix, answer)
        wanted = rows[range(len(answer)), answer].tolist()
        ends = (i for i, row in enumerate(rows) if int(row.argmax()) != answer[i])
        until = next(ends, len(answer) - 1) + 1
        assert best == pytest.approx(float(rows[0].max()), abs=1e-3)
        assert first == pytest.approx(wanted[0], abs=1e-3)
        assert likelihood == pytest.approx(max(sum(wanted[:until]), -20.0), abs=1e-3)


async def test_who_shares_its_steps_with_a_question_still_gets_the_largest_logprobs(
    vllm_server: VllmServer,
) -> None:
    """vLLM's V1 sampler alone gives it padding, and a regret of 0 whatever was sampled."""
    await publish(vllm_server, random_model(BASE_SEED), version="base")
    url = vllm_server.url + COMPLETIONS
    common = {"prompt": PROMPT, "max_tokens": 48, "ignore_eos": True, "seed": 3, "logprobs": 1}
    stream = body_for(vllm_server, COMPLETIONS, **common)
    question = body_for(vllm_server, COMPLETIONS, **common, logprob_token_ids=[5, 6, 7])
    alone = await post(url, stream)
    beside = (await asyncio.gather(post(url, stream), post(url, question)))[0]
    tops, expected = (
        answer["choices"][0]["logprobs"]["top_logprobs"] for _, answer in (beside, alone)
    )
    assert [max(top.values()) for top in tops] == pytest.approx(
        [max(top.values()) for top in expected], abs=1e-3
    )
