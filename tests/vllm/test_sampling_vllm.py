"""A checkpoint's own sampling defaults do not reach rollouts, whoever started the server.

The trainer is a model of transformers here: it is asked for logits alone.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from espo_rl.config import Recipe
from espo_rl.rollouts import collector
from espo_rl.rollouts.collector import Prompter
from espo_rl.servers.served_models import ServedModels
from espo_rl.servers.server import ServerError
from espo_rl.tasks.arithmetic import Arithmetic
from tests.helpers.models import random_checkpoint
from tests.helpers.vllm import BASE_SEED, VllmServer, launch

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

DEFAULTS = {"top_k": 5, "min_p": 0.02, "repetition_penalty": 1.4, "top_p": 0.9, "temperature": 0.5}


@pytest.fixture(scope="module")
async def opinionated(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmServer]:
    path = random_checkpoint(tmp_path_factory.mktemp("vllm") / "checkpoint", BASE_SEED)
    (path / "generation_config.json").write_text(json.dumps(DEFAULTS))
    server = await launch(path, "--generation-config", "auto")
    yield server
    await server.process.stop()


class Trainer:
    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()

    @torch.no_grad()
    def response_logits(self, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
        logits = self.model(torch.tensor([[*prompt, *response]])).logits[0]
        return torch.as_tensor(logits[len(prompt) - 1 : -1])


async def proven(server: VllmServer, temperature: float = 1.0) -> list[str]:
    async def new_tokens() -> int:
        return 0

    fleet: Any = SimpleNamespace(
        policy_urls=[server.url], model=server.model, critic=None, new_tokens=new_tokens
    )
    trainer: Any = Trainer(server.path)
    said: list[str] = []
    recipe = {"model": {"path": str(server.path)}, "rollout": {"temperature": temperature}}
    served = ServedModels(
        Recipe.model_validate(recipe),
        fleet,
        trainer,
        asyncio.Lock(),
        [],
        say=said.append,
        on_restart=lambda: None,
    )
    tokenizer = AutoTokenizer.from_pretrained(server.path)
    async with served:
        await served.prove_sampling(Arithmetic().held_out(64), Prompter(tokenizer))
    return said


@pytest.mark.parametrize("temperature", [1.0, 1.25])
async def test_rollouts_are_of_the_policy_whatever_the_checkpoint_says(
    opinionated: VllmServer, temperature: float
) -> None:
    (said,) = await proven(opinionated, temperature)
    assert "samples from the trainer's policy" in said


@pytest.mark.parametrize("left_out", ["top_k", "repetition_penalty"])
async def test_what_a_request_does_not_say_is_found_out(
    opinionated: VllmServer, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    """The proof can fail: here the server's own default comes through."""
    asked = {name: value for name, value in collector.WHOLE_POLICY.items() if name != left_out}
    monkeypatch.setattr(collector, "WHOLE_POLICY", asked)
    with pytest.raises(ServerError, match=left_out):
        await proven(opinionated)
