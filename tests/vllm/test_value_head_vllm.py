"""A real vLLM that tells V by a head on its policy's hidden states."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from transformers import PreTrainedModel

from espo_gateway.vllm_plugin.wire import ROUTE, Told, told_by
from tests.helpers.gateway import COMPLETIONS, gateway_for, get_text, post
from tests.helpers.models import headed, random_checkpoint, random_model, values
from tests.helpers.run import Run, dumped
from tests.helpers.vllm import BASE_SEED, VllmServer, body_for, publish, serve

pytestmark = pytest.mark.vllm

#: Of V, whose numbers are of the size of units.
TOLERANCE = 1e-3
LATE = 4


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmServer]:
    folder = tmp_path_factory.mktemp("headed")
    headed(random_model(BASE_SEED)).save_pretrained(folder / "head")
    server = await serve(folder, "--value-head", str(folder / "head"))
    yield server
    await server.process.stop()


def gate(**fields: Any) -> str:
    scale = {"critic_wrong": -20.0, "critic_right": 20.0}
    return json.dumps({"rule": "value-only", "value": "critic", "min_tokens": 1, **scale, **fields})


async def answers(server: VllmServer, count: int, **fields: Any) -> list[dict[str, Any]]:
    """Choices of one prompt, each with its record and the prompt's ids."""
    body = body_for(server, COMPLETIONS, max_tokens=40, temperature=1.0, ignore_eos=True)
    orders = {"espo_record": 1, **fields}
    asked = [
        post(
            server.url + COMPLETIONS,
            {**body, "seed": seed, "return_token_ids": True, "vllm_xargs": orders},
        )
        for seed in range(count)
    ]
    return [answer["choices"][0] for _, answer in await asyncio.gather(*asked)]


def record(choice: dict[str, Any]) -> Told:
    told = told_by(choice["stop_reason"])
    assert told is not None
    assert told.fault is None
    return told


def expected(critic: PreTrainedModel, choice: dict[str, Any]) -> list[float]:
    """V in [0, 1] of the state that each token of a choice was sampled in."""
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    told = values(critic, ids)[len(choice["prompt_token_ids"]) - 1 : -1]
    return [(value + 20.0) / 40.0 for value in told]


async def test_v_is_the_heads_on_the_policys_states(server: VllmServer) -> None:
    told = json.loads(await get_text(server.url + ROUTE))
    assert (told["values"], len(told["head"])) == (True, 16)
    critic = headed(random_model(BASE_SEED))
    for choice in await answers(server, 32, espo_gate=gate(p_star=1e-9), espo_trace=1):
        trace = record(choice).trace
        assert trace is not None
        # Of the token that completes the answer nothing is asked.
        said = [value for *_, value in trace]
        assert said == pytest.approx(expected(critic, choice), abs=TOLERANCE)


async def test_its_cut_is_where_v_falls_below(server: VllmServer) -> None:
    critic = headed(random_model(BASE_SEED))
    whole = await answers(server, 32, espo_gate=gate(p_star=1e-9))
    # The first tokens are sampled in states that all share.
    late = [value for one in whole for value in expected(critic, one)[LATE:]]
    limit = sorted(late)[len(late) // 20]
    cuts = await answers(server, 32, espo_gate=gate(p_star=limit, min_tokens=LATE + 1))
    for one, cut in zip(whole, cuts, strict=True):
        told = record(cut)
        said = expected(critic, one)
        assert cut["token_ids"] == one["token_ids"][: told.cut]
        kept = len(cut["token_ids"]) - (told.cut is not None)
        assert all(value > limit - TOLERANCE for value in said[LATE:kept])
        if told.cut is not None:
            assert said[told.cut - 1] < limit + TOLERANCE
            assert told.value == pytest.approx(said[told.cut - 1], abs=TOLERANCE)
    assert len({record(cut).cut for cut in cuts}) > 3


async def test_through_the_gateway(server: VllmServer) -> None:
    text = gate(p_star=0.5)
    direct = await answers(server, 8, espo_gate=text)
    async with gateway_for(server, gate=text.encode(), critic="engine") as gateway:
        body = body_for(server, COMPLETIONS, max_tokens=40, temperature=1.0, ignore_eos=True)
        for seed, one in enumerate(direct):
            _, answer = await post(gateway.url + COMPLETIONS, {**body, "seed": seed})
            espo, told = answer["choices"][0]["espo"], record(one)
            assert (espo["cut"], espo["stopped"]) == (told.cut, told.cut is not None)
            assert espo["value"] == pytest.approx(told.value, abs=TOLERANCE)


async def test_it_follows_the_policys_weights(server: VllmServer) -> None:
    policy = random_model(7)
    await publish(server, policy, version="other")
    head = headed(random_model(BASE_SEED)).score
    critic = headed(policy)
    critic.score = head
    for choice in await answers(server, 4, espo_gate=gate(p_star=1e-9), espo_trace=1):
        said = [value for *_, value in record(choice).trace or ()]
        assert said == pytest.approx(expected(critic, choice), abs=TOLERANCE)
    await publish(server, random_model(BASE_SEED), version="base")


async def test_from_a_worker_in_a_process_of_its_own(tmp_path: Path) -> None:
    """And of the last layer, which is the state that the LM head reads."""
    critic = headed(random_model(BASE_SEED), layers=2)
    critic.save_pretrained(tmp_path / "head")
    flags = ("--distributed-executor-backend", "mp", "--value-head", str(tmp_path / "head"))
    server = await serve(tmp_path, *flags)
    try:
        for choice in await answers(server, 8, espo_gate=gate(p_star=1e-9), espo_trace=1):
            said = [value for *_, value in record(choice).trace or ()]
            assert said == pytest.approx(expected(critic, choice), abs=TOLERANCE)
    finally:
        await server.process.stop()


async def test_the_engine_refuses_a_head_of_another_model(tmp_path: Path) -> None:
    headed(random_model(BASE_SEED)).save_pretrained(tmp_path / "head")
    config = tmp_path / "head/config.json"
    config.write_text(config.read_text().replace('_layers": 1', '_layers": 9'))
    # Given overrides the launcher leaves it to the engine.
    given = ("--value-head", str(tmp_path / "head"), "--hf-overrides", "{}")
    with pytest.raises(Exception, match="of 9 layers"):
        await serve(tmp_path, *given)


@pytest.mark.slow
def test_a_run_is_cut_by_the_v_that_its_trainer_says(tmp_path: Path) -> None:
    """From one folder: the servers are started with it, the trainer reads the same of its actor."""
    base = random_checkpoint(tmp_path / "base", BASE_SEED)
    critic = headed(random_model(BASE_SEED))
    critic.save_pretrained(tmp_path / "head")
    limit = 0.2
    run = Run(
        base,
        tmp_path / "run",
        *("stopping.rule=value-only", "stopping.value=critic", "stopping.threshold=fixed"),
        *(f"stopping.value_head={tmp_path / 'head'}", f"stopping.p_star={limit}"),
        *("stopping.warmup=none", f"stopping.min_tokens={LATE}", "ppo.advantage=group"),
        *("rollout.prompts_per_step=8", "rollout.n=4", "run.steps=1"),
    )
    ended = run.end(patience=10.0)
    assert ended.code == 0, ended.said
    assert ended.left == []
    [rollouts] = dumped(ended)
    for one in rollouts:
        said = values(critic, one.prompt_ids + one.token_ids)[len(one.prompt_ids) - 1 : -1]
        low = [t for t, v in enumerate(said, 1) if t >= LATE and (v + 1.0) / 2.0 < limit]
        # The token that completes an answer is not asked about.
        assert one.kept == low[0] if one.stopped else low in ([], [len(said)])
        # Of those with an outcome its file has what the trainer says.
        assert (one.values is None) == (one.correct is None)
        if one.values is not None:
            assert one.values == pytest.approx(said, abs=TOLERANCE)
    assert len({one.kept for one in rollouts if one.stopped}) > 1
    assert not (tmp_path / "run/critic").exists()
