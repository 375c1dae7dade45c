"""The worker's side of a weight update: safetensors files into the running model.

Owns the reload of one worker's model. An update is all or nothing: whatever can be wrong with the
files is found out before the model is touched. The trainer offers its weights as files in shared
memory (`/proc/<pid>/fd/<n>` of a memfd: nothing to leave behind), or as any file on a disk that
both can read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info


@dataclass
class SafetensorsInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the files describe themselves."""


@dataclass
class SafetensorsUpdateInfo(WeightTransferUpdateInfo):
    """paths: the safetensors files that together hold the whole model."""

    paths: list[str]


class SafetensorsWeightTransferEngine(
    WeightTransferEngine[SafetensorsInitInfo, SafetensorsUpdateInfo]
):
    """Loads a whole model from safetensors files, through vLLM's layer-wise reload."""

    init_info_cls = SafetensorsInitInfo
    update_info_cls = SafetensorsUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        # Read now: the checkpoint that the server started from may be gone later.
        self._expected = checkpoint_shapes(vllm_config, model)
        self._torn = False

    def init_transfer_engine(self, init_info: SafetensorsInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Nothing yet: the model is not touched before the files have been checked."""

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Check the files, then load them.

        Raises:
            ValueError: when the files cannot be read or are not exactly this model; the model is
                as it was.
            RuntimeError: when loading failed half-way; the model cannot serve any more.
        """
        # The base class synchronizes unconditionally, which fails where there is no accelerator.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SafetensorsUpdateInfo) -> None:
        """See `update_weights`."""
        if self._torn:
            raise RuntimeError("an earlier update failed half-way: restart this server")
        with ExitStack() as opened:
            files = [open_safetensors(path, opened) for path in update_info.paths]
            shapes = {
                name: tuple(file.get_slice(name).get_shape())
                for file in files
                for name in file.offset_keys()
            }
            tied = getattr(self.model_config.hf_text_config, "tie_word_embeddings", False)
            ignored = {"lm_head.weight"} if tied else set()
            check_complete(shapes, self._expected, ignored)
            # From here to the end the model is no model: parameters live on the meta device.
            # Should anything fail, a forward pass fails too; a mix of two policies never samples.
            self._torn = True
            reload(self.model, self.model_config, read_tensors(files, ignored))
            self._torn = False
            # A server that read no checkpoint (`--load-format dummy`) learns here what is whole.
            self._expected = self._expected or shapes

    def finish_weight_update(self) -> None:
        """Nothing left: the update was whole."""

    def shutdown(self) -> None:
        """Nothing is held."""


def checkpoint_shapes(vllm_config: VllmConfig, model: torch.nn.Module) -> dict[str, tuple]:
    """Names and shapes that vLLM's own loader fed this model; empty where it read no checkpoint."""
    loader = get_model_loader(vllm_config.load_config)
    if not hasattr(loader, "get_all_weights"):
        return {}
    weights = loader.get_all_weights(vllm_config.model_config, model)
    return {name: tuple(tensor.shape) for name, tensor in weights}


def open_safetensors(path: str, opened: ExitStack) -> safe_open:
    """Map a file; the error of an unreadable one names it."""
    try:
        return opened.enter_context(safe_open(path, framework="pt", device="cpu"))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read weights from {path}: {error}") from error


def check_complete(
    shapes: dict[str, tuple], expected: dict[str, tuple], ignored: Iterable[str]
) -> None:
    """Raise ValueError unless the files hold what the model was first loaded with, no less or more.

    vLLM itself would take a part of the weights without a word and serve a mix of two policies.
    """
    if not shapes:
        raise ValueError("no weights given")
    if not expected:
        return
    shapes = {name: shape for name, shape in shapes.items() if name not in ignored}
    expected = {name: shape for name, shape in expected.items() if name not in ignored}
    problems = [
        *(f"missing {name}" for name in sorted(expected.keys() - shapes.keys())),
        *(f"unknown {name}" for name in sorted(shapes.keys() - expected.keys())),
        *(
            f"{name} has shape {list(shapes[name])}, not {list(expected[name])}"
            for name in sorted(shapes.keys() & expected.keys())
            if shapes[name] != expected[name]
        ),
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"not this model's weights: {', '.join(problems[:5])}{more}")


def read_tensors(
    files: Iterable[safe_open], ignored: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in the order of the file, mapped, not copied; `load_weights` moves them."""
    for file in files:
        for name in file.offset_keys():
            if name not in ignored:
                yield name, file.get_tensor(name)


def reload(model: Any, model_config: object, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """vLLM's layer-wise reload, with two silences of it mended.

    A layer that got no weights keeps its old ones with only a line in the log. Here that is an
    error, unless its weight is tied to a layer that was loaded. And a tied LM head on CPU computes
    with a packed copy of the old weight: it is packed again.
    """
    initialize_layerwise_reload(model)
    model.load_weights(weights)
    untouched = {}
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if info.can_load() and info.load_numel == 0 and info.kernel_tensors is not None:
            untouched[name] = layer
    finalize_layerwise_reload(model, model_config)

    fresh = {
        id(parameter)
        for name, layer in model.named_modules()
        if name not in untouched
        for parameter in layer.parameters(recurse=False)
    }
    for name, layer in untouched.items():
        if any(id(parameter) not in fresh for parameter in layer.parameters(recurse=False)):
            raise RuntimeError(f"no weights were loaded into {name}: restart this server")
        if hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)
