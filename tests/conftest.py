"""Fixtures shared by all tests: real vLLM servers, started once a session."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest
import pytest_asyncio
from hypothesis import settings
from playwright.async_api import Browser, async_playwright
from tenacity import wait_none

from espo_rl.rollouts import collector
from tests.helpers.browser import CHROMIUM
from tests.helpers.gateway import STARTED
from tests.helpers.vllm import VllmServer, serve

# No test is about time, and a busy machine is slow.
settings.register_profile("espo", deadline=None)
settings.load_profile("espo")

# A suite in the background (nohup, some CIs) inherits that Ctrl-C is ignored, and so would the
# processes whose Ctrl-C it tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_command_left() -> Iterator[None]:
    """A test that fails, or runs out of time, leaves no gateway behind."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def _no_ranks_left() -> Iterator[None]:
    """What accelerate says of this process, where it is loaded, is not for children of later tests:
    they would wait for other ranks."""
    yield
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """Whoever wants it is marked `in_browser`."""
    async with async_playwright() as playwright:
        # Containers run as root and have no user namespaces; only our own page is opened.
        yield await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector does not wait before it asks again."""
    monkeypatch.setattr(collector, "wait_exponential_jitter", lambda **_: wait_none())


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
