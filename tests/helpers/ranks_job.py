"""What `test_ranks.py` starts as two ranks: rank 0 trains and saves what it saw, rank 1 follows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from espo_rl.ppo.ranks import follow
from espo_rl.ppo.trainer import PpoTrainer
from tests.helpers.trainer import Paths, make_rollouts, trainer, weights_of

#: Every term that there is. With a token a micro-batch, minibatches of three and two rollouts leave
#: one of two ranks without rows at times.
SETTINGS: dict[str, Any] = {
    "minibatches": 2,
    "micro_batch_tokens": 1,
    "aggregation": "sequence-mean",
    "kl_coefficient": 0.1,
    "importance_cap": 2.0,
}
PROBE = [4, 9, 7, 11, 5, 6, 4]


def two_updates(ours: PpoTrainer, folder: Path) -> dict[str, Any]:
    """Updates, saves between them and after; everything that a caller gets to see."""
    metrics = [ours.update(make_rollouts())]
    ours.save(folder / "state")
    metrics.append(ours.update(make_rollouts()))
    ours.save_models(folder / "models")
    for _ in ours.weights("actor"):
        break  # a reader that has had enough leaves nobody behind
    seen = {
        "metrics": metrics,
        "weights": weights_of(ours),
        "logprobs": ours.prompt_logprobs(PROBE),
        "values": ours.values(PROBE),
        "critic_values": [of.tolist() for of in ours.critic_values(make_rollouts())],
    }
    ours.load(folder / "state")
    ours.update(make_rollouts())
    return seen | {"again": weights_of(ours)}


def main(stage: int, folder: Path) -> None:
    paths = Paths(*(folder / name for name in ("actor", "critic", "reference", "head")))
    ours = trainer(paths, zero_stage=stage, **SETTINGS)
    assert ours.ranks.size == 2
    if ours.ranks.rank:
        follow(ours)
    else:
        torch.save(two_updates(ours, folder / f"zero-{stage}"), folder / f"zero-{stage}.pt")
        ours.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
