"""How long a run takes on this machine, roughly: a second of measuring, then arithmetic.

Every rollout is taken to run to its limit, so it is a bound as far as the assumptions hold: what
nobody counts here, such as starting servers, grading and evaluations, is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from espo_rl.config import Recipe
from espo_rl.dry_run import memory
from espo_rl.dry_run.memory import Shape

#: of what a large matrix product reaches, what training and sampling do: on two CPU cores the
#: update of a 135M model got 0.5 of it, sampling from one of 0.5B 0.4
REACHED = 0.4
#: of one decoding step, whatever the model: vLLM's own work
STEP = 0.005


@dataclass(frozen=True)
class Speed:
    """Of one device. flops: a second, in the recipe's dtype. bandwidth: bytes a second read."""

    flops: float
    bandwidth: float

    @classmethod
    def here(cls, recipe: Recipe) -> Speed:
        """Measured on this machine, on its first GPU if there is one."""
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        size = 8192 if on_gpu else 1024
        dtype = getattr(torch, recipe.model.dtype)
        square = torch.ones(size, size, dtype=dtype, device=device)
        long = torch.ones((1 << 28) if on_gpu else (1 << 25), dtype=torch.float32, device=device)

        def seconds(work: Callable[[], torch.Tensor]) -> float:
            taken = []
            for _ in range(4):
                begin = time.perf_counter()
                work().flatten()[0].item()  # done, on whatever device
                taken.append(time.perf_counter() - begin)
            return min(taken)

        product, read = seconds(lambda: square @ square), seconds(long.sum)
        return cls(2.0 * size**3 / product, 4.0 * len(long) / read)


@dataclass(frozen=True)
class Hours:
    """Of a whole run, at most."""

    sampling: float
    updates: float

    @classmethod
    def of(
        cls, recipe: Recipe, shapes: Mapping[str, Shape], prompt: int, ranks: int, speed: Speed
    ) -> Hours:
        """
        shapes: by model: actor, critic and reference, those there are.
        prompt: tokens of the longest one.
        """
        rollout, ppo, actor = recipe.rollout, recipe.ppo, shapes["actor"]
        flops = REACHED * speed.flops
        rollouts = rollout.prompts_per_step * rollout.n
        servers = len(recipe.servers.policy_urls) or recipe.servers.policy_servers
        at_once = min(rollouts, rollout.concurrency)
        each = max(
            memory.width(recipe) * actor.parameters / speed.bandwidth,
            2.0 * actor.parameters * at_once / servers / flops,
        )
        sampling = rollout.max_tokens * -(-rollouts // at_once) * (STEP + each)
        # A prompt stands once for all its rollouts.
        tokens = rollouts * rollout.max_tokens + rollout.prompts_per_step * prompt
        passes = 0.0
        for name, shape in shapes.items():
            forward = 2.0 * shape.parameters
            if name == "reference":
                passes += forward
                continue
            # Backward: the gradient of what comes in, and that of the weights that learn.
            learning = forward + forward + 2.0 * shape.trained
            learning += forward * recipe.model.gradient_checkpointing
            before = name == "critic" or ppo.epochs * ppo.minibatches > 1
            passes += ppo.epochs * learning + forward * before
        updates = tokens * passes / flops / ranks
        return cls(*(recipe.run.steps * x / 3600.0 for x in (sampling, updates)))
