"""What a run writes while it goes: metrics.jsonl, TensorBoard, Weights & Biases, the terminal.

What the numbers mean stands in `record.metrics.METRICS`; nothing here computes any.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console

from espo_rl.config import Recipe, RecipeError
from espo_rl.record.json_files import write_json
from espo_rl.record.log_errors import LogError, log_errors
from espo_rl.record.metrics import Metric, grouped
from espo_rl.record.progress import RunProgress
from espo_rl.record.sinks import JsonLines, MetricSink, TensorBoard, WeightsAndBiases


class RunLog:
    """The log of one run: a context manager, open while the run goes.

    `start` is the step that the run is resumed after; what an older log has of later steps goes.
    `evaluated` is the last one whose evaluation is written.

    Raises:
        RecipeError: at once, when a package that the recipe's logs need is missing.
        LogError: by every method that writes.
    """

    def __init__(self, recipe: Recipe, console: Console | None = None) -> None:
        self._recipe = recipe
        self._console = console or Console(highlight=False, markup=False, soft_wrap=True)
        self._progress = RunProgress(self._console, recipe.run.steps)
        self._sinks: list[MetricSink] = []
        self._stopping: dict[str, Metric] = {"on": False, "reason": ""}
        self.start = 0
        self.evaluated = 0
        for key, package, extra in (
            ("logs.wandb", "wandb", "wandb"),
            ("logs.tensorboard", "tensorboard", "train"),
        ):
            wanted = getattr(recipe.logs, package)
            if wanted and importlib.util.find_spec(package) is None:
                off = f"; without it: {key}=false" if wanted is True else ""
                raise RecipeError(
                    f"{key} needs {package}; in the repository: pip install '.[{extra}]'{off}"
                )

    def __enter__(self) -> RunLog:
        folder, logs = self._recipe.run.output, self._recipe.logs
        with log_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "recipe.json", self._recipe.model_dump(mode="json"))
        lines = JsonLines(folder / "metrics.jsonl", self.start)
        self._sinks, self.evaluated = [lines], lines.evaluated
        if logs.tensorboard:
            self._sinks.append(TensorBoard(folder / "tensorboard", self.start, lines.tokens))
        if logs.wandb:
            self._sinks.append(WeightsAndBiases(self._recipe, self.start))
        self._progress.start(self.start)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._progress.stop()
        failures = []
        for sink in self._sinks:
            try:
                sink.close()
            except LogError as failure:
                failures.append(failure)
        if failures and error is None:
            raise failures[0]

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self._console.print(text)

    def phase(
        self, name: str, total: int | None = None
    ) -> AbstractContextManager[Callable[[], None]]:
        """Show what the run does. With a total there is a bar, advanced by calling what this
        gives: `with log.phase("rollouts", 128) as advance: ...`"""
        return self._progress.phase(name, total)

    def stopping(self, on: bool, reason: str) -> None:
        """Take note of whether the next batch may be stopped; a change is said with its reason."""
        if on != self._stopping["on"]:
            self.say(f"stopping is {'on' if on else 'off'}: {reason}")
        self._stopping = {"on": on, "reason": reason}

    def write(self, step: int, **groups: Mapping[str, Any]) -> dict[str, Metric]:
        """Write a row to every place, `ppo={"kl": 0.1}` as `ppo/kl`; returns it."""
        if "evaluation" in groups:
            self.evaluated = step
        row = grouped(**groups)
        for sink in self._sinks:
            sink.write(step, row)
        return row

    def step(
        self,
        step: int,
        *,
        rollout: Mapping[str, Any],
        stopping: Mapping[str, Any],
        **groups: Mapping[str, Any],
    ) -> None:
        """Write a finished step everywhere, and its line."""
        row = self.write(step, rollout=rollout, stopping={**stopping, **self._stopping}, **groups)
        self._progress.steps_done(step)
        self.say(step_line(step, self._recipe.run.steps, row))


def step_line(step: int, steps: int, row: Mapping[str, Metric]) -> str:
    """A step in one line; what is not known is a dash."""

    def say(name: str, form: str) -> str:
        value = row.get(name)
        known = isinstance(value, int | float) and math.isfinite(value)
        return format(value, form) if known else "–"

    gate = f"off: {row.get('stopping/reason')}"
    if row.get("stopping/on"):
        gate = f"{row.get('stopping/rule')} at {say('stopping/threshold', '.3g')}"
    return (
        f"step {step}/{steps}"
        f"  reward {say('rollout/reward', '.2f')}  accuracy {say('rollout/accuracy', '.2f')}"
        f"  stopped {say('rollout/stop_share', '.0%')}"
        f" (right {say('rollout/audited_correct', 'd')} of {say('rollout/audited', 'd')} audited,"
        f" bound ≤ {say('stopping/bound_upper', '.1%')})"
        f"  tokens {say('rollout/tokens', ',')} ({say('rollout/tokens_saved_share', '.0%')} saved)"
        f"  length {say('rollout/length', '.0f')}  entropy {say('ppo/entropy', '.3f')}"
        f"  explained {say('stopping/explained_variance', '.2f')}"
        f"  rollout {say('seconds/rollout', '.1f')} s  update {say('seconds/update', '.1f')} s"
        f"  [{gate}]"
    )
