"""A run proves at its start that its servers sample from the trainer's policy."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from espo_gateway.testing import FakeServer, Script, Token
from espo_rl.config import Recipe
from espo_rl.rollouts.collector import Prompter
from espo_rl.servers.served_models import PROOF_ROLLOUTS, PROOF_TOKENS, ServedModels
from espo_rl.servers.server import ServerError
from espo_rl.types import Problem

LOGITS = torch.linspace(0.0, 4.0, 50)
PROBLEMS = [Problem(f"p{number}", str(number), "1") for number in range(3)]


class Characters:
    """Stands for a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) % 50 for character in text]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        raise AssertionError

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        raise AssertionError


class Trainer:
    """Says the same at every place."""

    def response_logits(self, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
        return LOGITS.expand(len(response), -1)


class Fleet:
    model, critic = "fake", None

    def __init__(self, *urls: str) -> None:
        self.policy_urls = list(urls)
        self.counted = 0

    async def new_tokens(self) -> int:
        self.counted += 1
        return 0


def sampling(logits: torch.Tensor, reported: torch.Tensor | None = None) -> Any:
    """A server that samples from these logits, and reports logprobs of those."""
    chances = torch.softmax(logits.double(), 0).numpy()
    logprobs = torch.log_softmax(LOGITS if reported is None else reported, 0)

    def script(body: dict[str, Any]) -> Script:
        rng = np.random.default_rng(body["seed"])
        ids = rng.choice(len(chances), size=body["max_tokens"], p=chances / chances.sum())
        return Script([Token("a", float(logprobs[i]), -0.1, int(i)) for i in ids])

    return script


def served(
    fleet: Fleet, said: list[str], temperature: float = 1.0, mode: str = "raw_logprobs"
) -> ServedModels:
    recipe = Recipe.model_validate(
        {
            "model": {"path": "x"},
            "rollout": {"temperature": temperature, "retries": 1},
            "servers": {"logprobs_mode": mode},
        }
    )
    stubs: Any = SimpleNamespace(fleet=fleet, trainer=Trainer())
    return ServedModels(
        recipe,
        stubs.fleet,
        stubs.trainer,
        asyncio.Lock(),
        [],
        say=said.append,
        on_restart=lambda: None,
    )


PROMPTER = Prompter(Characters(), chat=False)


@pytest.mark.parametrize("temperature", [1.0, 1.25])
async def test_a_server_that_does_says_so(temperature: float) -> None:
    said: list[str] = []
    async with (
        FakeServer(sampling(LOGITS / temperature)) as one,
        FakeServer(sampling(LOGITS / temperature)) as other,
    ):
        fleet = Fleet(one.url, other.url)
        async with served(fleet, said, temperature) as models:
            await models.prove_sampling(PROBLEMS, PROMPTER)
        for server in (one, other):
            assert len(server.bodies) == PROOF_ROLLOUTS
            assert {body["max_tokens"] for body in server.bodies} == {PROOF_TOKENS}
            assert {body["temperature"] for body in server.bodies} == {temperature}
    assert [
        f"{url} samples from the trainer's policy" in line
        for url, line in zip(fleet.policy_urls, said, strict=True)
    ] == [True, True]
    assert fleet.counted == 1  # what was sampled for it is of no step


@pytest.mark.parametrize(
    ("logits", "named"),
    [
        (torch.where(LOGITS[-10] <= LOGITS, LOGITS, -torch.inf), "top_k of about 10"),
        (LOGITS / 0.7, "lower temperature"),
    ],
)
async def test_one_of_several_that_does_not_is_named_with_the_setting(
    logits: torch.Tensor, named: str
) -> None:
    async with FakeServer(sampling(LOGITS)) as good, FakeServer(sampling(logits)) as bad:
        async with served(Fleet(good.url, bad.url), []) as models:
            with pytest.raises(ServerError, match=named) as error:
                await models.prove_sampling(PROBLEMS, PROMPTER)
        assert bad.url in str(error.value)
        assert good.url not in str(error.value)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
async def test_logprobs_of_the_other_mode_are_named(mode: str) -> None:
    warm = LOGITS / 1.5
    wrong = warm if mode == "raw_logprobs" else LOGITS
    async with (
        FakeServer(sampling(warm, wrong)) as server,
        served(Fleet(server.url), [], 1.5, mode=mode) as models,
    ):
        with pytest.raises(ServerError, match=rf"servers\.logprobs_mode = '{mode}'"):
            await models.prove_sampling(PROBLEMS, PROMPTER)


async def test_a_server_that_cannot_be_asked_is_a_fault() -> None:
    async with served(Fleet("http://127.0.0.1:9"), []) as models:
        with pytest.raises(ServerError, match="cannot be asked"):
            await models.prove_sampling(PROBLEMS, PROMPTER)


async def test_what_is_under_way_is_given_up_before_a_server_is_started_anew() -> None:
    """Else it would be asked again of a server with the weights that it starts with."""
    happened: list[str] = []
    down = [SimpleNamespace(name="policy server")]

    async def restart(server: Any, say: Any) -> None:
        happened.append("restart")

    async def fallen() -> list[Any]:
        return down

    async def on_fall() -> None:
        happened.append("fall")

    fleet: Any = SimpleNamespace(policy_urls=[], critic=None, down=fallen, restart=restart)
    trainer: Any = Trainer()
    models = ServedModels(
        Recipe.model_validate({"model": {"path": "x"}}),
        fleet,
        trainer,
        asyncio.Lock(),
        [],
        say=lambda text: None,
        on_restart=lambda: happened.append("restarted"),
        on_fall=on_fall,
    )
    assert await models.heal("it died")
    assert happened == ["fall", "restart", "restarted"]
    down.clear()
    assert not await models.heal("nothing has")
    assert len(happened) == 3
