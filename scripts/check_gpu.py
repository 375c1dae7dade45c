"""Proves on this machine what only a GPU can show: each way for weights, and a server that sleeps.

    python scripts/check_gpu.py                       # a random model of about 100 M parameters
    python scripts/check_gpu.py --model MODEL --json gpu.json

For each way of `servers.weight_transfer` it starts a vLLM server, sends weights while requests run,
and compares the server's logprobs with the trainer's after every reload. A few minutes; on a CPU it
checks the ways that a CPU has.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openai
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from espo_gateway.supervisor import ServerProcess, free_port
from espo_gateway.vllm_plugin.client import WeightClient
from espo_rl.config import Servers
from espo_rl.ppo.parameters import gathered, tensor_specs
from espo_rl.record.json_files import write_json
from espo_rl.record.output import OutputError, check_own, json_with
from espo_rl.servers.weights import TOLERANCE, WeightPublisher, transfer_of

WAYS = ("shared-memory", "file", "ipc", "nccl")
PROBE = list(range(5, 69))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a checkpoint (default: random weights)")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--reloads", type=int, default=5, help="of each way (default: %(default)s)")
    add("--requests", type=int, default=16, help="that run meanwhile (default: %(default)s)")
    add(
        "--tolerance",
        type=float,
        help="of the mean |Δ logprob| (default: 0.3 in bfloat16, 1e-3 on a CPU)",
    )
    add("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    return parser.parse_args()


def reason_against(way: str) -> str | None:
    """Why a way cannot be tried here."""
    gpus = torch.cuda.device_count()
    if way == "ipc" and not gpus:
        return "no GPU"
    if way == "nccl" and gpus < 2:
        return f"{gpus} GPUs, and it takes two"
    return None


def random_checkpoint(folder: Path) -> str:
    """Random weights that give every token its own logprob."""
    config = Qwen2Config(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2_048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        initializer_range=0.05,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logprobs(model: PreTrainedModel) -> list[float]:
    """log π of the probe's tokens from the second on."""
    tokens = torch.tensor([PROBE], device=model.device)
    said = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
    return said.gather(1, tokens[0, 1:, None])[:, 0].tolist()


@torch.no_grad()
def move(model: PreTrainedModel) -> None:
    """As a very large step would."""
    for parameter in model.parameters():
        parameter.mul_(1.0 + 0.05 * torch.randn_like(parameter))


def server_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Of a server on one GPU: the first of those that this process is left."""
    first, _, _ = given.get("CUDA_VISIBLE_DEVICES", "0").partition(",")
    return {
        **given,
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "CUDA_VISIBLE_DEVICES": first.strip(),
    }


async def check(way: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One way: a server, requests, reloads, proofs."""
    gpu, url = torch.cuda.is_available(), f"http://127.0.0.1:{(port := free_port())}"
    config = Servers.model_validate(
        {
            "weight_transfer": way,
            **({"weights_path": folder / "weights.safetensors"} if way == "file" else {}),
        }
    )
    transfer = transfer_of(config, [url])
    flags = ["--weight-transfer-config", json.dumps({"backend": transfer.backend})]
    flags += ["--dtype", "bfloat16" if gpu else "float32", "--max-model-len", "1024"]
    flags += ["--port", str(port), "--skip-tokenizer-init", "--served-model-name", "policy"]
    if gpu:
        flags += ["--gpu-memory-utilization", "0.4", "--enable-sleep-mode"]
    device = "cuda:1" if way == "nccl" else "cuda" if gpu else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16 if gpu else torch.float32
    ).to(device)
    if device == "cuda:1":
        torch.cuda.set_device(1)
    process = await ServerProcess.start(
        [sys.executable, "-m", "espo_gateway.vllm_plugin", options.model, *flags],
        log_path=folder / f"{way}.log",
        ready_url=f"{url}/health",
        name="vLLM",
        env=server_environment(os.environ),
    )
    try:
        async with WeightPublisher([url], transfer=transfer) as publisher:
            return await reloads(way, options, url, model, publisher)
    finally:
        await process.stop()


async def reloads(
    way: str,
    options: argparse.Namespace,
    url: str,
    model: PreTrainedModel,
    publisher: WeightPublisher,
) -> dict[str, Any]:
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    tolerance = options.tolerance or TOLERANCE[dtype]
    seconds, parity = [], []
    async with (
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0) as asker,
        WeightClient(url) as client,
    ):
        running = [asyncio.create_task(asked(asker, seed)) for seed in range(options.requests)]
        for number in range(options.reloads):
            move(model)
            began = time.monotonic()
            await publisher.publish(tensor_specs(model), gathered(model), version=f"{way}-{number}")
            seconds.append(time.monotonic() - began)
            parity.append(
                await publisher.verify(
                    PROBE, logprobs(model), version=f"{way}-{number}", tolerance=tolerance
                )
            )
        done = await asyncio.gather(*running, return_exceptions=True)
        failed = [one for one in done if isinstance(one, BaseException)]
        if failed:
            raise RuntimeError(f"{len(failed)} requests failed: {failed[0]!r}")
        held = await slept(client) if torch.cuda.is_available() else None
        if held is not None:
            await publisher.publish(tensor_specs(model), gathered(model), version="awake")
            await publisher.verify(PROBE, logprobs(model), version="awake", tolerance=tolerance)
    size = sum(spec.num_bytes for spec in tensor_specs(model))
    return {
        "megabytes": size / 1e6,
        "first_s": seconds[0],
        "reload_s": min(seconds[1:], default=seconds[0]),
        "copy_s": copying(model),
        "parity": max(parity),
        "requests": len(done),
        "gigabytes_given_back_asleep": held,
    }


async def asked(asker: openai.AsyncOpenAI, seed: int) -> int:
    """A request that runs over the reloads."""
    answer = await asker.completions.create(
        model="policy",
        prompt=PROBE,
        max_tokens=512,
        seed=seed,
        extra_body={"ignore_eos": True, "detokenize": False},
    )
    assert answer.usage is not None
    return answer.usage.completion_tokens


async def slept(client: WeightClient) -> float:
    """GB of the GPU that a sleeping server gives back; it is awake again after."""
    before = torch.cuda.mem_get_info(0)[0]
    await client.post("/sleep", params={"level": "1"})
    given = torch.cuda.mem_get_info(0)[0] - before
    await client.post("/wake_up")
    return given / 1e9


def copying(model: PreTrainedModel) -> float:
    """Seconds to copy the same bytes once."""
    began = time.monotonic()
    for parameter in model.parameters():
        parameter.detach().clone()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - began


def show(results: dict[str, dict[str, Any]]) -> None:
    numbers = ("MB", "first, s", "reload, s", "copy, s", "mean |Δ logprob|", "requests", "asleep")
    table, console = Table("way", *numbers), Console(soft_wrap=True)
    for way, found in results.items():
        if "reason" in found:
            console.print(f"{way}: {found['reason']}", markup=False)
            continue
        held = found["gigabytes_given_back_asleep"]
        table.add_row(
            way,
            f"{found['megabytes']:,.0f}",
            *(f"{found[name]:.2f}" for name in ("first_s", "reload_s", "copy_s")),
            f"{found['parity']:.2g}",
            str(found["requests"]),
            "" if held is None else f"{held:.1f} GB given back",
        )
    console.print(table)


async def run(options: argparse.Namespace) -> int:
    if options.json:
        try:
            check_own(options.json, "--json", "report of this script", json_with("device", "ways"))
        except OutputError as error:
            print(f"check_gpu: {error}", file=sys.stderr)
            return 2
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as folder:
        if options.model is None:
            options.model = random_checkpoint(Path(folder) / "model")
        for way in options.ways:
            if (reason := reason_against(way)) is not None:
                results[way] = {"reason": f"not tried: {reason}"}
                continue
            print(f"{way} ...", file=sys.stderr, flush=True)
            try:
                results[way] = await check(way, options, Path(folder))
            except Exception as error:  # the other ways are tried all the same
                results[way] = {"reason": f"FAILED: {error!r}"}
    show(results)
    if options.json:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        write_json(options.json, {"device": name, "ways": results}, indent=1)
    return failures(list(results.values()))


def failures(results: Sequence[dict[str, Any]]) -> int:
    """The exit code: 1 when a way that was tried failed."""
    return int(any(str(found.get("reason", "")).startswith("FAILED") for found in results))


if __name__ == "__main__":
    sys.exit(asyncio.run(run(parse())))
