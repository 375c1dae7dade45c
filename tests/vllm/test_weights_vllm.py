"""Weight updates of a real vLLM, on CPU, against what Hugging Face computes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
import torch
from transformers import PreTrainedModel

from espo_gateway.stop.gate_json import gate_to_json
from espo_gateway.stop.rules import Gate
from espo_gateway.supervisor import free_port
from espo_gateway.vllm_plugin.client import WeightClient, WeightRouteError
from espo_rl.base_model.train import make_tokenizer
from espo_rl.config import RolloutSection
from espo_rl.ppo.parameters import TensorSpec, gathered, tensor_specs
from espo_rl.rollouts.collector import Collector, Prompter
from espo_rl.servers.weights import WeightParityError, WeightPublisher
from espo_rl.types import Problem, Request
from tests.helpers.gateway import gateway_for
from tests.helpers.models import PROBE, logprobs, random_model
from tests.helpers.vllm import BASE_SEED, VllmServer, generated, publish

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4


async def verify(server: VllmServer, model: PreTrainedModel, version: str) -> float:
    async with WeightPublisher([server.url]) as publisher:
        return await publisher.verify(
            PROBE, logprobs(model, PROBE), version=version, tolerance=TOLERANCE
        )


async def post(server: VllmServer, route: str, body: object = None) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}{route}", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        return await response.json()


async def cached_tokens(server: VllmServer) -> float:
    """Prompt tokens that the prefix cache has saved so far."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{server.url}/metrics") as response,
    ):
        lines = (await response.text()).splitlines()
    [line] = [line for line in lines if line.startswith("vllm:prefix_cache_hits_total")]
    return float(line.rsplit(" ", 1)[1])


async def next_logprobs(server: VllmServer, prompt: list[int]) -> dict[int, float]:
    """The five likeliest next tokens with their logprobs, through the prefix cache."""
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": 1,
        "logprobs": 5,
        "temperature": 0.0,
        "return_tokens_as_token_ids": True,
    }
    answer = await post(server, "/v1/completions", body)
    found = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(name.removeprefix("token_id:")): logprob for name, logprob in found.items()}


@torch.no_grad()
def assert_next_logprobs(
    found: dict[int, float], model: PreTrainedModel, prompt: list[int]
) -> None:
    row = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert len(found) >= 5
    for token, logprob in found.items():
        assert logprob == pytest.approx(row[token].item(), abs=TOLERANCE)


async def test_the_servers_weights_follow_a_tied_model(vllm_server: VllmServer) -> None:
    # Twice: the reload after a reload is another path through vLLM.
    for seed in (11, 12):
        model = random_model(seed)
        await publish(vllm_server, model, version=f"tied-{seed}")
        await verify(vllm_server, model, version=f"tied-{seed}")


async def test_the_servers_weights_follow_an_untied_model(untied_vllm_server: VllmServer) -> None:
    await verify(untied_vllm_server, random_model(BASE_SEED, tied=False), version="default")
    for seed in (11, 12):
        model = random_model(seed, tied=False)
        await publish(untied_vllm_server, model, version=f"untied-{seed}")
        await verify(untied_vllm_server, model, version=f"untied-{seed}")


async def test_a_changed_lm_head_alone_is_seen(untied_vllm_server: VllmServer) -> None:
    model = random_model(13, tied=False)
    await publish(untied_vllm_server, model, version="head")
    with torch.no_grad():
        model.lm_head.weight[5] += 0.05
    with pytest.raises(WeightParityError, match="differs by"):
        await verify(untied_vllm_server, model, version="head")
    await publish(untied_vllm_server, model, version="head-changed")
    await verify(untied_vllm_server, model, version="head-changed")


async def test_verify_refuses_other_weights_and_versions(vllm_server: VllmServer) -> None:
    model = random_model(14)
    await publish(vllm_server, model, version="14")
    with pytest.raises(WeightParityError, match="version '14', not '15'"):
        await verify(vllm_server, model, version="15")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] += 0.1
    with pytest.raises(WeightParityError, match="differs by"):
        await verify(vllm_server, model, version="14")


@torch.no_grad()
def went_on(old: PreTrainedModel, new: PreTrainedModel, ids: list[int], done: int) -> list[float]:
    """Logprobs of the tokens after the first `done`, the last of which the new model is the first
    to see: keys and values of those before it are the old one's. Shape [tokens - done]."""
    kept = old(torch.tensor([ids[: done - 1]]), use_cache=True).past_key_values
    rows = new(torch.tensor([ids[done - 1 : -1]]), past_key_values=kept).logits[0].log_softmax(-1)
    return rows.gather(1, torch.tensor(ids[done:])[:, None])[:, 0].tolist()


@pytest.mark.parametrize("keep_kv", [False, True])
async def test_a_request_in_flight_keeps_its_tokens_and_goes_on(
    vllm_server: VllmServer, keep_kv: bool
) -> None:
    """Tokens before the update are the old policy's, all after it the new one's: by the keys and
    values that the old one has computed if they are kept, else by none of them."""
    old, new = random_model(15), random_model(16)
    await publish(vllm_server, old, version="old")
    wanted = 430
    body = {
        "model": vllm_server.model,
        "prompt": PROBE,
        "max_tokens": wanted,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
        "stream": True,
        "temperature": 1.0,
        "seed": 1,
    }
    tokens: list[int] = []
    found: list[float] = []
    updated = False
    url = f"{vllm_server.url}/v1/completions"

    async def other(seed: int) -> None:
        async with session.post(url, json=body | {"stream": False, "seed": seed}) as response:
            assert response.status == 200
            await response.read()

    async with (
        aiohttp.ClientSession() as session,
        # With the engine to itself a stream could be over before the update begins.
        asyncio.TaskGroup() as others,
        session.post(url, json=body) as response,
    ):
        for seed in range(2, 33):
            others.create_task(other(seed))
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            [choice] = json.loads(line.removeprefix(b"data: "))["choices"]
            tokens += choice["token_ids"]
            found += choice["logprobs"]["token_logprobs"]
            if not updated and len(tokens) >= 20:
                await publish(vllm_server, new, version="new", keep_kv=keep_kv)
                updated = True
    assert len(tokens) == len(found) == wanted
    assert choice["finish_reason"] == "length"

    ids = [*PROBE, *tokens]
    by_old, by_new = (torch.tensor(logprobs(model, ids)[len(PROBE) - 1 :]) for model in (old, new))
    served = torch.tensor(found)
    is_old = (served - by_old).abs() < TOLERANCE
    # Of random models no token has the same probability twice, to 1e-4.
    split = int(is_old.long().cumprod(0).sum())
    assert 20 <= split < wanted
    expected = by_new[split:]
    if keep_kv:
        expected = torch.tensor(went_on(old, new, ids, len(PROBE) + split))
    assert served[split:] == pytest.approx(expected, abs=TOLERANCE)
    await verify(vllm_server, new, version="new")


async def test_twenty_reloads_under_sixty_four_requests(vllm_server: VllmServer) -> None:
    """None fails, versions only rise, and each time what serves is what was sent."""
    over = asyncio.Event()
    body = {
        **{"model": vllm_server.model, "prompt": PROBE, "max_tokens": 300, "ignore_eos": True},
        **{"logprobs": 1, "return_token_ids": True},
    }

    async def keep_asking(seed: int) -> int:
        asked = 0
        while not over.is_set():
            answer = await post(vllm_server, "/v1/completions", body | {"seed": seed + 64 * asked})
            [choice] = answer["choices"]
            assert choice["finish_reason"] == "length"
            assert len(choice["token_ids"]) == len(choice["logprobs"]["token_logprobs"]) == 300
            asked += 1
        return asked

    async with asyncio.TaskGroup() as group, WeightClient(vllm_server.url) as client:
        streams = [group.create_task(keep_asking(seed)) for seed in range(64)]
        try:
            for reload in range(20):
                model = random_model(40 + reload)
                await publish(vllm_server, model, version=f"reload-{reload}")
                assert await client.weight_version() == f"reload-{reload}"
                await verify(vllm_server, model, version=f"reload-{reload}")
        finally:
            over.set()
    assert all(stream.result() >= 1 for stream in streams)


@pytest.mark.parametrize("decide", ["gateway", "engine"])
async def test_it_is_known_at_which_token_the_weights_changed(
    vllm_server: VllmServer, decide: str
) -> None:
    """The gateway is told while the server samples nothing, and a server that decides tells itself;
    of 32 streams none is a token off."""
    old, new = random_model(27), random_model(28)
    await publish(vllm_server, old, version="old")

    async with gateway_for(vllm_server, gate=None, decide=decide) as gateway:

        async def changed() -> None:
            gateway.push_gate(gate_to_json(Gate(weights_version="new")))

        gateway.push_gate(gate_to_json(Gate(weights_version="old")))
        prompter = Prompter(make_tokenizer(), chat=False)
        config = RolloutSection(max_tokens=300)
        async with (
            Collector(gateway.url, vllm_server.model, prompter, config) as collector,
            WeightPublisher([vllm_server.url]) as publisher,
        ):
            problem = Problem("p", "358c", "")
            requests = [Request(problem, seed=seed) for seed in range(32)]
            before = await generated(vllm_server)
            asked = asyncio.create_task(collector.collect(requests, temperature=1.0))
            while await generated(vllm_server) < before + 320:  # noqa: ASYNC110 (no event)
                await asyncio.sleep(0.01)
            await publisher.publish(tensor_specs(new), gathered(new), version="new", loaded=changed)
            rollouts = await asked

    assert sum(bool(rollout.weights_changes) for rollout in rollouts) >= 5
    for rollout in rollouts:
        ids = rollout.prompt_ids + rollout.token_ids
        said = {
            version: logprobs(model, ids)[len(rollout.prompt_ids) - 1 :]
            for version, model in (("old", old), ("new", new))
        }
        expected = [said[version][i] for i, version in enumerate(rollout.token_versions)]
        assert rollout.logprobs == pytest.approx(expected, abs=TOLERANCE)


async def test_nothing_of_the_old_policy_survives_in_the_prefix_cache(
    vllm_server: VllmServer,
) -> None:
    prompt = PROBE * 6
    old, new = random_model(17), random_model(18)
    await publish(vllm_server, old, version="old")
    for _ in range(2):
        before = await cached_tokens(vllm_server)
        assert_next_logprobs(await next_logprobs(vllm_server, prompt), old, prompt)
    # The second request took its prompt from the cache; else this test would show nothing.
    assert await cached_tokens(vllm_server) >= before + 100
    await publish(vllm_server, new, version="new")
    assert_next_logprobs(await next_logprobs(vllm_server, prompt), new, prompt)


@pytest.mark.parametrize("flaw", ["missing", "unknown", "shape"])
async def test_flawed_weights_are_refused_and_the_server_serves_on(
    vllm_server: VllmServer, flaw: str
) -> None:
    good = random_model(19)
    await publish(vllm_server, good, version="good")
    tensors = dict(gathered(random_model(20)))
    name = "model.layers.1.self_attn.k_proj.weight"
    if flaw == "missing":
        # One of three that vLLM keeps as one parameter: names alone would not show it.
        del tensors[name]
        reason = f"missing {name}"
    elif flaw == "unknown":
        tensors["model.layers.2.self_attn.k_proj.weight"] = tensors[name]
        reason = "unknown model.layers.2.self_attn.k_proj.weight"
    else:
        tensors[name] = tensors[name][1:]
        reason = rf"{name} has shape"
    specs = [TensorSpec(name, x.dtype, tuple(x.shape)) for name, x in tensors.items()]
    async with WeightPublisher([vllm_server.url]) as publisher:
        with pytest.raises(WeightRouteError, match=reason):
            await publisher.publish(specs, tensors.items(), version="bad")
    await verify(vllm_server, good, version="good")
    # The failed session is over: the next update works.
    await publish(vllm_server, random_model(20), version="better")
    await verify(vllm_server, random_model(20), version="better")


async def test_a_file_that_is_not_there_is_refused_by_name(vllm_server: VllmServer) -> None:
    async with WeightClient(vllm_server.url) as client:
        before = await client.weight_version()
        with pytest.raises(WeightRouteError, match="cannot read weights from /no/such/file"):
            await client.update(["/no/such/file"], version="bad")
        assert await client.weight_version() == before


async def test_a_server_that_a_dead_trainer_left_paused_and_half_updated(
    vllm_server: VllmServer,
) -> None:
    await post(vllm_server, "/pause?mode=keep")
    await post(vllm_server, "/start_weight_update")
    model = random_model(21)
    await publish(vllm_server, model, version="21")
    await verify(vllm_server, model, version="21")


async def test_weights_for_a_server_that_has_slept(vllm_server: VllmServer) -> None:
    """On a CPU vLLM gives no memory back, but the order of the calls is the same."""
    await post(vllm_server, "/sleep?level=1")
    await post(vllm_server, "/wake_up")
    model = random_model(24)
    await publish(vllm_server, model, version="24")
    await verify(vllm_server, model, version="24")


async def test_what_a_server_holds_is_compared_with_what_was_sent(vllm_server: VllmServer) -> None:
    model, other = random_model(25), random_model(26)
    for one in (model, other):
        for parameter in one.parameters():  # those of norms are all alike before any training
            parameter.data += 0.01 * torch.rand_like(parameter)
    async with WeightPublisher([vllm_server.url]) as publisher:
        await publisher.publish(tensor_specs(model), gathered(model), version="25")
        assert "but not used" in await publisher.explain(gathered(model))
        # Another update, that the trainer knows nothing of.
        await publish(vllm_server, other, version="25")
        assert "not loaded: none of" in await publisher.explain(gathered(model))


async def test_one_server_that_is_gone_does_not_keep_the_others_from_the_weights(
    vllm_server: VllmServer,
) -> None:
    model = random_model(22)
    gone = f"http://127.0.0.1:{free_port()}"
    async with WeightPublisher([gone, vllm_server.url]) as publisher:
        with pytest.raises(WeightRouteError, match=gone):
            await publisher.publish(tensor_specs(model), gathered(model), version="22")
    await verify(vllm_server, model, version="22")


async def test_probe_passes_over_the_prefix_cache(vllm_server: VllmServer) -> None:
    model = random_model(23)
    await publish(vllm_server, model, version="23")
    prompt = PROBE * 6
    expected = logprobs(model, prompt)
    async with WeightPublisher([vllm_server.url]) as publisher:
        for _ in range(2):
            before = await cached_tokens(vllm_server)
            await publisher.verify(prompt, expected, version="23", tolerance=TOLERANCE)
            assert await cached_tokens(vllm_server) == before
