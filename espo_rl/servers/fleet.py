"""The servers of a run (policy, critic, gateway): started, watched, restarted, stopped with it.

A server that the recipe names by URL is not the run's: it is waited for, never started or stopped.
What a restarted server must be given again is not decided here: weights, in `served_models.py`; the
gate, in the loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar, cast

import torch

from espo_gateway.stop.gate_json import gate_to_json
from espo_gateway.stop.rules import Gate
from espo_gateway.supervisor import ServerStartError, free_port
from espo_gateway.vllm_plugin.head_file import fingerprint
from espo_gateway.vllm_plugin.wire import ROUTE
from espo_rl.config import Recipe
from espo_rl.first import first_of
from espo_rl.servers.server import Say, Server, ServerError, ServerFellError, call

T = TypeVar("T")

#: What launchers tell the ranks; a server of one of them is none, and vLLM would read it
OF_RANKS = re.compile(
    "RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|CROSS_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*"
)

#: vLLM takes no more than the tokens of its batch, by default 2048; further ones wait in its queue
MOST_SEQUENCES = 2048


def seats(recipe: Recipe, *, probes: bool = False) -> int:
    """Requests that a policy server of the run's own takes at a time, `--max-num-seqs`.

    What asks about rollouts must not queue behind them: a question of each where there is a probe,
    and under `refill` the proof of the weights.

    probes: an answer probe is asked, though the recipe's rule has none.
    """
    rollouts = recipe.rollout.concurrency
    questions = rollouts if probes or "probe" in recipe.stopping.read else 0
    return min(rollouts + questions + bool(recipe.rollout.ahead), MOST_SEQUENCES)


class Fleet:
    """All servers of a run. Use `open_fleet`, which stops them whatever happens."""

    def __init__(
        self, policies: list[Server], critic: Server | None, gateway: Server, recipe: Recipe
    ) -> None:
        self.policies = policies
        self.critic = critic
        self.gateway = gateway
        self.model = ""
        self._config = recipe.servers
        self._head = recipe.stopping.head
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
                    group.create_task(self._start(server, say))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        await self.gateway.start(say)
        self.model = await served_model(self.gateway_url)
        await self.new_tokens()  # what a server by URL did before is not this run's

    async def _start(self, server: Server, say: Say) -> None:
        """Raises ServerError: one by URL has another head of V than the recipe."""
        await server.start(say)
        if self._head is None or server.command or server not in self.policies:
            return
        try:
            told = json.loads((await call("GET", server.url + ROUTE))[1])["head"]
        except (ValueError, LookupError, TypeError):  # it is no server of ours
            told = None
        if told != fingerprint(self._head):
            raise ServerError(
                f"{server.url} does not tell V by the head in {self._head}: start it with "
                "--value-head and that folder, or change stopping.value_head"
            )

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

    async def watched(self, doing: Awaitable[T]) -> T:
        """What it gives. Raises ServerFellError, and gives it up, when one of them falls."""
        fallen = asyncio.ensure_future(self.failure())
        first = await first_of(doing, fallen)
        if first is fallen:
            raise ServerFellError(fallen.result())
        return cast(T, first.result())

    async def end(self, url: str) -> None:
        """End one of the run's that gives no answer, so that it is found down and started anew."""
        await asyncio.gather(*(server.stop() for server in self.all if server.url == url))

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
            if server.command:
                await server.until_port_free()
            try:
                await self._start(server, say)
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

    @asynccontextmanager
    async def asleep(self) -> AsyncIterator[None]:
        """With `servers.sleep`: the memory of the GPU is the trainer's meanwhile.

        What they hold of requests is lost. A server that does not answer is found down, and started
        anew, when it is next needed.

        Raises:
            ServerError: one refuses to sleep, or to wake.
        """
        if self._config.sleep:
            await self._all_models("/sleep?level=1")
        try:
            yield
        finally:
            if self._config.sleep:
                await self._all_models("/wake_up")

    async def _all_models(self, route: str) -> None:
        async def post(server: Server) -> None:
            try:
                status, text = await call(
                    "POST", f"{server.url}{route}", seconds=self._config.hang_timeout
                )
            except ServerError:
                return
            if status != 200:
                raise ServerError(
                    f"servers.sleep: {server.url}{route} answered {status}: {text}; start a server "
                    "given by URL with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1"
                )

        await asyncio.gather(*map(post, self.all[:-1]))

    async def push_gate(self, gate: Gate) -> None:
        """Hand the gateway the gate for the next batch."""
        status, text = await call(
            "PUT",
            f"{self.gateway_url}/espo/gate",
            data=gate_to_json(gate),
            headers={"Content-Type": "application/json"},
        )
        if status != 200:
            raise ServerError(f"the gateway refused the gate: {text}")


@asynccontextmanager
async def open_fleet(
    recipe: Recipe,
    model_path: str,
    log_folder: Path,
    *,
    critic_path: Path | None = None,
    probes: bool = False,
    say: Say = print,
) -> AsyncIterator[Fleet]:
    """Start what the recipe does not name by URL; stop it, whatever happens, at the end.

    Args:
        model_path: checkpoint that the policy servers start with.
        critic_path: of the critic server, a folder with a classifier's config; its weights come
            with the first sync. None: no critic server.
        probes: as for `seats`.
        say: is told of waiting and restarts.

    Raises:
        ServerError, ServerStartError: naming the server and what to do.
    """
    servers = make_fleet(recipe, model_path, log_folder, critic_path, probes=probes)
    try:
        await servers.start(say)
        yield servers
    finally:
        await asyncio.gather(*(server.stop() for server in servers.all))


def make_fleet(
    recipe: Recipe,
    model_path: str,
    log_folder: Path,
    critic_path: Path | None,
    *,
    probes: bool = False,
) -> Fleet:
    config, head = recipe.servers, recipe.stopping.head

    def vllm(name: str, gpus: str | None, *arguments: str) -> Server:
        port = free_port()
        env: dict[str, str | None] = {n: None for n in os.environ if OF_RANKS.fullmatch(n)}
        if "TORCHELASTIC_RUN_ID" in os.environ:
            env["OMP_NUM_THREADS"] = None  # torchrun's 1 is meant for ranks that share the cores
        if gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpus
        flags = ["--enable-sleep-mode"] if config.sleep and torch.cuda.is_available() else []
        if config.weight_transfer in ("ipc", "nccl"):
            backend = json.dumps({"backend": config.weight_transfer})
            flags += ["--weight-transfer-config", backend]
            # The handles of CUDA IPC are pickles; who may send them is who reaches the loopback.
            env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        return Server(
            name,
            f"http://127.0.0.1:{port}",
            [
                *(sys.executable, "-m", "espo_gateway.vllm_plugin", *arguments),
                *("--port", str(port), "--dtype", recipe.model.dtype),
                *flags,
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
                *("--logprobs-mode", config.logprobs_mode),
                *("--max-num-seqs", str(seats(recipe, probes=probes))),
                *(() if head is None else ("--value-head", str(head))),
                *config.vllm_args,
            )
            for number in range(config.policy_servers)
        ]
    for policy in policies:
        policy.samples = True
    critic = None
    if config.critic_url is not None and recipe.asks_critic:
        critic = Server("critic server", config.critic_url.rstrip("/"))
        critic.start_timeout = config.start_timeout
    elif critic_path is not None:
        critic = vllm(
            "critic server",
            config.critic_gpus,
            *(str(critic_path), "--critic", "--load-format", "dummy"),
            *config.critic_vllm_args,
        )
    if head is not None:
        # What is not decided in the engine would not be decided at all.
        source = ["--critic", "engine", "--decide", "engine"]
    else:
        source = ["--critic", critic.url] if critic else []
    port = free_port()
    gateway = Server(
        "gateway",
        f"http://127.0.0.1:{port}",
        [
            *(sys.executable, "-m", "espo_gateway", "--port", str(port)),
            # A rollout without logprobs is of no use.
            *("--unmonitored", "refuse"),
            *(argument for policy in policies for argument in ("--upstream", policy.url)),
            *source,
            # A run that ends wants no rollout any more, and has given its last one up.
            *("--drain-timeout", "0"),
        ],
        log_path=log_folder / "gateway.log",
        start_timeout=60.0,
    )
    return Fleet(policies, critic, gateway, recipe)


async def served_model(url: str) -> str:
    """The name under which the server serves its model."""
    status, text = await call("GET", f"{url}/v1/models")
    if status != 200:
        raise ServerError(f"{url}/v1/models answered {status}: {text}")
    return str(json.loads(text)["data"][0]["id"])
