"""Fixtures shared by all tests: real vLLM servers, started once a session."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import gateway_helpers
import pytest
import pytest_asyncio
from hypothesis import settings
from models import random_checkpoint

from espo_gateway.supervisor import ServerProcess, free_port

# No test is about time, and a busy machine is slow.
settings.register_profile("espo", deadline=None)
settings.load_profile("espo")

# A suite in the background (nohup, some CIs) inherits that Ctrl-C is ignored, and so would the
# processes whose Ctrl-C it tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: seed of the weights that the servers start with
BASE_SEED = 0


@pytest.fixture(autouse=True)
def _no_command_left() -> Iterator[None]:
    """A test that fails, or runs out of time, leaves no gateway behind."""
    yield
    while gateway_helpers.STARTED:
        process = gateway_helpers.STARTED.pop()
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


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
    process = await ServerProcess.start(
        [*launcher, *limits, *flags],
        log_path=path.with_suffix(".log"),
        ready_url=f"{url}/health",
        name="vLLM",
    )
    return VllmServer(url, name, path, process)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmServer]:
    """A server of a random policy with tied embeddings. Its weights may change between tests."""
    server = await serve(tmp_path_factory.mktemp("tied"))
    yield server
    await server.process.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def untied_vllm_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmServer]:
    """The same with a separate LM head."""
    server = await serve(tmp_path_factory.mktemp("untied"), tied=False)
    yield server
    await server.process.stop()
