"""Liger's fused kernels for GPUs (https://github.com/linkedin/Liger-Kernel), by `model.liger`."""

from __future__ import annotations

from typing import Any

from espo_gateway.optional import needed
from espo_rl.config import Model


class KernelError(ValueError):
    """They cannot be used as asked; the message names the key."""


def check_liger(settings: Model, *, on_gpu: bool) -> None:
    """Raise KernelError where `model.liger` asks for kernels that are not there."""
    if not settings.liger:
        return
    if not on_gpu:
        raise KernelError("model.liger = true: these kernels run on GPUs alone; leave it out")
    try:
        needed("liger_kernel", "gpu")
    except ImportError as error:
        raise KernelError(f"model.liger: {error}") from error


def fuse(model: Any, settings: Model) -> None:
    """Norms, rotary positions and feed-forward layers, in place. Not the loss: logits are never
    whole as it is (`policy.py`)."""
    if settings.liger:
        from transformers.integrations.liger import apply_liger_kernel

        fused = {"rope": True, "rms_norm": True, "swiglu": True}
        whole = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        apply_liger_kernel(model, fused | whole)
