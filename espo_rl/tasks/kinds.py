"""The kinds of task that a recipe can name (`task.kind`)."""

from __future__ import annotations

from espo_rl.config import TaskSection
from espo_rl.tasks.arithmetic import Arithmetic
from espo_rl.tasks.dataset import DatasetTask
from espo_rl.tasks.gym import GymTask
from espo_rl.tasks.task import Task


def make_task(config: TaskSection) -> Task:
    """The task a recipe names. Raises TaskError when its problems cannot be had."""
    if config.kind == "arithmetic":
        return Arithmetic(config.min_steps, config.max_steps, config.template, config.steps)
    return DatasetTask(config) if config.kind == "dataset" else GymTask(config)
