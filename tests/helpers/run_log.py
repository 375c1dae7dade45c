"""A run's log, and steps written to it."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from espo_rl.config import Recipe, load_recipe
from espo_rl.record.log import RunLog


def recipe_for(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(
        "arithmetic",
        [f"run.output={folder}", "run.steps=4", "logs.tensorboard=false", *overrides],
    )


def write_steps(recipe: Recipe, *steps: int, start: int = 0, **metrics: float) -> None:
    log = RunLog(recipe, Console(file=io.StringIO()))
    log.start = start
    with log:
        for step in steps:
            log.step(step, rollout={"tokens": 10 * step, **metrics}, stopping={}, ppo={"kl": 0.5})
