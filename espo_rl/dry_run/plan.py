"""A dry run: is the recipe whole, will it fit, what will it take? Starts nothing, loads no weights.

plan = make_plan(load_recipe("espo-7b"))
print(plan.text())
plan.check()        # RecipeError with all that is wrong
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from rich.console import Console
from rich.table import Table

from espo_gateway.vllm_plugin.__main__ import last_value
from espo_gateway.vllm_plugin.head_file import read_head
from espo_rl.config import Model, Recipe, RecipeError, check_model_folder
from espo_rl.dry_run import memory
from espo_rl.dry_run.footprint import Footprint, Machine, tensor_parallel
from espo_rl.dry_run.hours import Hours, Speed
from espo_rl.dry_run.memory import Shape
from espo_rl.ppo.adapters import AdapterError, adapt
from espo_rl.ppo.kernels import KernelError, check_liger
from espo_rl.rollouts.chat_template import check_chat_template
from espo_rl.rollouts.collector import Prompter
from espo_rl.tasks.graders import make_grader
from espo_rl.tasks.kinds import make_task
from espo_rl.tasks.task import TaskError

#: problems whose prompts are looked at
PROBLEMS = 512


@dataclass
class RunPlan:
    """What a run would be. `errors` keep it from starting, `warnings` do not."""

    recipe: Recipe
    machine: Machine
    ranks: int
    shapes: dict[str, Shape] = field(default_factory=dict)  # by model: actor, critic, reference
    prompt: str = ""  # the first, as the policy sees it
    longest_prompt: int = 0  # tokens, of those looked at
    footprint: Footprint | None = None  # where all models are known
    disk: dict[str, float] = field(default_factory=dict)  # bytes
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample there may be."""
        return self.longest_prompt + self.recipe.rollout.max_tokens

    def check(self) -> None:
        """Raise RecipeError with all errors."""
        if self.errors:
            raise RecipeError("\n".join(self.errors))

    def text(self, speed: Speed | None = None) -> str:
        """All of it for a person. speed: of the machine's devices, to say how long it takes."""
        console = Console(file=io.StringIO(), width=100, highlight=False, markup=False)
        recipe, rollouts = self.recipe, self.recipe.rollout.prompts_per_step * self.recipe.rollout.n
        facts = Table(box=None, show_header=False, pad_edge=False)
        for name, shape in self.shapes.items():
            facts.add_row(
                name,
                f"{shape.parameters / 1e6:,.2f} M parameters, {shape.layers} layers, "
                f"vocabulary {shape.vocabulary:,}, up to {shape.positions:,} tokens",
            )
        at_most = rollouts * recipe.rollout.max_tokens
        if self.longest_prompt:
            facts.add_row("first prompt", repr(self.prompt))
            facts.add_row(
                "prompts", f"up to {self.longest_prompt:,} tokens in the first {PROBLEMS}"
            )
        facts.add_row(
            "a step",
            f"{recipe.rollout.prompts_per_step} prompts × {recipe.rollout.n} = {rollouts:,} "
            f"rollouts, at most {at_most:,} tokens",
        )
        facts.add_row(
            "the run", f"{recipe.run.steps:,} steps, at most {at_most * recipe.run.steps:,} tokens"
        )
        facts.add_row("machine", f"{self.machine}; {self.ranks} trainer rank(s)")
        if speed is not None and "actor" in self.shapes:
            hours = Hours.of(recipe, self.shapes, self.longest_prompt, self.ranks, speed)
            facts.add_row(
                "hours",
                f"roughly {hours.sampling + hours.updates:,.1f} at most: {hours.sampling:,.1f} "
                f"sampling, {hours.updates:,.1f} updates, if no rollout ended before its limit "
                f"({speed.flops / 1e12:,.2g} TFLOP/s, {speed.bandwidth / 1e9:,.0f} GB/s measured)",
            )
        console.print(facts, "", sep="\n")
        if self.footprint is not None:
            console.print(_memory_table(self.footprint), "", sep="\n")
        if self.disk:
            rows = [(name, [size]) for name, size in self.disk.items()]
            console.print(_table("disk", ["GB"], rows), "", sep="\n")
        for title, messages in (("warning", self.warnings), ("ERROR", self.errors)):
            for message in messages:
                console.print(f"{title}: {message}", soft_wrap=True)
        if not self.errors:
            console.print("The recipe is whole and nothing speaks against a start.")
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()


def make_plan(recipe: Recipe, machine: Machine | None = None, ranks: int | None = None) -> RunPlan:
    """Look at everything that a run of the recipe needs.

    Args:
        machine: this one when not given.
        ranks: of the trainer; as the launcher says (WORLD_SIZE) when not given.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if ranks is None else ranks
    plan = RunPlan(recipe, machine or Machine.here(), ranks)
    checks = (
        _models,
        _value_head,
        _prompts,
        _grader,
        _ranks,
        _weight_transfer,
        _servers,
        _staleness,
        _length,
        _memory,
        _disk,
    )
    for check in checks:
        with _collected(plan):
            check(plan)
    plan.errors = list(dict.fromkeys(plan.errors))  # the critic may be the actor's folder
    return plan


@contextmanager
def _collected(plan: RunPlan) -> Iterator[None]:
    try:
        yield
    except (KernelError, RecipeError, TaskError) as error:
        plan.errors.append(str(error))


# -- checks ----------------------------------------------------------------------------------------


def _models(plan: RunPlan) -> None:
    model = plan.recipe.model
    with _collected(plan):
        check_liger(model, on_gpu=bool(plan.machine.gpus))
    if plan.machine.slow_bfloat16 and model.dtype == "bfloat16":
        plan.warnings.append(
            "model.dtype = 'bfloat16': a CPU without AVX-512 computes it several times slower than "
            "float32; set model.dtype=float32"
        )
    wanted = {"actor": ("model.path", model.path)}
    if plan.recipe.needs_critic:
        wanted["critic"] = ("model.critic", model.critic) if model.critic else wanted["actor"]
    if plan.recipe.needs_reference:
        given = ("model.reference", model.reference) if model.reference else wanted["actor"]
        wanted["reference"] = given
    for name, (key, path) in wanted.items():
        with _collected(plan):
            lora = None if name == "reference" else model
            plan.shapes[name] = load_shape(key, path, classifier=name == "critic", lora=lora)


def _value_head(plan: RunPlan) -> None:
    """That a head is of this model, and its V in the recipe's rewards."""
    head, ppo, actor = plan.recipe.stopping.head, plan.recipe.ppo, plan.shapes.get("actor")
    if head is None or actor is None:
        return
    try:
        read_head(head, layers=actor.layers, hidden_size=actor.hidden)
    except ValueError as error:
        raise RecipeError(f"stopping.value_head: {error}") from error
    try:
        report = json.loads((head / "report.json").read_text())
        worth = report["settings"]["wrong"], report["settings"]["right"]
        alone = report["head_only"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # not made by `pretrain_critic`: nobody knows
    if not alone:
        raise RecipeError(
            f"stopping.value_head: {head} is a critic whose layers were trained too, and are not "
            "the policy's: fit one with --head-only, or ask it as a critic server"
        )
    if worth != (ppo.wrong_reward, ppo.right_reward):
        raise RecipeError(
            f"stopping.value_head: {head} was fitted to rewards of {worth[0]:g} and {worth[1]:g}, "
            f"and the recipe's are ppo.wrong_reward = {ppo.wrong_reward:g} and ppo.right_reward = "
            f"{ppo.right_reward:g}: fit it with --wrong-reward and --right-reward as these"
        )


def load_shape(
    key: str, name: str, *, classifier: bool = False, lora: Model | None = None
) -> Shape:
    """The shape of a checkpoint, from its configuration alone.

    Args:
        lora: of a model in training: what it says of adapters.

    Raises:
        RecipeError: there is none, it cannot be reached, or transformers does not know its kind.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    check_model_folder(key, name)
    folder = Path(name)
    if folder.is_dir() and not any((*folder.glob("*.safetensors*"), *folder.glob("*.bin*"))):
        raise RecipeError(f"{key}: {folder} holds no weights (*.safetensors)")
    try:
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        if classifier:
            config.num_labels = 1
        with torch.device("meta"):
            model = kind.from_config(config)
            adapt(model, lora)
            return Shape.of(model)
    except AdapterError as error:
        raise RecipeError(str(error)) from error
    except Exception as error:  # transformers and the hub's client raise nearly anything
        if folder.is_dir():
            raise RecipeError(f"{key}: {folder} is no model that can be used: {error}") from error
        raise RecipeError(
            f"{key}: {name} cannot be reached on the Hugging Face hub; give a local folder, or "
            f"check name and network ({type(error).__name__})"
        ) from error


def _prompts(plan: RunPlan) -> None:
    from transformers import AutoTokenizer

    recipe = plan.recipe
    task = make_task(recipe.task)
    problems = list(islice(task.training(recipe.run.seed), PROBLEMS))
    if not (held_out := task.held_out(recipe.evaluation.problems)[:PROBLEMS]):
        raise TaskError(
            "task.train has too few problems to hold out a tenth for evaluation; give task.eval"
        )
    if "actor" not in plan.shapes:
        return
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(recipe.model.path)
    except Exception as error:
        raise RecipeError(
            f"model.path: the tokenizer of {recipe.model.path} cannot be loaded: {error}"
        ) from error
    check_chat_template(tokenizer, recipe.task, recipe.model.path)
    prompter = Prompter.of(tokenizer, recipe.task)
    prompts = [prompter(problem) for problem in [*problems, *held_out]]
    plan.prompt = tokenizer.decode(prompts[0])
    plan.longest_prompt = max(map(len, prompts))

    positions = plan.shapes["actor"].positions
    given = last_value(recipe.servers.vllm_args, "--max-model-len")
    limit = positions if given in ("", "auto", "-1") else _tokens(given)
    if limit > positions:
        plan.errors.append(
            f"servers.vllm_args: --max-model-len {given} is more than the model's {positions:,} "
            "positions; vLLM refuses it"
        )
    if plan.longest > limit:
        plan.errors.append(
            f"rollout.max_tokens = {recipe.rollout.max_tokens:,} and prompts of up to "
            f"{plan.longest_prompt:,} tokens come to {plan.longest:,}, but the policy server takes "
            f"{limit:,}: lower rollout.max_tokens"
            + (", or raise --max-model-len in servers.vllm_args" if given else "")
        )


def _grader(plan: RunPlan) -> None:
    make_grader(plan.recipe.task)


def _tokens(text: str) -> int:
    """vLLM's way to write a length: 4096, 4k = 4000, 4K = 4096."""
    scale = {"k": 1000, "K": 1024, "m": 1_000_000, "M": 1 << 20}.get(text[-1], 1)
    try:
        return int(float(text[:-1] if scale > 1 else text) * scale)
    except ValueError as error:
        raise RecipeError(f"servers.vllm_args: --max-model-len {text} is no number") from error


def _ranks(plan: RunPlan) -> None:
    if plan.machine.gpus and plan.ranks > len(plan.machine.gpus):
        raise RecipeError(
            f"{plan.ranks} ranks on {len(plan.machine.gpus)} GPUs: start fewer (--num_gpus)"
        )


def _weight_transfer(plan: RunPlan) -> None:
    way = plan.recipe.servers.weight_transfer
    if way in ("ipc", "nccl") and not plan.machine.gpus:
        raise RecipeError(
            f'servers.weight_transfer = "{way}" goes from GPU to GPU, and there is none: "auto"'
        )
    if way == "ipc" and plan.ranks > 1:
        raise RecipeError(
            'servers.weight_transfer = "ipc" is for one rank, whose GPU the server shares: with '
            f'{plan.ranks} ranks "shared-memory", or "nccl" and servers.policy_gpus'
        )
    if way == "nccl" and not (plan.recipe.servers.policy_urls or plan.recipe.servers.policy_gpus):
        raise RecipeError(
            'servers.weight_transfer = "nccl" needs servers on other GPUs than the trainer\'s: set '
            'servers.policy_gpus, or "ipc"'
        )


def _servers(plan: RunPlan) -> None:
    servers = plan.recipe.servers
    for key, arguments in (
        ("vllm_args", servers.vllm_args),
        ("critic_vllm_args", servers.critic_vllm_args),
    ):
        for flag in ("--port", "--host", "--model"):
            if last_value(arguments, flag):
                plan.errors.append(f"servers.{key}: {flag} is set by the run; leave it out")
        if last_value(arguments, "--value-head"):
            plan.errors.append(f"servers.{key}: --value-head is set by stopping.value_head")
    for url in [*servers.policy_urls, *([servers.critic_url] if servers.critic_url else [])]:
        address = urlsplit(url)
        try:
            port = address.port or {"https": 443}.get(address.scheme, 80)
            socket.create_connection((address.hostname or "", port), timeout=5.0).close()
        except (OSError, ValueError) as error:
            plan.warnings.append(f"servers: nothing answers at {url} yet: {error}")
    actor, split = plan.shapes.get("actor"), tensor_parallel(servers.vllm_args)
    if actor is not None and actor.heads % split:
        plan.errors.append(
            f"servers.vllm_args: --tensor-parallel-size {split} does not divide the model's "
            f"{actor.heads} attention heads"
        )
    if plan.machine.gpus and split > len(plan.machine.gpus):
        plan.errors.append(
            f"servers.vllm_args: --tensor-parallel-size {split}, but {len(plan.machine.gpus)} GPUs"
        )


def _staleness(plan: RunPlan) -> None:
    if plan.recipe.rollout.ahead and plan.recipe.ppo.importance_cap is None:
        plan.warnings.append(
            "rollout.schedule: tokens of older weights are trained on as those of the newest are: "
            "at a temperature other than 1 raw logprobs do not say how likely they were. Set "
            "servers.logprobs_mode = processed_logprobs"
        )


def _length(plan: RunPlan) -> None:
    """What begins only after the run's last step; a resumed one may be longer."""
    recipe = plan.recipe
    stopping, ppo, steps = recipe.stopping, recipe.ppo, recipe.run.steps
    waits = stopping.rule != "none" and stopping.warmup == "batches"
    for key, last, what in (
        ("ppo.critic_only_steps", ppo.critic_only_steps, "the actor learns nothing"),
        ("ppo.lr_warmup_steps", ppo.lr_warmup_steps - 1, "the learning rate is never all of it"),
        ("stopping.warmup_batches", stopping.warmup_batches * waits, "nothing is stopped"),
    ):
        if last >= steps:
            plan.warnings.append(
                f"{key}: {what} in run.steps = {steps}; lower it, or raise run.steps"
            )


def _memory(plan: RunPlan) -> None:
    wanted = {"actor"} | ({"critic"} if plan.recipe.needs_critic else set())
    if wanted <= plan.shapes.keys():
        plan.footprint = Footprint(plan.recipe, plan.shapes, plan.longest, plan.machine, plan.ranks)
        errors, warnings = plan.footprint.judge()
        plan.errors += errors
        plan.warnings += warnings


def _disk(plan: RunPlan) -> None:
    recipe, output = plan.recipe, plan.recipe.run.output
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RecipeError(f"run.output: cannot write to {there}; choose another folder")
    if "actor" not in plan.shapes:
        return
    trained = [plan.shapes[name] for name in ("actor", "critic") if name in plan.shapes]
    one = memory.checkpoint_bytes(recipe, trained)
    if recipe.checkpoints.every:
        # The new one is whole before the oldest goes.
        kept = recipe.checkpoints.keep + 1
        plan.disk[f"checkpoints: {kept} of {one / 1e9:,.2f} GB"] = kept * one
    plan.disk["trained models"] = memory.width(recipe) * sum(s.parameters for s in trained)
    if recipe.logs.rollouts:
        largest = memory.rollout_bytes(recipe, plan.longest) * recipe.run.steps
        plan.disk["rollouts, at most"] = min(largest, recipe.logs.rollouts_megabytes * 1e6)
    # What a run that goes on, or is overwritten, has there already is part of what it needs.
    held = sum(
        file.stat().st_size
        for part in ("checkpoints", "rollouts", "actor", "critic")
        for file in (output / part).rglob("*")
        if file.is_file()
    )
    needed, free = sum(plan.disk.values()), shutil.disk_usage(there).free + held
    plan.disk |= {"together": needed, "free, or the run's": free}
    if needed > free:
        raise RecipeError(
            f"run.output: {needed / 1e9:,.1f} GB are needed in {there}, {free / 1e9:,.1f} GB are "
            "free or the run's: lower checkpoints.keep, raise checkpoints.every, or choose another "
            "folder"
        )


def _memory_table(footprint: Footprint) -> Table:
    rows = [
        (part.name + ("" if part.sure else " (rough)"), [part.device, part.host])
        for part in footprint.parts
    ]
    gpus = footprint.machine.gpus
    table = _table("memory", ["GB on the first GPU" if gpus else "GB a rank", "GB RAM"], rows)
    table.add_section()
    table.add_row("together, with all ranks and processes", *map(_gigabytes, footprint.demand()))
    table.add_row("there is", *map(_gigabytes, (min(gpus, default=0.0), footprint.machine.ram)))
    return table


def _table(title: str, columns: list[str], rows: list[tuple[str, list[float]]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, min_width=44)
    for column in columns:
        table.add_column(column, justify="right")
    for name, numbers in rows:
        table.add_row(name, *map(_gigabytes, numbers))
    return table


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.3f}" if 0 < number < 1e9 else f"{number / 1e9:,.1f}" if number else ""
