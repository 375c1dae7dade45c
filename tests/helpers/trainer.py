"""Tiny models, a recipe and rollouts for the trainer's tests, in one process and in several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2ForSequenceClassification

from espo_rl.config import Recipe
from espo_rl.ppo.trainer import PpoTrainer
from espo_rl.types import EndReason, Problem, Rollout
from tests.helpers.models import random_checkpoint, random_model

LEARNING_RATE = 1e-3

#: None of these is the value at which it would do nothing.
PPO = {
    "learning_rate": LEARNING_RATE,
    "critic_learning_rate": 2 * LEARNING_RATE,
    "weight_decay": 0.1,
    "epochs": 2,
    "minibatches": 1,
    "clip_low": 0.01,
    "clip_high": 0.02,
    "value_clip": 0.05,
    "gamma": 0.98,
    "lam": 0.9,
    "entropy_bonus": 0.01,
    "max_grad_norm": 0.5,
}


#: By default tensors as small as these stay whole.
EXTRA = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@dataclass(frozen=True)
class Paths:
    actor: Path
    critic: Path
    reference: Path | None = None
    head: Path | None = None


def make_models(folder: Path) -> Paths:
    """A random policy with tied embeddings, a random critic and reference of the same shape."""
    config = random_model(0).config
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(1)
        critic = Qwen2ForSequenceClassification(config)
    critic.save_pretrained(folder / "critic")
    return Paths(
        random_checkpoint(folder / "actor", 0),
        folder / "critic",
        random_checkpoint(folder / "reference", 2),
    )


def recipe_of(
    paths: Paths,
    *,
    zero_stage: int = 0,
    offload: str = "none",
    dtype: str = "float32",
    **ppo: Any,
) -> Recipe:
    model: dict[str, Any] = {"critic": str(paths.critic), "dtype": dtype}
    if paths.reference is not None:
        model["reference"] = str(paths.reference)
    told = {"rule": "value-gated", "value": "critic", "value_head": str(paths.head)}
    processed = {"logprobs_mode": "processed_logprobs"} if "importance_cap" in ppo else {}
    return Recipe.model_validate(
        {
            "model": {"path": str(paths.actor), **model},
            "rollout": {"temperature": 0.7},
            "ppo": {**PPO, **ppo},
            "deepspeed": {
                "zero_stage": zero_stage,
                "offload": offload,
                "extra": EXTRA if zero_stage == 3 else {},
            },
            "servers": processed,
            "stopping": told if paths.head is not None else {},
        }
    )


def trainer(paths: Paths, **settings: Any) -> PpoTrainer:
    return PpoTrainer(recipe_of(paths, **settings))


def make_rollouts() -> list[Rollout]:
    """Of all ends, of all lengths down to one token, and an audited one longer than its sample."""
    rng = np.random.default_rng(5)
    rows = [
        (EndReason.COMPLETED, 12, 12, 1.0),
        (EndReason.EARLY_STOP, 7, 7, -1.0),
        (EndReason.LENGTH, 20, 20, -1.0),
        (EndReason.EARLY_STOP, 20, 9, -1.0),
        (EndReason.COMPLETED, 1, 1, 1.0),
    ]
    return [
        Rollout(
            problem=Problem("p", "p", "1"),
            prompt_ids=[2, *map(int, rng.integers(4, 15, prompt)), 3],
            token_ids=list(map(int, rng.integers(4, 40, tokens))),
            logprobs=rng.normal(-7.0, 3.0, tokens),
            max_logprobs=np.full(tokens, -1.0),
            text="",
            end=end,
            kept=kept,
            audited=kept < tokens,
            reward=reward,
            group=prompt % 2,
        )
        for prompt, (end, tokens, kept, reward) in enumerate(rows, 2)
    ]


def weights_of(trainer: PpoTrainer) -> dict[str, torch.Tensor]:
    """Actor's and critic's."""
    return {
        f"{name}.{key}": value.clone()
        for name in ("actor", "critic")
        if getattr(trainer, name) is not None
        for key, value in trainer.weights(name)
    }


def assert_same_update(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, share: float = 0.02
) -> None:
    """Adam moves a weight by about the learning rate whatever its gradient: compare in that unit.

    Where a gradient is as small as float32's noise its sign is chance, so a few may differ.
    """
    assert found.keys() == expected.keys()
    off = total = 0
    for name, value in expected.items():
        difference = (found[name] - value).abs()
        off += int((difference > share * LEARNING_RATE).sum())
        total += value.numel()
    assert off <= 2e-4 * total, f"{off} of {total} weights differ"
