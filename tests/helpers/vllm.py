"""What tests with a real vLLM share: servers, a gateway before one, answers, counters."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from espo_gateway.supervisor import ServerProcess, free_port
from espo_rl.ppo.parameters import gathered, tensor_specs
from espo_rl.servers.weights import WeightPublisher
from tests.helpers.gateway import CHAT, COMPLETIONS, get_text, post
from tests.helpers.models import random_checkpoint

STRICT = json.dumps({"rule": "regret-only", "beta": 0.2}).encode()


#: so that several servers share a GPU, none counts what another takes or gives back meanwhile, and
#: each is there in half the time
ON_GPU = ["--gpu-memory-utilization", "0.02", "--kv-cache-memory-bytes", "1G", "--enforce-eager"]

#: seed of the weights that the servers start with
BASE_SEED = 0


@dataclass(frozen=True)
class VllmServer:
    """A running server: `url` without `/v1`, served `model` name, checkpoint `path`."""

    url: str
    model: str
    path: Path
    process: ServerProcess


async def serve(folder: Path, *flags: str, tied: bool = True) -> VllmServer:
    """Start vLLM with a random policy, through the launcher and the supervisor."""
    return await launch(random_checkpoint(folder / "checkpoint", BASE_SEED, tied=tied), *flags)


async def launch(path: Path, *flags: str, name: str = "policy") -> VllmServer:
    """Start vLLM with a checkpoint; its log is beside it."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    launcher = [sys.executable, "-m", "espo_gateway.vllm_plugin", str(path), "--port", str(port)]
    limits = ["--dtype", "float32", "--max-model-len", "512", "--served-model-name", name]
    if torch.cuda.is_available():
        limits += ON_GPU
    process = await ServerProcess.start(
        [*launcher, *limits, *flags],
        log_path=path.with_suffix(".log"),
        ready_url=f"{url}/health",
        name="vLLM",
    )
    return VllmServer(url, name, path, process)


async def publish(
    server: VllmServer, model: PreTrainedModel, version: str, *, keep_kv: bool = False
) -> None:
    """Send a policy's or a critic's weights to its server."""
    async with WeightPublisher([server.url], keep_kv=keep_kv) as publisher:
        await publisher.publish(tensor_specs(model), gathered(model), version=version)


def body_for(server: VllmServer, path: str, **fields: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": "12+34="}
    if path == CHAT:
        prompt = {"messages": [{"role": "user", "content": "12+34="}]}
    return {"model": server.model, **prompt, **fields}


def comparable(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from one request to the next, and without nulls."""
    skipped = ("espo", "id", "created")
    return {k: v for k, v in fields.items() if k not in skipped and v is not None}


def joined(chunks: list[dict[str, Any]]) -> list[Any]:
    """A stream's tokens and texts, however they were merged into chunks."""
    streams: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            stream = streams.setdefault(choice["index"], ["", [], [], None])
            stream[0] += choice.get("text") or choice.get("delta", {}).get("content") or ""
            stream[1] += choice.get("token_ids") or []
            logprobs = choice.get("logprobs") or {}
            stream[2] += logprobs.get("content") or logprobs.get("token_logprobs") or []
            stream[3] = choice.get("finish_reason")
    return [streams[index] for index in sorted(streams)] + [chunks[-1].get("usage")]


def rounded(value: Any) -> Any:
    """Logprobs depend on the batch in their last bits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


async def metrics(server: VllmServer) -> dict[str, float]:
    """vLLM's counters, each summed over its labels."""
    found: dict[str, float] = {}
    for line in (await get_text(server.url + "/metrics")).splitlines():
        if line.startswith("vllm:"):
            name, value = line.split("{")[0], float(line.split()[-1])
            found[name] = found.get(name, 0.0) + value
    return found


async def generated(server: VllmServer) -> float:
    return (await metrics(server))["vllm:generation_tokens_total"]


async def settled(server: VllmServer) -> float:
    """Tokens generated once nothing runs. One more token makes vLLM bring its gauges up to date."""
    while True:
        before = await generated(server)
        await post(server.url + COMPLETIONS, body_for(server, COMPLETIONS, max_tokens=1))
        now = await metrics(server)
        if now["vllm:num_requests_running"] == 0:
            if now["vllm:generation_tokens_total"] == before + 1:
                return before + 1
        else:
            await asyncio.sleep(0.1)  # leaves the server some time to do its work
