"""TRL trains through the gateway: on policy, and a stop is a failure."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.trl.train import Rollouts, trainer_for
from trl import GRPOTrainer
from trl.generation.vllm_client import VLLMClient

from espo_gateway.vllm_plugin.client import WeightClient
from tests.helpers.gateway import gateway_for, metric
from tests.helpers.models import logprobs
from tests.helpers.vllm import VllmServer, rounded

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

STEPS, BATCH = 3, 16
#: 12+34= in the tokenizer's ids
IDS = [5, 6, 7, 8]
#: Stops some of a random policy's rollouts, and leaves some.
GATE = json.dumps({"rule": "regret-only", "beta": 1.5}).encode()


class Watched(Rollouts):
    """Keeps what it gave TRL, and how far from the trainer's own policy it was sampled."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.given: list[dict[str, list[Any]]] = []
        self.differences: list[float] = []
        self.weights: list[torch.Tensor] = []

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        given = super().__call__(prompts, trainer)
        self.given.append(given)
        self.weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        rows = zip(given["prompt_ids"], given["completion_ids"], given["logprobs"], strict=True)
        for prompt, sampled, told in rows:
            own = logprobs(trainer.model, [*prompt, *sampled])[len(prompt) - 1 :]
            pairs = zip(own, told, strict=True)
            self.differences.append(max(abs(a - b) for a, b in pairs))
        return given


async def test_trl_trains_through_the_gateway(vllm_server: VllmServer, tmp_path: Path) -> None:
    def train() -> tuple[Watched, list[dict[str, Any]]]:
        rollouts = Watched(gateway.url, vllm_server.url, {"min_tokens": 8})
        trainer = trainer_for(
            *(str(vllm_server.path), rollouts, tmp_path),
            steps=STEPS,
            use_cpu=True,
            bf16=False,  # TRL's default, whose rounding would hide whether the policies are equal
            learning_rate=1e-4,
        )
        trainer.train()
        return rollouts, trainer.state.log_history

    async with gateway_for(vllm_server, gate=GATE) as gateway:
        rollouts, history = await asyncio.to_thread(train)
        stops = await metric(gateway, "espo_gateway_stops_total")

    assert [len(given["completion_ids"]) for given in rollouts.given] == [BATCH] * STEPS
    for step, given in enumerate(rollouts.given):
        found = given["outcome"]
        assert [outcome.index for outcome in found] == [*range(BATCH)]
        assert [outcome.tokens for outcome in found] == [*map(len, given["completion_ids"])]
        stopped = sum(outcome.end == "early_stop" for outcome in found)
        # A random policy adds no numbers, so what was not stopped has 0.
        assert history[step]["reward"] == pytest.approx(-stopped / BATCH)
    ends = [outcome.end for given in rollouts.given for outcome in given["outcome"]]
    assert stops == ends.count("early_stop")
    assert {"early_stop", "completed"} <= set(ends)

    # On policy: each step trained, and the next was sampled with what came of it.
    assert max(rollouts.differences) < 1e-3
    for before, after in zip(rollouts.weights[:-1], rollouts.weights[1:], strict=True):
        assert (before - after).abs().max() > 1e-6
    async with WeightClient(vllm_server.url) as client:
        assert await client.weight_version() == str(STEPS - 1)


async def test_trls_own_client_samples_the_same(vllm_server: VllmServer) -> None:
    def sampled(url: str) -> Any:
        client = VLLMClient(base_url=url)
        seed = {"seed": 7}
        return client.generate([IDS, [9, 10]], n=2, max_tokens=12, generation_kwargs=seed)

    async with gateway_for(vllm_server, gate=None) as gateway:
        direct, through = [
            await asyncio.to_thread(sampled, url) for url in (vllm_server.url, gateway.url)
        ]
        assert {name: rounded(value) for name, value in direct.items()} == through
        # But it would change the weights by the same address, which is no client's to do.
        with pytest.raises(RuntimeError, match="does not expose its development endpoints"):
            await asyncio.to_thread(lambda: VLLMClient(base_url=gateway.url).init_communicator())
