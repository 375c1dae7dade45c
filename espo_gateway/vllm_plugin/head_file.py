"""A head of V in a folder, as `python -m espo_rl.pretrain_critic --head-only --layers N` leaves it.

It is a critic of the policy's first layers, of which only the head is read: the layers are the
policy's. Knows torch and nothing of vLLM, as who trains the policy reads it as well.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from espo_gateway.vllm_plugin.checkpoint_shape import Shape, check_fits


def read_head(folder: Path, *, layers: int, hidden_size: int) -> tuple[int, torch.Tensor]:
    """A head for a model of so many layers, of so wide states.

    Returns:
        on how many layers it stands, and its weights, float32 [hidden size].

    Raises:
        ValueError: the folder holds none, or one of another model; and what does.
    """
    found, weights = _read(folder)
    check_fits(folder, Shape(found, len(weights)), Shape(layers, hidden_size))
    return found, weights


def fingerprint(folder: Path) -> str:
    """By which two heads are told apart; raises ValueError as `read_head` does."""
    layers, weights = _read(folder)
    return hashlib.sha256(b"%d " % layers + weights.numpy().tobytes()).hexdigest()[:16]


def _read(folder: Path) -> tuple[int, torch.Tensor]:
    try:
        layers = int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                if "score.weight" in tensors.keys():  # noqa: SIM118 (no mapping)
                    return layers, tensors.get_tensor("score.weight").float().flatten()
        problem = "no file of it holds score.weight"
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ValueError(
        f"{folder}: no head of V ({problem}); make one with "
        "`python -m espo_rl.pretrain_critic ROLLOUTS --model POLICY --head-only --layers N`"
    )
