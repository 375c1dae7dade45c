"""Tokens a second of a real vLLM: through the gateway, monitored, against directly without.

And directly, but streamed with logprobs as the gateway asks for them: what of the difference is
vLLM's own.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.progress import Progress

from benchmark import servers
from espo_gateway.supervisor import ServerProcess, free_port

REQUESTS, TOKENS, PAIRS = 64, 200, 7


@dataclass
class Ratio:
    """Tokens a second of each group of rounds."""

    direct: list[float] = field(default_factory=list)
    gateway: list[float] = field(default_factory=list)
    streamed: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [g / d for g, d in zip(self.gateway, self.direct, strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    def as_json(self) -> dict[str, Any]:
        return {
            "direct": self.direct,
            "gateway": self.gateway,
            "streamed": self.streamed,
            "ratios": self.ratios,
            "direct_median": statistics.median(self.direct),
            "gateway_median": statistics.median(self.gateway),
            "streamed_median": statistics.median(self.streamed),
            "requests_at_once": REQUESTS,
            "tokens_per_request": TOKENS,
        }


async def measure(
    url: str | None,
    model: str | None,
    gate: bytes | None,
    *,
    shape: tuple[int, int],
    quick: bool,
    progress: Progress,
) -> Ratio:
    """Alternating rounds; url None starts a vLLM of a random model, shape: hidden size, layers."""
    pairs = 3 if quick else PAIRS
    task = progress.add_task("vLLM starting", total=3 * pairs)
    progress.refresh()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        if url is None:
            served = await serve_vllm(stack, folder, *shape)
            url, model = served.url, "policy"
        url = url.rstrip("/").removesuffix("/v1")
        proxy = await servers.start_gateway(folder, url, gate, flags=("--decide", "gateway"))
        stack.push_async_callback(proxy.process.stop)
        result = Ratio()
        sides = [
            ("direct", url, result.direct),
            ("gateway", proxy.url, result.gateway),
            ("streamed", url, result.streamed),
        ]
        for pair in range(-1, pairs):
            # Each goes first as often as the others.
            turn = pair % len(sides)
            for name, base, rates in [*sides[turn:], *sides[:turn]]:
                progress.update(task, description=f"vLLM {name}", refresh=True)
                rate = await _round(base, str(model), seed=pair, stream=name == "streamed")
                if pair >= 0:  # the first is a warm-up
                    rates.append(rate)
                    progress.advance(task)
        return result


async def serve_vllm(
    stack: AsyncExitStack, folder: Path, hidden: int, layers: int, *flags: str
) -> servers.Proxy:
    """vLLM with a random model, named "policy"; stopped with the stack."""
    sys.path.append(str(servers.HERE.parents[1]))
    from tests.helpers.models import text_checkpoint

    port = free_port()
    checkpoint = text_checkpoint(folder / "checkpoint", 0, hidden=hidden, layers=layers)
    command = [sys.executable, "-m", "espo_gateway.vllm_plugin", str(checkpoint)]
    limits = ["--dtype", "float32", "--max-model-len", "1024", "--served-model-name", "policy"]
    process = await ServerProcess.start(
        [*command, "--port", str(port), *limits, *flags],
        log_path=folder / f"vllm-{port}.log",
        ready_url=f"http://127.0.0.1:{port}/health",
        name="vLLM",
    )
    stack.push_async_callback(process.stop)
    return servers.Proxy(f"http://127.0.0.1:{port}", process)


async def _round(url: str, model: str, *, seed: int, stream: bool) -> float:
    """Tokens a second of many requests at once; streamed ones with logprobs, and unread."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def request(index: int) -> int:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": f"What is {index} times {seed + 7}?"}],
                "max_tokens": TOKENS,
                "ignore_eos": True,
                "temperature": 1.0,
                "seed": 1000 * seed + index,
            }
            if stream:
                body |= {"stream": True, "logprobs": True, "top_logprobs": 2}
            async with session.post(url + "/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                if stream:
                    async for _ in response.content.iter_any():
                        pass
                    return TOKENS
                return (await response.json())["usage"]["completion_tokens"]

        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*map(request, range(REQUESTS))))
        return tokens / (time.perf_counter() - began)
