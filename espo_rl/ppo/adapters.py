"""LoRA (arXiv 2106.09685): weights that stay as they are, with small trained factors beside them.

The factors are peft's. Servers and checkpoints for others get weights with the factors in them
(`parameters.gathered`), made anew from the untouched ones each time, so that nothing drifts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from espo_gateway.optional import needed
from espo_rl.config import Model
from espo_rl.ppo.parameters import ADAPTER


class AdapterError(ValueError):
    """A model cannot be trained by adapters as asked; the message names the key."""


def adapt(model: Any, settings: Model | None) -> None:
    """Of a policy, freeze its weights and put adapters, which change nothing yet, beside its linear
    layers; of a classifier, freeze all but its head. In place; without `lora_rank` nothing happens.

    Raises:
        AdapterError: peft is not installed, or the policy has no linear layers of such names.
    """
    if settings is None or settings.lora_rank is None:
        return
    if hasattr(model, "score"):
        model.requires_grad_(False)
        model.score.requires_grad_(True)
        return
    head = model.get_output_embeddings()
    named = f"model.lora_targets = {settings.lora_targets}"
    try:
        linear = needed("peft.tuners.lora.layer", "lora").Linear
        needed("peft", "lora").inject_adapter_in_model(_config(settings), model)
    except ImportError as error:
        raise AdapterError(f"model.lora_rank: {error}") from error
    except ValueError as error:
        raise AdapterError(f"{named}: {error}") from error
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer") and (
            not isinstance(layer, linear) or layer.base_layer is head
        ):
            raise AdapterError(f"{named}: {name} is no linear layer before the head: leave it out")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ADAPTER in name)


def _config(settings: Model) -> Any:
    return needed("peft", "lora").LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * (settings.lora_rank or 0),
        target_modules=settings.lora_targets or "all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=settings.path,
    )


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before any training; nothing is learnt meanwhile."""
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "base_layer")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(folder: Path, factors: Mapping[str, Tensor], settings: Model) -> None:
    """Write what `peft.PeftModel.from_pretrained(base, folder)` reads; factors: by their names."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    _config(settings).save_pretrained(folder)
    named = {
        f"base_model.model.{name.replace('.default.', '.')}": tensor.contiguous()
        for name, tensor in factors.items()
    }
    save_file(named, folder / "adapter_model.safetensors")
