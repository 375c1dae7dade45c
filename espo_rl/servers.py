"""The servers of a run: the policy's vLLM and the gateway, started, checked and stopped with it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter

from espo_gateway.rules import Gate
from espo_gateway.supervisor import ServerProcess, free_port
from espo_rl.config import Recipe


class ServerError(RuntimeError):
    """A server of the run died, or does not answer as it must."""


@dataclass
class Servers:
    """The addresses to use while `running` holds, and the processes to watch."""

    policy_url: str
    gateway_url: str
    model: str
    processes: list[ServerProcess]

    def check(self) -> None:
        """Raise ServerError with the log's end when a process has died."""
        for process in self.processes:
            if not process.alive:
                raise ServerError(
                    f"the {process.name} died; its log {process.log_path} ends:\n"
                    f"{process.log_tail()}"
                )

    async def generated_tokens(self) -> int | None:
        """Tokens the policy server has sampled since it started; None where it does not say.

        The server's own count also holds what it sampled between a stop and its abort.
        """
        status, text = await call("GET", f"{self.policy_url}/metrics")
        if status != 200:
            return None
        counts = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "vllm:generation_tokens_total"
        ]
        return round(sum(counts)) if counts else None

    async def push_gate(self, gate: Gate) -> None:
        """Hand the gateway the gate for the next batch."""
        status, text = await call(
            "PUT",
            f"{self.gateway_url}/espo/gate",
            data=TypeAdapter(Gate).dump_json(gate),
            headers={"Content-Type": "application/json"},
        )
        if status != 200:
            raise ServerError(f"the gateway refused the gate: {text}")


@asynccontextmanager
async def running(recipe: Recipe, model_path: str, log_folder: Path) -> AsyncIterator[Servers]:
    """Start what the recipe does not name by URL; stop it, whatever happens, at the end.

    Args:
        model_path: checkpoint that the policy server starts with.
    """
    processes: list[ServerProcess] = []
    try:
        policy_url = next(iter(recipe.servers.policy_urls), None)
        if policy_url is None:
            port = free_port()
            policy_url = f"http://127.0.0.1:{port}"
            processes.append(
                await ServerProcess.start(
                    [
                        *(sys.executable, "-m", "espo_gateway.vllm_plugin", model_path),
                        *("--port", str(port), "--dtype", recipe.model.dtype),
                        *("--logprobs-mode", recipe.servers.logprobs_mode),
                        *("--max-num-seqs", str(recipe.rollout.concurrency)),
                        *recipe.servers.vllm_args,
                    ],
                    log_path=log_folder / "policy_server.log",
                    ready_url=f"{policy_url}/health",
                    name="policy server",
                    timeout=recipe.servers.start_timeout,
                )
            )
        else:
            await served_model(policy_url)  # the gateway would wait for it
        port = free_port()
        gateway_url = f"http://127.0.0.1:{port}"
        processes.append(
            await ServerProcess.start(
                [
                    *(sys.executable, "-m", "espo_gateway", "--upstream", policy_url),
                    *("--port", str(port)),
                ],
                log_path=log_folder / "gateway.log",
                ready_url=f"{gateway_url}/health",
                name="gateway",
                timeout=60.0,
            )
        )
        yield Servers(policy_url, gateway_url, await served_model(gateway_url), processes)
    finally:
        await asyncio.gather(*(process.stop() for process in processes))


async def served_model(url: str) -> str:
    """The name under which the server serves its model."""
    status, text = await call("GET", f"{url}/v1/models")
    if status != 200:
        raise ServerError(f"{url}/v1/models answered {status}: {text}")
    return str(json.loads(text)["data"][0]["id"])


async def call(method: str, url: str, **request: Any) -> tuple[int, str]:
    """One small request; its status and body. Raises ServerError when nothing answers."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30.0)) as session,
            session.request(method, url, **request) as response,
        ):
            return response.status, await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ServerError(f"{url} does not answer: {error!r}") from error
