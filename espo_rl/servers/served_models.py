"""The trainer's models as the servers have them: weights brought over and proven.

A server that fell is brought back here, and given them again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Self, TypeVar

from espo_gateway.vllm_plugin.client import WeightSyncError
from espo_rl.config import Recipe
from espo_rl.ppo.trainer import PpoTrainer
from espo_rl.servers.fleet import Fleet
from espo_rl.servers.server import Say, ServerError
from espo_rl.servers.weights import WeightPublisher

T = TypeVar("T")


class ServedModels:
    """A fleet that computes with the trainer's weights. An async context manager.

    version: of the weights that the servers have, `step-N`; empty before the first `sync`.

    Args:
        trainer_free: held while the trainer is in use.
        probe: token ids of a text whose logprobs must agree between servers and trainer.
        on_restart: called for each server that was brought back.
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
    ) -> None:
        self.version = ""
        self._fleet, self._trainer, self._trainer_free = fleet, trainer, trainer_free
        self._probe, self._tolerance = probe, recipe.servers.parity_tolerance
        self._say, self._on_restart = say, on_restart
        self._behind = True  # a server has started since the weights were sent
        path = recipe.servers.weights_path
        self._actor = WeightPublisher(fleet.policy_urls, path=path)
        self._critic = WeightPublisher(
            [fleet.critic.url] if fleet.critic else [], path=path and path.with_suffix(".critic")
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(self._actor.close(), self._critic.close())

    async def sync(self) -> float:
        """Bring the weights to the servers and prove it; the largest difference found.

        Raises:
            WeightSyncError: a server refuses them, or does not compute with them.
        """
        async with self._trainer_free:
            trainer, probe, tolerance = self._trainer, self._probe, self._tolerance
            version = f"step-{trainer.updates}"
            await self._actor.publish(
                trainer.specs("actor"), trainer.weights("actor"), version=version
            )
            parity = await self._actor.verify(
                probe, trainer.prompt_logprobs(probe), version=version, tolerance=tolerance
            )
            if self._fleet.critic is not None:
                await self._critic.publish(
                    trainer.specs("critic"), trainer.weights("critic"), version=version
                )
                await self._critic.verify_values(
                    probe, trainer.values(probe), version=version, tolerance=tolerance
                )
            self.version, self._behind = version, False
            return parity

    async def catch_up(self) -> None:
        """Weights for a server that has started since they were sent, if there is one."""
        if self._behind:
            await self.sync()

    async def attempt(self, action: Callable[[], Awaitable[T]]) -> T:
        """Do what needs the servers; when one has fallen, bring it back and do it again."""
        while True:
            try:
                return await action()
            except (ServerError, WeightSyncError) as fault:
                if not await self.heal(str(fault)):
                    raise

    async def heal(self, fault: str) -> bool:
        """Bring back the servers that are down; False when none is."""
        down = await self._fleet.down()
        if down:
            self._say(fault)
            self._behind = True
        for server in down:
            await self._fleet.restart(server, self._say)
            self._on_restart()
        return bool(down)
