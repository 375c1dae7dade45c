"""This project's side: rollouts from a vLLM server through the gateway, update, sync of weights."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from espo_rl.config import Recipe
from espo_rl.ppo.trainer import PpoTrainer
from espo_rl.rollouts import collector as collecting
from espo_rl.rollouts.collector import Collector, Prompter
from espo_rl.servers.fleet import open_fleet
from espo_rl.servers.served_models import ServedModels
from espo_rl.types import EndReason, Problem, Request, Rollout
from trainer_benchmark.cases import CASES, GROUP, LEARNING_RATE, PROMPT, SHAPES, Case, Shape
from trainer_benchmark.turns import Meter, Turns


def recipe_of(case: Case, shape: Shape, model: str, prompt: int) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": model, "dtype": shape.dtype, "lora_rank": case.lora},
            "task": {"chat": False},
            "rollout": {
                "prompts_per_step": shape.rollouts // GROUP,
                "n": GROUP,
                "max_tokens": shape.tokens,
                "concurrency": shape.rollouts,
            },
            "stopping": {"rule": "none"},
            "ppo": {
                "learning_rate": LEARNING_RATE,
                "micro_batch_tokens": shape.rows * (prompt + shape.tokens),
                **case.ppo,
            },
            "servers": {
                "vllm_args": ["--max-model-len", "512"],
            },
        }
    )


def measured(trainer: PpoTrainer, meter: Meter) -> PpoTrainer:
    """With the phases of its update told apart."""
    meter.around(trainer, "_forward", "before: forward")
    for name in ("actor", "critic"):
        engine = getattr(trainer, name)
        if engine is None:
            continue
        meter.around(trainer, f"_{name}_loss", f"{name}: forward")
        meter.around(engine, "backward", f"{name}: backward")
        meter.around(engine, "step", f"{name}: optimizer")
    return trainer


def made_up(
    problems: list[Problem], encode: Callable[[str], list[int]], tokens: int, words: int
) -> list[Rollout]:
    rng = np.random.default_rng(0)
    return [
        Rollout(
            problem=problem,
            prompt_ids=encode(problem.prompt),
            token_ids=rng.integers(2, words, tokens).tolist(),
            logprobs=rng.normal(-3.0, 1.0, tokens),
            max_logprobs=np.full(tokens, -1.0),
            text="",
            end=EndReason.LENGTH,
            kept=tokens,
            group=group,
        )
        for group, problem in enumerate(problems)
        for _ in range(GROUP)
    ]


async def main(name: str, model: str, count: int, *, serves: bool) -> None:
    turns, meter = Turns(), Meter()
    case = CASES[name]
    shape = replace(SHAPES[case.shape], rollouts=count)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    problems = [Problem(str(i), PROMPT.format(10 + i), "") for i in range(shape.rollouts // GROUP)]
    recipe = recipe_of(case, shape, model, len(tokenizer.encode(problems[0].prompt)))
    trainer = measured(PpoTrainer(recipe), meter)
    # As in a run: each thread keeps the memory that it has freed.
    loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1, "trainer")
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        if serves:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            # The same work for both sides: nothing ends before its time.
            collecting.WHOLE_POLICY["min_tokens"] = shape.tokens
            fleet = await enter(open_fleet(recipe, model, folder, say=lambda _: None))
            served = await enter(
                ServedModels(
                    recipe,
                    fleet,
                    trainer,
                    asyncio.Lock(),
                    tokenizer.encode(problems[0].prompt),
                    say=lambda _: None,
                    on_restart=lambda: None,
                )
            )
            await served.sync()
            prompter = Prompter.of(tokenizer, recipe.task)
            collector = await enter(
                Collector(fleet.gateway_url, fleet.model, prompter, recipe.rollout)
            )
        turns.answer(ready=True)
        seed = 0
        while await asyncio.to_thread(turns.wait):
            meter.phases.clear()
            marks = [time.perf_counter()]
            if serves:
                requests = [
                    Request(problem, group=group, seed=(seed := seed + 1), mode="off")
                    for group, problem in enumerate(problems)
                    for _ in range(GROUP)
                ]
                rollouts = await collector.collect(requests, temperature=1.0)
            else:
                rollouts = made_up(problems, tokenizer.encode, shape.tokens, shape.words)
            for i, rollout in enumerate(rollouts):
                rollout.reward = float(i % 3 == 0)
            marks.append(time.perf_counter())
            processor = time.process_time()
            await loop.run_in_executor(thread, trainer.update, rollouts)
            processor = time.process_time() - processor
            marks.append(time.perf_counter())
            if serves:
                await served.sync()
            marks.append(time.perf_counter())
            rollout_s, update_s, sync_s = (after - before for before, after in pairwise(marks))
            meter.look()
            turns.answer(
                update_s=update_s,
                update_processor_s=processor,
                step_s=marks[-1] - marks[0] if serves else None,
                rollout_s=rollout_s if serves else None,
                sync_s=sync_s if serves else None,
                peak_memory_mb=meter.peak,
                tokens=sum(rollout.kept for rollout in rollouts),
                phases=meter.phases,
            )


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), serves=sys.argv[4] == "serve"))
