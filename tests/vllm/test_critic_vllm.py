"""A critic on a real vLLM, on CPU: its values, its weights, and the stops that it decides."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import PreTrainedModel

from espo_gateway.app import running
from espo_gateway.config import Config
from espo_gateway.critic.server import CriticServer
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.watch import Verdict, Watch
from espo_gateway.vllm_plugin.client import WeightClient, WeightRouteError
from espo_rl.base_model.train import make_tokenizer
from espo_rl.ppo.parameters import TensorSpec, gathered
from espo_rl.ppo.trainer import Critic
from espo_rl.servers.weights import WeightParityError, WeightPublisher
from tests.helpers.gateway import metric, post
from tests.helpers.models import PROBE, random_critic, random_model, values
from tests.helpers.vllm import BASE_SEED, VllmServer, launch, publish

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def critic_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmServer]:
    """A critic's server, started as a run does: its weights come with the first update.

    They may change between tests.
    """
    path = tmp_path_factory.mktemp("critic") / "config"
    critic = random_critic(BASE_SEED)
    critic.config.architectures = ["Qwen2ForCausalLM"]  # what a critic made from a policy has
    critic.config.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    server = await launch(path, "--critic", "--load-format", "dummy", name="critic")
    await publish(server, critic, version="base")
    yield server
    await server.process.stop()


async def verify(server: VllmServer, critic: PreTrainedModel, version: str) -> float:
    async with WeightPublisher([server.url]) as publisher:
        return await publisher.verify_values(
            PROBE, values(critic, PROBE), version=version, tolerance=TOLERANCE
        )


# -- weights -----------------------------------------------------------------------------------


async def test_its_values_are_the_trainers(critic_server: VllmServer) -> None:
    critic = random_critic(BASE_SEED)
    await publish(critic_server, critic, version="base")
    with torch.no_grad():
        trained = Critic(critic)(torch.tensor([PROBE]))[0].tolist()
    assert trained == pytest.approx(values(critic, PROBE), abs=1e-6)
    # Scores beyond what a sigmoid could give: they are raw.
    assert min(trained) < -1.0 < 1.0 < max(trained)
    await verify(critic_server, critic, version="base")


async def test_the_servers_weights_follow_the_critic(critic_server: VllmServer) -> None:
    # Twice: the reload after a reload is another path through vLLM.
    for seed in (31, 32):
        await publish(critic_server, random_critic(seed), version=f"critic-{seed}")
        await verify(critic_server, random_critic(seed), version=f"critic-{seed}")


@pytest.mark.parametrize(
    "name",
    ["score.weight", "model.embed_tokens.weight", "model.norm.weight"],
)
async def test_one_changed_tensor_is_seen_and_then_served(
    critic_server: VllmServer, name: str
) -> None:
    """vLLM keeps packed copies of some: none may be left from before."""
    critic = random_critic(33)
    await publish(critic_server, critic, version="before")
    with torch.no_grad():
        critic.get_parameter(name).mul_(1.5)
    with pytest.raises(WeightParityError, match="a value of the probe differs by"):
        await verify(critic_server, critic, version="before")
    await publish(critic_server, critic, version="after")
    await verify(critic_server, critic, version="after")
    with pytest.raises(WeightParityError, match="version 'after', not 'later'"):
        await verify(critic_server, critic, version="later")


async def test_a_head_of_zeros_can_be_served_and_left_again(critic_server: VllmServer) -> None:
    """So does a run begin whose critic is the policy with a new head."""
    critic = random_critic(34)
    with torch.no_grad():
        critic.score.weight.zero_()
    await publish(critic_server, critic, version="zero")
    async with WeightClient(critic_server.url) as client:
        assert await client.values([PROBE, PROBE[:3]]) == [0.0, 0.0]
    await publish(critic_server, random_critic(34), version="34")
    await verify(critic_server, random_critic(34), version="34")


@pytest.mark.parametrize("flaw", ["no head", "a policy's", "two labels"])
async def test_flawed_weights_are_refused_and_the_critic_serves_on(
    critic_server: VllmServer, flaw: str
) -> None:
    await publish(critic_server, random_critic(35), version="good")
    tensors = dict(gathered(random_critic(36)))
    if flaw == "no head":
        del tensors["score.weight"]
        reason = "missing score.weight"
    elif flaw == "a policy's":
        tensors = dict(gathered(random_model(36)))
        reason = "missing score.weight"
    else:
        tensors["score.weight"] = tensors["score.weight"].repeat(2, 1)
        reason = r"score.weight has shape \[2, 128\], not \[1, 128\]"
    specs = [TensorSpec(name, x.dtype, tuple(x.shape)) for name, x in tensors.items()]
    async with WeightPublisher([critic_server.url]) as publisher:
        with pytest.raises(WeightRouteError, match=reason):
            await publisher.publish(specs, tensors.items(), version="bad")
    await verify(critic_server, random_critic(35), version="good")


async def test_a_reload_loses_no_question(critic_server: VllmServer) -> None:
    """What is asked before, during and after it is answered, by the old critic or the new one."""
    old, new = random_critic(37), random_critic(38)
    await publish(critic_server, old, version="old")
    text = PROBE * 6
    by_old, by_new = values(old, text), values(new, text)
    found: dict[int, float] = {}
    under_way, published = asyncio.Event(), asyncio.Event()

    async def ask(worker: int, workers: int) -> None:
        # Each asks on until the update is over, and then all that is left.
        for token in range(4 + worker, len(text), workers):
            found[token] = await critic.value(text[:4], text[4 : token + 1])
            if len(found) >= 20:
                under_way.set()
            if token > len(text) // 2:
                await published.wait()

    async with CriticServer(critic_server.url) as critic:
        asking = [asyncio.create_task(ask(worker, 16)) for worker in range(16)]
        await under_way.wait()
        await publish(critic_server, new, version="new")
        published.set()
        await asyncio.gather(*asking)
    assert found.keys() == set(range(4, len(text)))
    is_old = {t for t, value in found.items() if math.isclose(value, by_old[t], abs_tol=TOLERANCE)}
    is_new = {t for t, value in found.items() if math.isclose(value, by_new[t], abs_tol=TOLERANCE)}
    assert is_old | is_new == found.keys()
    assert min(len(is_old), len(is_new)) >= 20
    # After the update nothing comes from the old critic, not even from its prefix cache.
    async with WeightClient(critic_server.url) as client:
        again = await client.values([text[: token + 1] for token in range(len(text))])
    assert again == pytest.approx(by_new, abs=TOLERANCE)


# -- stops -------------------------------------------------------------------------------------

ASKING = Gate(rule="value-gated", value="critic", beta=1.5, epsilon=1.0)


async def generate(url: str, seed: int) -> dict[str, Any]:
    body = {
        "model": "policy",
        "prompt": PROBE[seed % 7 : 12 + seed % 7],
        "max_tokens": 60,
        "temperature": 1.0,
        "seed": seed,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
    }
    status, answer = await post(f"{url}/v1/completions", body)
    assert status == 200, answer
    return answer["choices"][0]


def replay(
    choice: dict[str, Any], critic: PreTrainedModel
) -> tuple[int | None, float | None, int, float]:
    """The cut and the V there by Hugging Face's values; how often V was needed; the closest call.

    The last is the smallest distance of a z from its threshold: below it, rounding decides.
    """
    prompt, ids = choice["prompt_token_ids"], choice["token_ids"]
    by_token = values(critic, [*prompt, *ids])[len(prompt) :]
    watch = Watch(ASKING, len(prompt))
    logprobs = choice["logprobs"]
    needed, margin = 0, math.inf
    for value, logprob, top in zip(
        by_token, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        if watch.push(logprob, max(top.values())) is Verdict.ASK:
            needed += 1
            margin = min(margin, abs(watch.z - ASKING.beta * max(value, ASKING.epsilon)))
            watch.settle(watch.tokens, value)
    return watch.cut, watch.value, needed, margin


async def test_stops_are_those_of_a_replay_with_hugging_faces_values(
    vllm_server: VllmServer, critic_server: VllmServer
) -> None:
    policy, critic = random_model(39), random_critic(39)
    await publish(vllm_server, policy, version="39")
    await publish(critic_server, critic, version="39")
    gate = json.dumps(
        {"rule": ASKING.rule, "value": ASKING.value, "beta": ASKING.beta, "epsilon": ASKING.epsilon}
    ).encode()
    config = Config((vllm_server.url,), critic_server.url, port=0, gate=gate)
    async with running(config) as gateway:
        choices = await asyncio.gather(*(generate(gateway.url, seed) for seed in range(24)))
        asked = await metric(gateway, "espo_gateway_critic_questions_total")
        assert await metric(gateway, "espo_gateway_critic_requests_total") < asked
    kept = received = needed = compared = 0
    for choice in choices:
        record = choice["espo"]
        cut, value, needed_here, margin = replay(choice, critic)
        needed += needed_here
        kept += len(choice["token_ids"])
        received += record["tokens"]
        if margin < 1e-3:
            continue  # a tie, which rounding decides
        compared += 1
        assert record["cut"] == cut
        assert record["stopped"] == (cut is not None)
        assert len(choice["token_ids"]) == (cut or 60)
        assert record["value"] == pytest.approx(value, abs=TOLERANCE)
    assert compared >= 20
    stopped = sum(choice["espo"]["stopped"] for choice in choices)
    assert 4 <= stopped <= 20
    # Asked are the tokens that V could stop, and of those that came after a cut at most all.
    assert stopped < needed <= asked <= needed + received - kept
    assert needed < kept / 4
