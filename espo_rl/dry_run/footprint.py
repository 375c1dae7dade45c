"""Does a run fit on a machine, and if not, which settings would make it fit?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from espo_gateway.vllm_plugin.__main__ import last_value
from espo_rl.config import Recipe, RecipeError
from espo_rl.dry_run import memory
from espo_rl.dry_run.memory import Part, Shape

#: what vLLM takes of a GPU without --gpu-memory-utilization
VLLM_SHARE = 0.9


@dataclass(frozen=True)
class Machine:
    """What there is; memory in bytes. slow_bfloat16: it is far slower than float32 there."""

    cpus: int
    ram: float
    gpus: tuple[float, ...] = ()
    slow_bfloat16: bool = False

    @classmethod
    def here(cls) -> Machine:
        """This one, or what its container may have of it."""
        ram = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        for limit in ("memory.max", "memory/memory.limit_in_bytes"):
            try:
                ram = min(ram, float(Path("/sys/fs/cgroup", limit).read_text()))
            except (OSError, ValueError):  # no such file, or "max"
                continue
        gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        memories = tuple(float(gpu.total_memory) for gpu in gpus)
        # A CPU without AVX-512 takes eight times as long for a product of matrices.
        slow = not memories and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
        return cls(len(os.sched_getaffinity(0)), ram, memories, slow)

    def __str__(self) -> str:
        gpus = f"{len(self.gpus)} × {min(self.gpus) / 1e9:,.0f} GB GPU" if self.gpus else "no GPU"
        return f"{self.cpus} cores, {self.ram / 1e9:,.1f} GB RAM, {gpus}"


def tensor_parallel(arguments: list[str]) -> int:
    """On how many GPUs vLLM splits a model."""
    given = last_value(arguments, "--tensor-parallel-size") or last_value(arguments, "-tp") or "1"
    if not given.isdecimal() or not int(given):
        raise RecipeError(f"servers.vllm_args: --tensor-parallel-size {given} is no number of GPUs")
    return int(given)


@dataclass(frozen=True)
class Footprint:
    """A run on a machine. Rank i of the trainer is on GPU i; servers are on the first GPUs, those
    with GPUs of their own (servers.policy_gpus) on none of the trainer's.

    Args:
        shapes: by model: actor, critic and reference, those there are.
        longest: tokens of the longest sample.
    """

    recipe: Recipe
    shapes: Mapping[str, Shape]
    longest: int
    machine: Machine
    ranks: int

    @property
    def parts(self) -> list[Part]:
        """All that takes memory; devices are those of rank 0, on which the servers are as well."""
        recipe, servers = self.recipe, self.recipe.servers
        trained = {name: shape for name, shape in self.shapes.items() if name != "reference"}
        parts = []
        for name, shape in trained.items():
            parts += memory.training_parts(recipe, name, shape, self.ranks)
        if "reference" in self.shapes:
            reference = self.shapes["reference"]
            parts.append(memory.frozen_part(recipe, "reference", reference, self.ranks))
        parts += memory.activation_parts(recipe, list(trained.values()), self.longest)
        sent = self._weights("actor")
        if not servers.policy_urls:
            count = servers.policy_servers
            name = "policy server" if count == 1 else f"{count} policy servers"
            part = self._server(name, "actor", servers.vllm_args, count)
            parts.append(replace(part, device=0.0) if servers.policy_gpus else part)
        if recipe.asks_critic:
            sent += self._weights("critic")
            if servers.critic_url is None:
                part = self._server("critic server", "critic", servers.critic_vllm_args, 1)
                parts.append(replace(part, device=0.0) if servers.critic_gpus else part)
        return [*parts, Part("weights on their way to the servers", 0.0, sent)]

    def demand(self, *, sure: bool = False) -> tuple[float, float]:
        """Bytes on the busiest GPU, and in RAM. sure: without what is only roughly known."""
        counted = [part for part in self.parts if part.sure or not sure]
        device = sum(part.device for part in counted)
        host = sum(part.host for part in counted) + self.ranks * memory.PROCESS * (not sure)
        if not self.machine.gpus:
            return 0.0, host + self.ranks * device
        return device + memory.PROCESS * (not sure), host

    def judge(self) -> tuple[list[str], list[str]]:
        """What keeps the run from fitting, and what may."""
        errors: list[str] = []
        warnings: list[str] = []
        machine = self.machine
        places = [("RAM", 1, machine.ram)]
        if machine.gpus:
            places.append(("a GPU", 0, min(machine.gpus)))
            self._judge_server(errors, warnings)
        for place, index, there in places:
            for sure, verdict, found in ((True, "does", errors), (False, "may", warnings)):
                needed = self.demand(sure=sure)[index]
                if needed > there:
                    found.append(
                        f"{verdict} not fit: {needed / 1e9:,.1f} GB in {place} of "
                        f"{there / 1e9:,.1f} GB; {self._advice(index, there)}"
                    )
                    break
        return errors, warnings

    def _weights(self, name: str) -> float:
        return float(memory.width(self.recipe) * self.shapes[name].parameters)

    def _server(self, name: str, model: str, arguments: list[str], count: int) -> Part:
        if self.machine.gpus:
            return Part(f"{name}: vLLM's share", count * self._taken(arguments))
        cache = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 1) * 2**30
        return Part(name, 0.0, count * (self._weights(model) + cache + memory.PROCESS))

    def _taken(self, arguments: list[str]) -> float:
        """What one server takes of each of its GPUs."""
        share = float(last_value(arguments, "--gpu-memory-utilization") or VLLM_SHARE)
        return share * min(self.machine.gpus)

    def _judge_server(self, errors: list[str], warnings: list[str]) -> None:
        """Whether weights and sequences of full length fit in what the policy server takes."""
        recipe, servers = self.recipe, self.recipe.servers
        if servers.policy_urls:
            return
        split = tensor_parallel(servers.vllm_args)
        taken = split * self._taken(servers.vllm_args)
        room = taken - self._weights("actor") - split * memory.PROCESS
        one = memory.cache_bytes(recipe, self.shapes["actor"], self.longest)
        at_once = int(servers.policy_servers * room / one)
        if room < one:
            errors.append(
                f"policy server: vLLM may take {taken / 1e9:,.1f} GB, but the weights and one "
                f"sequence need {(taken - room + one) / 1e9:,.1f} GB: raise "
                "--gpu-memory-utilization or --tensor-parallel-size in servers.vllm_args"
            )
        elif at_once < recipe.rollout.concurrency:
            warnings.append(
                f"policy server: {at_once} rollouts of full length fit at once; of "
                f"rollout.concurrency = {recipe.rollout.concurrency} some will wait"
            )

    def _advice(self, index: int, there: float) -> str:
        """The fewest settings that would make it fit; those that cost little come first."""

        def fits(changes: dict[str, Any]) -> bool:
            trial = replace(self, recipe=_changed(self.recipe, changes))
            # Elsewhere it must not become worse: offloading fills the RAM.
            limits = (min(self.machine.gpus, default=0.0), self.machine.ram)
            return all(
                need <= max(limit, before * (place != index))
                for place, (need, limit, before) in enumerate(
                    zip(trial.demand(), limits, self.demand(), strict=True)
                )
            )

        everywhere = replace(self, ranks=len(self.machine.gpus))
        if index == 0 and self.ranks < everywhere.ranks and everywhere.demand()[0] <= there:
            return f"start a rank on each GPU (deepspeed --num_gpus {everywhere.ranks})"
        candidates: dict[str, Any] = {
            "model.gradient_checkpointing": True,
            "ppo.micro_batch_tokens": self.longest,
            "model.dtype": "bfloat16",
            "deepspeed.zero_stage": 3,
            "deepspeed.offload": "optimizer",
        }
        changes: dict[str, Any] = {}
        for key, value in candidates.items():
            changes[key] = value
            if fits(changes):
                for other in list(changes):
                    fewer = {name: kept for name, kept in changes.items() if name != other}
                    changes = fewer if fits(fewer) else changes
                return "set " + ", ".join(
                    f"{name}={str(kept).lower()}" for name, kept in changes.items()
                )
        where = "more or larger GPUs" if index == 0 else "a machine with more memory"
        return f"it takes {where}, or a smaller model"


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        updated = getattr(recipe, section).model_copy(update={key: value})
        recipe = recipe.model_copy(update={section: updated})
    return recipe
