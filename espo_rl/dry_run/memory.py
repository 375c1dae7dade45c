"""How much memory and disk a run takes, part by part. Arithmetic only: nothing is loaded.

Weights, optimizer states and checkpoints are exact up to per cents; activations are rough. Bytes
per parameter follow DeepSpeed 0.19 (https://www.deepspeed.ai/docs/config-json/) and were checked
against its engines; those per token against what torch keeps for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from espo_rl.config import Recipe
from espo_rl.ppo.parameters import trained

#: numbers in a slice of a micro-batch's logits on a GPU (`ppo/policy.py`), and float32 copies of it
#: alive at once, at most; models with soft caps or scales have whole ones
LOGIT_SLICE = 1 << 25
LOGIT_COPIES, LOGIT_COPIES_WITH_BONUS = 5, 6
#: DeepSpeed's defaults, in numbers: gradients reduced at once, parameters whole at once
BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000
#: what a process takes before it holds any model: Python, torch, and on a GPU the context
PROCESS = 1.0e9


@dataclass(frozen=True)
class Shape:
    """What memory depends on in a model."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_values: int  # numbers kept a token and layer for keys, as many again for values
    vocabulary: int
    positions: int  # longest text it knows
    trained: int  # of the parameters

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Of a transformers model, which may be on the meta device."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            trained=sum(parameter.numel() for parameter in trained(model)),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads=heads,
            key_values=(getattr(config, "num_key_value_heads", None) or heads) * size,
            vocabulary=config.vocab_size,
            positions=config.max_position_embeddings,
        )


@dataclass(frozen=True)
class Part:
    """Memory of one part, in bytes: on the device of each rank (or server), and on the machine.

    sure: not a rough estimate; only these count when a recipe is refused.
    """

    name: str
    device: float
    host: float = 0.0
    sure: bool = True


def width(recipe: Recipe) -> int:
    """Bytes of a number in the recipe's dtype."""
    return 2 if recipe.model.dtype == "bfloat16" else 4


def training_parts(recipe: Recipe, name: str, shape: Shape, ranks: int) -> list[Part]:
    """A model in training: weights, and gradients and Adam's states of what is trained of them
    (device: of each rank)."""
    stage, offload = recipe.deepspeed.zero_stage, recipe.deepspeed.offload
    size, count = width(recipe), shape.trained
    split = ranks if stage >= 1 else 1
    # Plain float32 training has no copy of the weights for the optimizer.
    master = 0 if stage == 0 and size == 4 else 4
    states = (master + 8) * count / split
    weights = size * shape.parameters / (ranks if stage == 3 else 1)
    gradients = size * count / (ranks if stage >= 2 else 1)
    if stage == 0 and size == 2:
        gradients += 4 * count  # the optimizer takes them in float32
    parts = []
    if offload == "all":
        parts.append(Part(f"{name}: weights", 0.0, weights * ranks))
    else:
        parts.append(Part(f"{name}: weights", weights))
    if offload == "none":
        parts += [
            Part(f"{name}: gradients", gradients),
            Part(f"{name}: optimizer states", states),
        ]
    else:
        held = 4 * count / split if stage >= 2 else 0.0
        parts += [
            Part(f"{name}: gradients", 0.0 if held else gradients, held * ranks),
            Part(f"{name}: optimizer states", 0.0, states * ranks),
        ]
    if stage:
        zero = recipe.deepspeed.extra.get("zero_optimization", {})
        bucket = zero.get("reduce_bucket_size", BUCKET)
        live = zero.get("stage3_max_live_parameters", LIVE_PARAMETERS)
        whole = min(live, shape.parameters) if stage == 3 else 0
        bucket = bucket if stage == 3 else min(bucket, count)
        parts.append(Part(f"{name}: DeepSpeed's buffers", size * (bucket + whole), sure=False))
    return parts


def frozen_part(recipe: Recipe, name: str, shape: Shape, ranks: int) -> Part:
    """A model that is only asked: sharded under ZeRO-3, else whole on every rank."""
    whole = width(recipe) * shape.parameters
    if recipe.deepspeed.zero_stage < 3:
        return Part(f"{name}: weights", whole)
    if recipe.deepspeed.offload == "all":
        return Part(f"{name}: weights", 0.0, whole)
    return Part(f"{name}: weights", whole / ranks)


def activation_parts(recipe: Recipe, models: Sequence[Shape], longest: int) -> list[Part]:
    """Of one micro-batch; the models take turns, so the larger one counts.

    Args:
        models: those in training, the actor first.
        longest: tokens of the longest sample; one longer than the budget is alone in a micro-batch.
    """
    rollouts = recipe.rollout.prompts_per_step * recipe.rollout.n
    tokens = min(max(recipe.ppo.micro_batch_tokens, longest), rollouts * longest)
    size = width(recipe)
    slice_ = min(tokens * models[0].vocabulary, LOGIT_SLICE)
    copies = LOGIT_COPIES_WITH_BONUS if recipe.ppo.entropy_bonus else LOGIT_COPIES

    def kept(shape: Shape) -> float:
        layer = 10 * shape.hidden + 4 * shape.intermediate
        layers = shape.layers
        if recipe.model.gradient_checkpointing:
            return layer + layers * shape.hidden
        return layers * layer

    return [
        Part("activations", tokens * size * max(map(kept, models)), sure=False),
        Part(
            f"logits: a slice of {slice_:,} × 4 bytes × {copies}",
            slice_ * 4 * copies,
            sure=False,
        ),
    ]


def cache_bytes(recipe: Recipe, shape: Shape, tokens: int) -> int:
    """Keys and values that a server keeps for so many tokens."""
    return tokens * 2 * shape.layers * shape.key_values * width(recipe)


def checkpoint_bytes(recipe: Recipe, models: Sequence[Shape]) -> int:
    """One checkpoint, of all ranks together: weights, the optimizer's copy of them, Adam's states;
    of what is trained.

    Under ZeRO-3 the copy alone is written.
    """
    stage, size = recipe.deepspeed.zero_stage, width(recipe)
    weights = 0 if stage == 3 else size
    master = 0 if stage == 0 and size == 4 else 4
    return (weights + master + 8) * sum(shape.trained for shape in models)


def rollout_bytes(recipe: Recipe, longest: int) -> float:
    """A step's rollouts on disk, at most: two logprobs, id and text a token, before compression."""
    rollouts = recipe.rollout.prompts_per_step * recipe.rollout.n
    return 16.0 * longest * rollouts
