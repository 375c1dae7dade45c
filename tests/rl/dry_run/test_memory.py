"""How many parameters a model has, and what they and the rest of a run take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from espo_rl.config import Recipe
from espo_rl.dry_run.footprint import Machine
from espo_rl.dry_run.memory import Part, activation_parts, checkpoint_bytes, training_parts
from espo_rl.dry_run.plan import load_shape, make_plan
from espo_rl.types import EndReason, Problem, Rollout
from tests.helpers.models import random_checkpoint
from tests.helpers.plans import LAPTOP, qwen


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_exact(tmp_path: Path, tied: bool) -> None:
    path = random_checkpoint(tmp_path, 0, tied=tied)
    for classifier, kind in (
        (False, AutoModelForCausalLM),
        (True, AutoModelForSequenceClassification),
    ):
        model = kind.from_pretrained(path, **({"num_labels": 1} if classifier else {}))
        shape = load_shape("model.path", str(path), classifier=classifier)
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.layers, shape.hidden, shape.intermediate) == (2, 128, 384)
    assert (shape.heads, shape.key_values) == (4, 64)


@pytest.mark.parametrize(("size", "millions"), [("0.5b", 494.0), ("1.5b", 1543.7), ("7b", 7615.6)])
def test_parameters_of_known_models(tmp_path: Path, size: str, millions: float) -> None:
    shape = load_shape("model.path", str(qwen(tmp_path, size)))
    assert shape.parameters / 1e6 == pytest.approx(millions, abs=0.1)


# -- memory and disk -------------------------------------------------------------------------------


def bytes_each(parts: list[Part], name: str) -> float:
    return sum(part.device for part in parts if name in part.name)


@pytest.mark.parametrize(
    ("dtype", "stage", "weights", "optimizer"),
    [
        # Read off DeepSpeed's engines in one process: bytes a parameter alive, by dtype.
        ("float32", 0, 4, 8),
        ("float32", 1, 4, 12),
        ("float32", 2, 4, 12),
        ("bfloat16", 0, 2, 12),
        ("bfloat16", 1, 2, 12),
        ("bfloat16", 2, 2, 12),
        ("bfloat16", 3, 2, 12),
    ],
)
def test_bytes_a_parameter(
    recipe_with: Callable[..., Recipe],
    tiny: Path,
    dtype: str,
    stage: int,
    weights: int,
    optimizer: int,
) -> None:
    recipe = recipe_with(f"model.dtype={dtype}", f"deepspeed.zero_stage={stage}")
    shape = load_shape("model.path", str(tiny))
    parts = training_parts(recipe, "actor", shape, ranks=1)
    assert bytes_each(parts, "weights") == weights * shape.parameters
    assert bytes_each(parts, "optimizer") == optimizer * shape.parameters
    split = training_parts(recipe, "actor", shape, ranks=4)
    assert bytes_each(split, "optimizer") == bytes_each(parts, "optimizer") / (4 if stage else 1)
    assert bytes_each(split, "weights") == bytes_each(parts, "weights") / (4 if stage == 3 else 1)


def test_offloading_moves_memory_to_the_machine(
    recipe_with: Callable[..., Recipe], tiny: Path
) -> None:
    shape, ranks = load_shape("model.path", str(tiny)), 4

    def sums(offload: str) -> tuple[float, float]:
        recipe = recipe_with("deepspeed.zero_stage=3", f"deepspeed.offload={offload}")
        parts = [p for p in training_parts(recipe, "actor", shape, ranks) if p.sure]
        return sum(p.device for p in parts), sum(p.host for p in parts) / shape.parameters

    assert sums("none") == (20 * shape.parameters / ranks, 0.0)
    assert sums("optimizer") == (4 * shape.parameters / ranks, 16.0)
    assert sums("all") == (0.0, 20.0)


def test_logits_grow_with_the_micro_batch(recipe_with: Callable[..., Recipe], tiny: Path) -> None:
    shape = load_shape("model.path", str(tiny))

    def logits(*overrides: str, longest: int = 100) -> float:
        parts = activation_parts(recipe_with(*overrides), [shape], longest)
        return bytes_each(parts, "logits")

    assert logits("ppo.micro_batch_tokens=1000") == 1000 * 44 * 4 * 5
    assert logits("ppo.micro_batch_tokens=1000", "ppo.entropy_bonus=0.1") == 1000 * 44 * 4 * 6
    # One longer than the budget is alone in a micro-batch; and there are 128 samples at most.
    assert logits("ppo.micro_batch_tokens=50") == 100 * 44 * 4 * 5
    assert logits("ppo.micro_batch_tokens=1000000") == 12_800 * 44 * 4 * 5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_is_as_large_as_planned(
    recipe_with: Callable[..., Recipe], tmp_path: Path, stage: int
) -> None:
    from espo_rl.ppo.trainer import PpoTrainer

    recipe = recipe_with(f"deepspeed.zero_stage={stage}")
    trainer = PpoTrainer(recipe)
    ends = [-1.0, 1.0]
    trainer.update(
        [
            Rollout(
                problem=Problem("1", "1", "1"),
                prompt_ids=[1, 2],
                token_ids=[5] * 8,
                logprobs=np.full(8, -1.0),
                max_logprobs=np.full(8, -1.0),
                text="",
                end=EndReason.COMPLETED,
                kept=8,
                reward=reward,
            )
            for reward in ends
        ]
    )
    trainer.save(tmp_path / "checkpoint")
    files = [path for path in (tmp_path / "checkpoint").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    shapes = make_plan(recipe, LAPTOP).shapes
    planned = checkpoint_bytes(recipe, [shapes["actor"], shapes["critic"]])
    assert size == pytest.approx(planned, rel=0.1)


def test_what_is_here() -> None:
    here = Machine.here()
    assert 0 < here.ram <= psutil.virtual_memory().total
    assert here.cpus >= 1
