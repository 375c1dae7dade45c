"""A model's parameters one by one, whole, whatever the ZeRO stage: what is published and saved."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

#: in the names of peft's own parameters
ADAPTER = ".lora_"


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
        model: Hugging Face model, sharded by ZeRO-3 or not, with adapters or without.
        dtype: what to send; each parameter's own when not given.
    """
    return [
        TensorSpec(name, dtype or parameter.dtype, full_shape(parameter))
        for name, parameter, _ in _plain(model)
    ]


def full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape before ZeRO-3 took it apart."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gathered(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's parameters one by one, each whole only while it is used.

    What adapters add to one is in it: a copy, the parameter itself stays as it is. Under ZeRO-3
    gathering is a collective: every rank must go through the whole iterator.
    """
    for name, parameter, layer in _plain(model):
        if layer is None:
            with whole(parameter):
                yield name, parameter.detach()
            continue
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with whole(parameter, first, second), torch.no_grad():
            added = layer.scaling["default"] * (second.float() @ first.float())
            if layer.fan_in_fan_out:
                added = added.T
            yield name, dithered(parameter.float() + added, parameter.dtype, name)


def dithered(exact: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """float32 numbers as bfloat16, rounded up or down by chance, so right in the mean.

    A published weight is a bfloat16 number. Rounded to the nearest, what early training adds to it
    would be lost, of every weight, until it is half of the step to the next such number: tens of
    updates at usual rates. Each weight of a name has its own threshold, always the same, so weights
    that have not moved stay as they are, and those that have are the same each time.
    """
    if dtype != torch.bfloat16:
        return exact.to(dtype)
    generator = torch.Generator(exact.device).manual_seed(zlib.crc32(name.encode()))
    below = torch.randint(
        2**16, exact.shape, generator=generator, dtype=torch.int32, device=exact.device
    )
    # The upper half of a float32 is a bfloat16: a carry out of the lower half rounds up, by size.
    return ((exact.view(torch.int32) + below) & -(2**16)).view(torch.float32).to(dtype)


def adapters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapters' own parameters, in the same way."""
    for name, parameter in model.named_parameters():
        if ADAPTER in name:
            with whole(parameter):
                yield name, parameter.detach()


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer moves."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _plain(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter, Any]]:
    """Parameters of the model without adapters, by its own names; with the layer, if adapted."""
    adapted = {
        f"{name}.base_layer.weight": layer
        for name, layer in model.named_modules()
        if hasattr(layer, "base_layer")
    }
    for name, parameter in model.named_parameters():
        if ADAPTER not in name:
            yield name.replace(".base_layer.", "."), parameter, adapted.get(name)


@contextmanager
def whole(*parameters: torch.nn.Parameter) -> Iterator[None]:
    """Under ZeRO-3 a collective: parameters of any rank are whole meanwhile."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield
