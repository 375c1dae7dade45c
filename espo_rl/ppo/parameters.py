"""A model's parameters one by one, whole, whatever the ZeRO stage: what is published and saved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor in the file will be; known before the tensor itself is gathered."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_specs(model: torch.nn.Module, dtype: torch.dtype | None = None) -> list[TensorSpec]:
    """Specs of a model's parameters, in their order; a tied LM head is the embedding, listed once.

    Args:
        model: Hugging Face model, sharded by ZeRO-3 or not.
        dtype: what to send; each parameter's own when not given.
    """
    return [
        TensorSpec(name, dtype or parameter.dtype, full_shape(parameter))
        for name, parameter in model.named_parameters()
    ]


def full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape before ZeRO-3 took it apart."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gathered(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's parameters one by one, each whole only while it is used.

    Under ZeRO-3 gathering is a collective: every rank must go through the whole iterator.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach()
        else:
            yield name, parameter.detach()
