"""What tests with a real vLLM share: a gateway before it, comparable answers, its counters."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Protocol

import pytest
from gateway_helpers import get_text, post

from espo_gateway.app import running
from espo_gateway.config import Config

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
STRICT = json.dumps({"rule": "regret-only", "beta": 0.2}).encode()


class Server(Protocol):
    url: str
    model: str


def gateway_for(server: Server, gate: bytes | None = None) -> Any:
    return running(Config((server.url,), port=0, gate=gate, drain_timeout=1.0))


def body_for(server: Server, path: str, **fields: Any) -> dict[str, Any]:
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


async def metrics(server: Server) -> dict[str, float]:
    """vLLM's counters, each summed over its labels."""
    found: dict[str, float] = {}
    for line in (await get_text(server.url + "/metrics")).splitlines():
        if line.startswith("vllm:"):
            name, value = line.split("{")[0], float(line.split()[-1])
            found[name] = found.get(name, 0.0) + value
    return found


async def generated(server: Server) -> float:
    return (await metrics(server))["vllm:generation_tokens_total"]


async def settled(server: Server) -> float:
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
