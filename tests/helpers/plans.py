"""Plans of runs on machines that are not there, with models of known shapes without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Qwen2Config

from espo_rl.base_model.train import make_tokenizer
from espo_rl.config import load_recipe
from espo_rl.dry_run.footprint import Machine
from espo_rl.dry_run.plan import RunPlan, make_plan

LAPTOP = Machine(cpus=2, ram=16e9)
EIGHT = Machine(cpus=64, ram=1e12, gpus=(96e9,) * 8)
QWEN = {  # https://huggingface.co/Qwen/Qwen2.5-0.5B, -1.5B and -7B, config.json
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}


def qwen(folder: Path, size: str, **changes: Any) -> Path:
    """A checkpoint's folder without its weights: nothing can read any."""
    config = Qwen2Config(
        **{"num_hidden_layers": 28, "max_position_embeddings": 131_072, **QWEN[size], **changes}
    )
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


def qwen_plan(
    tmp_path: Path, recipe: str, machine: Machine, ranks: int, *overrides: str
) -> RunPlan:
    size = recipe.removeprefix("espo-")
    if not (tmp_path / size).exists():
        # The distilled models have a head of their own.
        qwen(tmp_path / size, size, tie_word_embeddings=False)
    given = [f"model.path={tmp_path / size}", f"run.output={tmp_path}", "task.kind=arithmetic"]
    return make_plan(load_recipe(recipe, [*given, *overrides]), machine, ranks)


def one_gpu_plan(tmp_path: Path, size: str, *overrides: str) -> RunPlan:
    """Of the recipe for GSM8K, whose problems are on the hub."""
    folder = qwen(tmp_path / size, size)
    given = [f"model.path={folder}", f"run.output={tmp_path}", "task.kind=arithmetic"]
    recipe = load_recipe(f"qwen2.5-{size}-gsm8k", [*given, *overrides])
    return make_plan(recipe, Machine(cpus=16, ram=64e9, gpus=(24e9,)), 1)


def only_error(plan: RunPlan) -> str:
    (error,) = plan.errors
    return error
