"""Runs `espo_rl.run`, halts where a test wants it (prints HALTED), goes on after a line on stdin.

    python tests/helpers/drive.py rollout:2 arithmetic model.path=...

Places: rollout (the first of a step has come), update (done, nothing else is), sync (the weights
are sent and not proven), save (half a checkpoint is written).
"""

import sys
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from espo_rl import run
from espo_rl.checkpoints import CheckpointStore
from espo_rl.ppo.trainer import PpoTrainer
from espo_rl.rollouts.batch import Batch
from espo_rl.servers.weights import WeightPublisher

place, _, number = sys.argv.pop(1).partition(":")
step = int(number)
updates = 0


def halt() -> None:
    print("HALTED", flush=True)
    sys.stdin.readline()


put, update, verify, save = (
    Batch.put,
    PpoTrainer.update,
    WeightPublisher.verify,
    CheckpointStore.save,
)


def halting_put(self: Batch, rollout: Any) -> None:
    put(self, rollout)
    if self.step == step and len(self.rollouts) == 1:
        halt()


def halting_update(self: PpoTrainer, *given: Any) -> Any:
    global updates
    metrics = update(self, *given)
    updates += 1
    if updates == step:
        halt()
    return metrics


async def halting_verify(self: WeightPublisher, *arguments: Any, **options: Any) -> Any:
    if options["version"] == f"step-{step}":
        halt()
    return await verify(self, *arguments, **options)


def halting_save(self: CheckpointStore, at: int, state: Any, save_models: Any) -> Any:
    def models(folder: Any) -> None:
        save_models(folder)
        if at == step:
            halt()

    return save(self, at, state, models)


PLACES: dict[str, AbstractContextManager[object]] = {
    "rollout": patch.object(Batch, "put", halting_put),
    "update": patch.object(PpoTrainer, "update", halting_update),
    "sync": patch.object(WeightPublisher, "verify", halting_verify),
    "save": patch.object(CheckpointStore, "save", halting_save),
}
with PLACES[place]:
    sys.exit(run.main())
