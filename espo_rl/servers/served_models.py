"""The trainer's models as the servers have them: weights brought over and proven.

A server that fell is brought back here, and given them again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Self, TypeVar

from espo_gateway.vllm_plugin.client import WeightRouteError, WeightSyncError
from espo_rl.config import Recipe
from espo_rl.ppo.trainer import ModelName, PpoTrainer
from espo_rl.rollouts.collector import Collector, Prompter
from espo_rl.servers.fleet import Fleet
from espo_rl.servers.sampling_proof import SamplingTest
from espo_rl.servers.server import Say, ServerError, ServerFellError
from espo_rl.servers.weight_source import nothing
from espo_rl.servers.weights import (
    CRITIC_SUFFIX,
    TOLERANCE,
    WeightParityError,
    WeightPublisher,
    transfer_of,
)
from espo_rl.types import EndReason, Problem, Request

#: how many rollouts, of how many tokens at most, prove that a server samples as it should
PROOF_ROLLOUTS, PROOF_TOKENS = 64, 32
T = TypeVar("T")


class ServedModels:
    """A fleet that computes with the trainer's weights. An async context manager.

    version: of the weights that the servers have, `step-N`; empty before the first `sync`.

    Args:
        trainer_free: held while the trainer is in use.
        probe: token ids of a text whose logprobs must agree between servers and trainer.
        on_restart: called for each server that was brought back. on_fall: awaited before any is.
        announce: awaited with the version while no server samples: what comes then is of it.
    """

    def __init__(
        self,
        recipe: Recipe,
        fleet: Fleet,
        trainer: PpoTrainer,
        trainer_free: asyncio.Lock,
        probe: Sequence[int],
        *,
        say: Say,
        on_restart: Callable[[], None],
        on_fall: Callable[[], Awaitable[None]] = nothing,
        announce: Callable[[str], Awaitable[None]] = nothing,
    ) -> None:
        self.version = ""
        self._fleet, self._trainer, self._trainer_free = fleet, trainer, trainer_free
        self._rollout, self._mode = recipe.rollout, recipe.servers.logprobs_mode
        self._probe = probe
        self._tolerance = recipe.servers.parity_tolerance or TOLERANCE[recipe.model.dtype]
        self._say, self._on_fall, self._on_restart = say, on_fall, on_restart
        self._announce = announce
        self._behind = True  # a server has started since the weights were sent
        policies, critics = fleet.policy_urls, [fleet.critic.url] if fleet.critic else []
        timeout = recipe.servers.weights_timeout
        self._actor = WeightPublisher(
            policies,
            transfer=transfer_of(recipe.servers, policies),
            timeout=timeout,
            keep_kv=recipe.rollout.keep_kv and bool(recipe.rollout.ahead),
        )
        self._critic = WeightPublisher(
            critics,
            transfer=transfer_of(recipe.servers, critics, suffix=CRITIC_SUFFIX),
            timeout=timeout,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(self._actor.close(), self._critic.close())

    async def sync(self) -> float:
        """Bring the weights to the servers and prove it; the mean difference found.

        Raises:
            WeightSyncError: a server refuses them, or does not compute with them.
        """
        async with self._trainer_free:
            trainer, probe, tolerance = self._trainer, self._probe, self._tolerance
            version = f"step-{trainer.updates}"
            await self._actor.publish(
                trainer.specs("actor"),
                trainer.weights("actor"),
                version=version,
                loaded=partial(self._announce, version),
            )
            parity = await self._proven(
                self._actor,
                "actor",
                self._actor.verify(
                    probe, trainer.prompt_logprobs(probe), version=version, tolerance=tolerance
                ),
            )
            if self._fleet.critic is not None:
                await self._critic.publish(
                    trainer.specs("critic"), trainer.weights("critic"), version=version
                )
                await self._proven(
                    self._critic,
                    "critic",
                    self._critic.verify_values(
                        probe, trainer.values(probe), version=version, tolerance=tolerance
                    ),
                )
            self.version, self._behind = version, False
            return parity

    async def _proven(
        self, publisher: WeightPublisher, name: ModelName, proof: Awaitable[float]
    ) -> float:
        """What a proof finds; if it fails, where the weights were lost is in the error."""
        try:
            return await proof
        except WeightParityError as error:
            try:
                reason = await publisher.explain(self._trainer.weights(name))
            except WeightRouteError as unknown:
                reason = f"where they were lost cannot be told ({unknown})"
            raise WeightParityError(f"{error}; {reason}") from error

    async def prove_sampling(self, problems: Sequence[Problem], prompter: Prompter) -> None:
        """Prove that every policy server samples from the trainer's policy, and say so.

        A server sees what a rollout asks of it; whether it does so is seen in the tokens alone, as
        the logprobs it reports are raw ones. Needs the weights to be there.

        Raises:
            ServerError: naming the server, and the setting that explains it best.
        """
        config = self._rollout.model_copy(
            update={"max_tokens": min(self._rollout.max_tokens, PROOF_TOKENS)}
        )
        requests = [
            Request(problem, seed=seed, mode="off")
            for seed, problem in enumerate(islice(cycle(problems), PROOF_ROLLOUTS))
        ]
        for url in self._fleet.policy_urls:
            async with Collector(url, self._fleet.model, prompter, config) as collector:
                rollouts = await collector.collect(requests, temperature=config.temperature)
            test = SamplingTest(config.temperature)
            async with self._trainer_free:
                for one in rollouts:
                    if one.end is EndReason.ERROR:
                        raise ServerError(f"{url} cannot be asked for a rollout: {one.error}")
                    logits = await asyncio.to_thread(
                        self._trainer.response_logits, one.prompt_ids, one.token_ids
                    )
                    test.add(one.prompt_ids, one.token_ids, logits.numpy(), one.logprobs)
            if test.fault is not None:
                raise ServerError(
                    f"{url} does not sample from the trainer's policy: {test.tokens:,} tokens look "
                    f"like those of {test.fault}. Every request says all of these; look at the "
                    "server's own arguments (logits processors, an engine that ignores what is "
                    "asked), and at servers.policy_urls"
                )
            off = test.off
            other = min(off, key=lambda mode: off[mode])
            if off[self._mode] > self._tolerance >= off[other]:
                raise ServerError(
                    f"{url} reports {other}, but servers.logprobs_mode = {self._mode!r}: set it to "
                    f"{other!r}, or start the server with --logprobs-mode {self._mode}"
                )
            self._say(
                f"{url} samples from the trainer's policy: {test.tokens:,} tokens, chi-square "
                f"p = {test.p_value:.2g}"
            )
        await self._fleet.new_tokens()  # those of the proof are nobody's

    async def catch_up(self) -> None:
        """Weights for a server that has started since they were sent, if there is one."""
        if self._behind:
            await self.sync()

    async def attempt(self, action: Callable[[], Awaitable[T]]) -> T:
        """Do what needs the servers; when one has fallen, or gives no answer to a call about
        weights, bring it back and do it again."""
        while True:
            try:
                return await action()
            except (ServerError, WeightSyncError) as fault:
                if isinstance(fault, WeightRouteError) and fault.status is None:
                    await self._fleet.end(fault.url)  # perhaps its /health alone still answers
                # One by URL that hung may be there again: how often is the fleet's to say.
                if not (await self.heal(str(fault)) or isinstance(fault, ServerFellError)):
                    raise

    async def heal(self, fault: str) -> bool:
        """Bring back the servers that are down; False when none is."""
        down = await self._fleet.down()
        if down:
            self._say(fault)
            self._behind = True
            await self._on_fall()
        for server in down:
            await self._fleet.restart(server, self._say)
            self._on_restart()
        return bool(down)
