"""One server of a run: started or waited for, watched for death and silence, stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from espo_gateway.supervisor import PortInUseError, ServerProcess, check_port_free
from espo_rl.first import first_of

Say = Callable[[str], None]


class ServerError(RuntimeError):
    """A server of the run cannot be had, or does not answer as it must."""


class ServerFellError(ServerError):
    """A server has died or hangs; it can be started anew."""


@dataclass
class Server:
    """One server. Without a command it is somebody else's."""

    name: str
    url: str
    command: Sequence[str] = ()
    env: Mapping[str, str | None] = field(default_factory=dict)
    log_path: Path = Path("server.log")
    start_timeout: float = 600.0
    samples: bool = False  # it generates tokens, and hangs when it makes none
    process: ServerProcess | None = None
    starts: int = 0
    restarts: int = 0  # in a row; the loop forgets them once a step is done

    async def start(self, say: Say) -> None:
        """Start it, or wait for it. Raises ServerStartError, or ServerError for one by URL."""
        if not self.command:
            await self._wait(say)
            return
        # A log of its own for each start: the one that says why it died must stay.
        suffix = f".{self.starts}" if self.starts else ""
        self.starts += 1
        self.process = await ServerProcess.start(
            self.command,
            log_path=self.log_path.with_suffix(f"{suffix}.log"),
            ready_url=f"{self.url}/health",
            env=self.env,
            name=self.name,
            timeout=self.start_timeout,
        )

    async def _wait(self, say: Say) -> None:
        loop = asyncio.get_running_loop()
        deadline, announced = loop.time() + self.start_timeout, False
        while not await answers(f"{self.url}/health"):
            if not announced:
                say(
                    f"waiting for the {self.name} at {self.url}, which this run does not start "
                    f"(at most {self.start_timeout:.0f} s, servers.start_timeout)"
                )
            announced = True
            if loop.time() > deadline:
                raise ServerError(
                    f"the {self.name} at {self.url} does not answer /health; start it, or remove "
                    "its URL from the recipe's [servers] so that this run starts one"
                )
            await asyncio.sleep(1.0)

    async def stop(self) -> None:
        """End it if it is the run's own."""
        if self.process is not None:
            await self.process.stop()

    async def until_port_free(self) -> None:
        """Wait, for as long as a start may take: a server whose guard was killed ends by itself."""
        address, loop = urlsplit(self.url), asyncio.get_running_loop()
        deadline = loop.time() + self.start_timeout
        while loop.time() < deadline:
            try:
                return check_port_free(address.hostname or "", address.port or 80)
            except PortInUseError:
                await asyncio.sleep(0.1)

    async def is_up(self) -> bool:
        """Whether it lives and answers."""
        if self.process is not None and not self.process.alive:
            return False
        return await answers(f"{self.url}/health")

    async def until_down(self, hang_timeout: float) -> str:
        """Wait until it has died or hangs; what happened, in words."""
        died = [] if self.process is None else [self.process.wait()]
        await first_of(self._until_hung(hang_timeout), *died)
        if self.process is None or self.process.alive:
            return f"gave no sign of life for {hang_timeout:g} s (servers.hang_timeout)"
        return f"died; its log {self.process.log_path} ends:\n{self.process.log_tail()}"

    async def _until_hung(self, timeout: float) -> None:  # noqa: ASYNC109 (of silence)
        loop = asyncio.get_running_loop()
        sign, since = None, loop.time()
        while loop.time() - since < timeout:
            await asyncio.sleep(min(5.0, timeout / 4))
            if self.samples:
                last, sign = sign, await self.generation()
            if sign is None:  # it says nothing of tokens
                alive = await answers(f"{self.url}/health")
            else:
                alive = sign != last or not sign.busy
            if alive:
                since = loop.time()

    async def generation(self) -> Generation | None:
        """What vLLM's metrics say; None when they cannot be had."""
        try:
            status, text = await call("GET", f"{self.url}/metrics")
        except ServerError:
            return None
        if status != 200:
            return None
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        if "vllm:generation_tokens_total" not in sums:
            return None
        waiting = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        return Generation(
            tokens=round(sums["vllm:generation_tokens_total"]),
            busy=any(sums.get(name) for name in waiting),
        )


@dataclass(frozen=True)
class Generation:
    """A policy server's own count of sampled tokens, and whether it has work."""

    tokens: int
    busy: bool


async def answers(url: str) -> bool:
    """Whether a GET is answered with 200, in a few seconds."""
    try:
        return (await call("GET", url, seconds=5.0))[0] == 200
    except ServerError:
        return False


async def call(method: str, url: str, *, seconds: float = 30.0, **request: Any) -> tuple[int, str]:
    """One small request; its status and body. Raises ServerError when nothing answers."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=seconds)) as session,
            session.request(method, url, **request) as response,
        ):
            return response.status, await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ServerError(f"{url} does not answer: {error!r}") from error
