"""DeepSpeed engines: their settings out of the recipe, and the few things asked of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espo_rl.config import Recipe
from espo_rl.ppo.parameters import trained
from espo_rl.ppo.stale_locks import remove_stale_locks


class Engine:
    """A model in training. With several ranks every method is a collective."""

    def __init__(self, recipe: Recipe, model: nn.Module, learning_rate: float) -> None:
        config = merged(training_config(recipe), recipe.deepspeed.extra)
        if config["optimizer"]["params"].get("torch_adam"):
            # One pass over weights and states, and no copies of them in between
            config["optimizer"]["params"].setdefault("fused", True)
        # Without ZeRO, DeepSpeed clips float32 gradients but forgets their norm: clip here then.
        clips_here = config["zero_optimization"]["stage"] == 0 and not config["bf16"]["enabled"]
        if clips_here:
            config["gradient_clipping"] = 0.0
        without_noise(model)
        self._rate, self._ppo = learning_rate, recipe.ppo
        self._scheduled = "scheduler" in config  # by deepspeed.extra
        # A group with its own rate, as the config's is the actor's.
        moved = trained(model)
        group = {"params": moved, "lr": learning_rate}
        # What is not trained comes from where the recipe says, and is in no checkpoint.
        self._partly = len(moved) < len(list(model.parameters()))
        deepspeed = import_deepspeed()
        self._engine = deepspeed.initialize(model=model, model_parameters=[group], config=config)[0]
        self.grad_norm = 0.0  # of the last step, before clipping
        self._norm: torch.Tensor | None = None
        if clips_here:
            self._engine.optimizer.register_step_pre_hook(self._clip)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def _clip(self, optimizer: Any, *_: object) -> None:
        """Runs once the ranks' gradients are averaged, right before the optimizer."""
        parameters = trained(self.module)
        self._norm = nn.utils.clip_grad_norm_(parameters, self._ppo.max_grad_norm)
        # As DeepSpeed's own optimizers do, and by the attribute that it reads off them.
        optimizer.overflow = not bool(self._norm.isfinite())
        if optimizer.overflow:
            for parameter in parameters:  # one without a gradient is left alone
                parameter.grad = None

    def begin(self, step: int) -> None:
        """Set rate, decay and clipping to what the recipe says of training step `step`, from 1.

        A checkpoint brings those of its own recipe along; what holds is this one's.
        """
        optimizer, ppo = self._engine.optimizer, self._ppo
        warmed = min(1.0, max(step, 1) / max(ppo.lr_warmup_steps, 1))
        for group in optimizer.param_groups:
            group["weight_decay"] = ppo.weight_decay
            if not self._scheduled:
                group["lr"] = self._rate * warmed
        if getattr(optimizer, "clip_grad", 0.0):
            optimizer.clip_grad = ppo.max_grad_norm

    @property
    def module(self) -> Any:
        """The model; under ZeRO-3 its parameters are sharded, see `parameters.gathered`."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def learning_rate(self) -> float:
        """Of the training step that has begun."""
        return float(self._engine.optimizer.param_groups[0]["lr"])

    def backward(self, loss: torch.Tensor) -> None:
        """Add to the gradient; over the ranks DeepSpeed takes the mean."""
        self._engine.backward(loss)

    def step(self) -> bool:
        """One optimizer step on the gradient so far.

        Returns:
            whether the gradient was finite; if not, nothing has moved, on no rank.
        """
        self._engine.step()
        norm = self._norm if self._norm is not None else self._engine.get_global_grad_norm()
        self.grad_norm = float(norm)
        return bool(self._engine.was_step_applied())

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write model, optimizer and `state` in DeepSpeed's format."""
        self._engine.save_checkpoint(
            str(folder), tag="state", client_state=state, exclude_frozen_parameters=self._partly
        )

    def load(self, folder: Path) -> dict[str, Any]:
        """Read what `save` wrote; returns its `state`.

        Raises:
            FileNotFoundError: there is no state: DeepSpeed itself goes on, or trips over it later.
        """
        if (folder / "state").is_dir():
            path, state = self._engine.load_checkpoint(
                str(folder), tag="state", load_module_strict=not self._partly
            )
            if path is not None:
                return dict(state)
        raise FileNotFoundError(f"no DeepSpeed state in {folder / 'state'}")


def without_noise(model: nn.Module) -> None:
    """Switch off for good all that makes a forward pass random: dropout, jitter, dropped layers.

    With it a policy's ratio to itself would not be 1. Models have it wherever their modules are in
    training, so none is; but transformers checkpoints gradients by the same attribute, in a layer's
    `__call__`. That alone gets to see it set.
    """
    model.eval()
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = True
            layer.register_forward_pre_hook(lambda layer, _: setattr(layer, "training", False))
            # Recomputing for the backward pass leaves a layer half-way, by an exception.
            layer.register_forward_hook(
                lambda layer, *_: setattr(layer, "training", True), always_call=True
            )


def frozen_engine(recipe: Recipe, model: nn.Module, device: torch.device) -> Any:
    """A model that is only asked: sharded under ZeRO-3, else a copy on every rank."""
    model.requires_grad_(False).eval()
    if recipe.deepspeed.zero_stage < 3:
        return model.to(device)
    config = training_config(recipe)
    for key in ("optimizer", "scheduler", "gradient_clipping", "managed_gradient_accumulation"):
        config.pop(key, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine = import_deepspeed().initialize(model=model, config=config)[0]
    engine.eval()
    return engine


def training_config(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's JSON config (https://www.deepspeed.ai/docs/config-json/) before `extra`."""
    ppo, offload = recipe.ppo, recipe.deepspeed.offload
    zero: dict[str, Any] = {"stage": recipe.deepspeed.zero_stage}
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        # Minibatches hold as many micro-batches as their tokens need: reduction and the optimizer
        # step happen in step(), however many backward() came before.
        "managed_gradient_accumulation": False,
        "gradient_clipping": ppo.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": ppo.learning_rate,
                "weight_decay": ppo.weight_decay,
                # DeepSpeed's own are compiled on first use, which needs a toolchain.
                "torch_adam": True,
            },
        },
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "steps_per_print": 2**31,
    }
    return config


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the changes laid over them, section by section."""
    result = dict(settings)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merged(old, value)
        result[key] = value
    return result


def import_deepspeed() -> Any:
    """Import DeepSpeed with a process group: its launcher's, or one of this process alone."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    alone = "WORLD_SIZE" not in os.environ
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it whatever the group
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if alone and not torch.distributed.is_initialized():
        # No rendezvous, no port, and nothing in the environment that a child might act on.
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    remove_stale_locks()
    deepspeed.init_distributed(backend)
    return deepspeed
