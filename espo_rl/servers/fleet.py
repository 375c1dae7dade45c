"""The servers of a run (policy, critic, gateway): started, watched, restarted, stopped with it.

A server that the recipe names by URL is not the run's: it is waited for, never started or stopped.
What a restarted server must be given again, weights and gate, is the loop's business.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter

from espo_gateway.stop.rules import Gate
from espo_gateway.supervisor import ServerProcess, ServerStartError, free_port
from espo_rl.config import Recipe

Say = Callable[[str], None]

#: What launchers tell the ranks; a server of one of them is none, and vLLM would read it
OF_RANKS = re.compile(
    "RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|CROSS_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*"
)


class ServerError(RuntimeError):
    """A server of the run cannot be had, or does not answer as it must."""


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
        deadline, told = loop.time() + self.start_timeout, False
        while not await answers(f"{self.url}/health"):
            if not told:
                say(
                    f"waiting for the {self.name} at {self.url}, which this run does not start "
                    f"(at most {self.start_timeout:.0f} s, servers.start_timeout)"
                )
            told = True
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

    async def is_up(self) -> bool:
        """Whether it lives and answers."""
        if self.process is not None and not self.process.alive:
            return False
        return await answers(f"{self.url}/health")

    async def until_down(self, hang_timeout: float) -> str:
        """Wait until it has died or hangs; what happened, in words."""
        hung = asyncio.ensure_future(self._until_hung(hang_timeout))
        waits: set[asyncio.Future[Any]] = {hung}
        if self.process is not None:
            waits.add(asyncio.ensure_future(self.process.wait()))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self.process is None or self.process.alive:
            return f"gave no sign of life for {hang_timeout:g} s (servers.hang_timeout)"
        return f"died; its log {self.process.log_path} ends:\n{self.process.log_tail()}"

    async def _until_hung(self, timeout: float) -> None:  # noqa: ASYNC109 (of silence)
        loop = asyncio.get_running_loop()
        last, since = None, loop.time()
        while loop.time() - since < timeout:
            await asyncio.sleep(min(5.0, timeout / 4))
            if self.samples:
                sign = await self.generation()
                alive = sign is not None and (sign != last or not sign.busy)
                last = sign
            else:
                alive = await answers(f"{self.url}/health")
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


class Servers:
    """All servers of a run. Use `running`, which stops them whatever happens."""

    def __init__(
        self, policies: list[Server], critic: Server | None, gateway: Server, recipe: Recipe
    ) -> None:
        self.policies = policies
        self.critic = critic
        self.gateway = gateway
        self.model = ""
        self._config = recipe.servers
        self._counted: dict[str, int] = {}

    @property
    def all(self) -> list[Server]:
        """The gateway last: it needs the others."""
        return [*self.policies, *([self.critic] if self.critic else []), self.gateway]

    @property
    def gateway_url(self) -> str:
        return self.gateway.url

    @property
    def policy_urls(self) -> list[str]:
        return [policy.url for policy in self.policies]

    async def start(self, say: Say) -> None:
        """Start them, those that load models at the same time."""
        try:
            async with asyncio.TaskGroup() as group:
                for server in self.all[:-1]:
                    group.create_task(server.start(say))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        await self.gateway.start(say)
        self.model = await served_model(self.gateway_url)
        await self.new_tokens()  # what a server by URL did before is not this run's

    async def failure(self) -> str:
        """Wait until one of them has died or hangs; which, and what happened."""
        waits = {
            asyncio.ensure_future(server.until_down(self._config.hang_timeout)): server
            for server in self.all
        }
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for server in (waits[wait] for wait in done):
                # What hangs is ended, so that it is found down and started anew.
                await server.stop()
                if not server.command:
                    server.restarts += 1
                    self._check_restarts(server, "it hangs")
            return "; ".join(f"the {waits[wait].name} {wait.result()}" for wait in done)
        finally:
            for wait in waits:
                wait.cancel()

    async def down(self) -> list[Server]:
        """Those that do not answer now."""
        up = await asyncio.gather(*(server.is_up() for server in self.all))
        return [server for server, answers in zip(self.all, up, strict=True) if not answers]

    async def restart(self, server: Server, say: Say) -> None:
        """Start a server anew, or wait for it when it is not the run's.

        Raises:
            ServerError: it fell too often in a row.
        """
        why = server.process.log_tail() if server.process is not None else "it does not answer"
        while True:
            server.restarts += 1
            self._check_restarts(server, why)
            if server.command:
                say(f"restarting the {server.name}")
            await server.stop()
            try:
                await server.start(say)
                return
            except ServerStartError as error:
                why = str(error)
                say(why)

    def _check_restarts(self, server: Server, why: str) -> None:
        if server.restarts > self._config.restarts:
            raise ServerError(
                f"the {server.name} fell {server.restarts} times in a row "
                f"(servers.restarts = {self._config.restarts}): {why}"
            )

    def forget_restarts(self) -> None:
        """A step is done, so they work."""
        for server in self.all:
            server.restarts = 0

    async def new_tokens(self) -> int | None:
        """Tokens the policy servers sampled since this was last asked; None where they do not say.

        Their own count also holds what they sampled between a stop and its abort. Of a server that
        fell, what it sampled since the last question is lost.
        """
        total = 0
        for policy in self.policies:
            now = await policy.generation()
            if now is None:
                return None
            before = self._counted.get(policy.url, 0)
            total += now.tokens - before if now.tokens >= before else now.tokens
            self._counted[policy.url] = now.tokens
        return total

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
async def running(
    recipe: Recipe,
    model_path: str,
    log_folder: Path,
    *,
    critic_path: Path | None = None,
    say: Say = print,
) -> AsyncIterator[Servers]:
    """Start what the recipe does not name by URL; stop it, whatever happens, at the end.

    Args:
        model_path: checkpoint that the policy servers start with.
        critic_path: of the critic server, a folder with a classifier's config; its weights come
            with the first sync. None: no critic server.
        say: is told of waiting and restarts.

    Raises:
        ServerError, ServerStartError: naming the server and what to do.
    """
    servers = _servers(recipe, model_path, log_folder, critic_path)
    try:
        await servers.start(say)
        yield servers
    finally:
        await asyncio.gather(*(server.stop() for server in servers.all))


def _servers(
    recipe: Recipe, model_path: str, log_folder: Path, critic_path: Path | None
) -> Servers:
    config = recipe.servers

    def vllm(name: str, gpus: str | None, *arguments: str) -> Server:
        port = free_port()
        env: dict[str, str | None] = {n: None for n in os.environ if OF_RANKS.fullmatch(n)}
        if "TORCHELASTIC_RUN_ID" in os.environ:
            env["OMP_NUM_THREADS"] = None  # torchrun's 1 is meant for ranks that share the cores
        if gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpus
        return Server(
            name,
            f"http://127.0.0.1:{port}",
            [
                *(sys.executable, "-m", "espo_gateway.vllm_plugin", *arguments),
                *("--port", str(port), "--dtype", recipe.model.dtype),
            ],
            env=env,
            log_path=log_folder / f"{name.replace(' ', '_')}.log",
            start_timeout=config.start_timeout,
        )

    if config.policy_urls:
        policies = [
            Server("policy server", url.rstrip("/"), start_timeout=config.start_timeout)
            for url in config.policy_urls
        ]
    else:
        policies = [
            vllm(
                "policy server" if config.policy_servers == 1 else f"policy server {number}",
                config.policy_gpus[number] if config.policy_gpus else None,
                model_path,
                # Samples of the policy itself: no top-k, top-p or penalty that its checkpoint names
                *("--generation-config", "vllm"),
                *("--logprobs-mode", config.logprobs_mode),
                *("--max-num-seqs", str(recipe.rollout.concurrency)),
                *config.vllm_args,
            )
            for number in range(config.policy_servers)
        ]
    for policy in policies:
        policy.samples = True
    critic = None
    if config.critic_url is not None:
        critic = Server("critic server", config.critic_url.rstrip("/"))
        critic.start_timeout = config.start_timeout
    elif critic_path is not None:
        critic = vllm(
            "critic server",
            config.critic_gpus,
            *(str(critic_path), "--critic", "--load-format", "dummy"),
            *config.critic_vllm_args,
        )
    port = free_port()
    gateway = Server(
        "gateway",
        f"http://127.0.0.1:{port}",
        [
            *(sys.executable, "-m", "espo_gateway", "--port", str(port)),
            # A rollout without logprobs is of no use.
            *("--unmonitored", "refuse"),
            *(argument for policy in policies for argument in ("--upstream", policy.url)),
            *(("--critic", critic.url) if critic else ()),
            # A run that ends wants no rollout any more, and has given its last one up.
            *("--drain-timeout", "0"),
        ],
        log_path=log_folder / "gateway.log",
        start_timeout=60.0,
    )
    return Servers(policies, critic, gateway, recipe)


async def served_model(url: str) -> str:
    """The name under which the server serves its model."""
    status, text = await call("GET", f"{url}/v1/models")
    if status != 200:
        raise ServerError(f"{url}/v1/models answered {status}: {text}")
    return str(json.loads(text)["data"][0]["id"])


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
