"""The kinds of task that a recipe can name (`task.kind`)."""

from __future__ import annotations

from collections.abc import Callable

from espo_rl.config import TaskSection
from espo_rl.tasks.arithmetic import Arithmetic
from espo_rl.tasks.dataset import DatasetTask
from espo_rl.tasks.gym import GymTask
from espo_rl.tasks.task import Task, TaskError, did_you_mean

KINDS: dict[str, Callable[[TaskSection], Task]] = {
    "arithmetic": lambda config: Arithmetic(
        config.min_steps, config.max_steps, config.template, config.steps
    ),
    "dataset": DatasetTask,
    "reasoning-gym": GymTask,
}


def make_task(config: TaskSection) -> Task:
    """The task a recipe names. Raises TaskError when its problems cannot be had."""
    if config.kind not in KINDS:
        raise TaskError(
            f"task.kind = {config.kind!r}: no such kind{did_you_mean(config.kind, KINDS)}; "
            f"there are {', '.join(KINDS)}"
        )
    return KINDS[config.kind](config)
