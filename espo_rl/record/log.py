"""What a run writes while it goes: metrics.jsonl, TensorBoard, Weights & Biases, the terminal.

What the numbers mean stands in `metrics.METRICS`; nothing here computes any.
"""

from __future__ import annotations

import importlib.util
import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console

from espo_rl.config import Recipe, RecipeError
from espo_rl.record.metrics import Metric, grouped
from espo_rl.record.progress import RunProgress
from espo_rl.record.summary import nulls


class LogError(RuntimeError):
    """The run's log cannot be written; the message says what to change."""


@contextmanager
def log_errors(what: object) -> Iterator[None]:
    """Turn a failure to write `what` into a LogError."""
    try:
        yield
    except OSError as error:
        raise LogError(
            f"cannot write {what}: {error.strerror or error}; free space or change run.output, "
            "then go on with --resume auto"
        ) from error


class Sink(Protocol):
    """One place where rows go."""

    def write(self, step: int, row: Mapping[str, Metric]) -> None:
        """Take a row; its numbers may be NaN. Raises LogError."""

    def close(self) -> None:
        """Write what is left. Raises LogError."""


class JsonLines:
    """metrics.jsonl: every row, unknown numbers as null. Rows of steps after `start` are dropped
    from an older file: they come again."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        with log_errors(path):
            rows = path.read_text().splitlines() if start and path.exists() else []
            kept = [row for row in rows if 0 <= _step_of(row) <= start]
            path.write_text("".join(row + "\n" for row in kept))
            self._file: TextIO = path.open("a")

    def write(self, step: int, row: Mapping[str, Metric]) -> None:
        with log_errors(self._path):
            self._file.write(json.dumps({"step": step, **nulls(row)}) + "\n")
            self._file.flush()

    def close(self) -> None:
        with log_errors(self._path):
            self._file.close()


class TensorBoard:
    """Events for TensorBoard: the numbers. Accuracy against tokens is a run of its own,
    `by_tokens`, whose steps are tokens sampled so far."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._make = SummaryWriter
        self._by_tokens: SummaryWriter | None = None
        # Of a resumed run it is known with the first step.
        self._total: int | None = None if start else 0
        with log_errors(folder):
            self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, step: int, row: Mapping[str, Metric]) -> None:
        numbers = _numbers(row)
        with log_errors(self._folder):
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
            self._write_by_tokens(numbers)
            # Events are written by a thread: only this shows that it could.
            self._writer.flush()

    def _write_by_tokens(self, numbers: Mapping[str, float]) -> None:
        if "rollout/tokens_total" in numbers:
            self._total = int(numbers["rollout/tokens_total"])
        accuracies = {
            name: value
            for name, value in numbers.items()
            if name == "rollout/accuracy" or name.startswith("evaluation/avg@")
        }
        if not accuracies or self._total is None:
            return
        if self._by_tokens is None:
            # What an older log has of later steps goes: all after the tokens before this one.
            before = self._total - int(numbers.get("rollout/tokens", 0))
            self._by_tokens = self._make(str(self._folder / "by_tokens"), purge_step=before + 1)
        for name, value in accuracies.items():
            self._by_tokens.add_scalar(name, value, self._total)
        self._by_tokens.flush()

    def close(self) -> None:
        with log_errors(self._folder):
            self._writer.close()
            if self._by_tokens is not None:
                self._by_tokens.close()


class WeightsAndBiases:
    """A run on Weights & Biases. Its id is kept in `wandb_run`, so a resumed run goes on in it.

    Steps that a resumed run repeats are there twice, the later ones last.
    """

    def __init__(self, recipe: Recipe, start: int) -> None:
        import wandb

        folder = recipe.run.output
        id_file = folder / "wandb_run"
        with log_errors(id_file):
            if not start or not id_file.exists():
                id_file.write_text(uuid.uuid4().hex[:8])
            run_id = id_file.read_text().strip()
        try:
            self._run = wandb.init(
                project=recipe.logs.wandb,
                name=folder.name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=recipe.model_dump(mode="json"),
                # The terminal is the progress bar's.
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.Error, OSError) as error:
            raise LogError(
                f"logs.wandb: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        # Its own step only ever grows, so it would drop the steps that a resumed run repeats.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, row: Mapping[str, Metric]) -> None:
        self._run.log({"step": step, **_numbers(row)})

    def close(self) -> None:
        self._run.finish()


class RunLog:
    """The log of one run: a context manager, open while the run goes.

    `start` is the step that the run is resumed after; what an older log has of later steps goes.

    Raises:
        RecipeError: at once, when a package that the recipe's logs need is missing.
        LogError: by every method that writes.
    """

    def __init__(self, recipe: Recipe, console: Console | None = None) -> None:
        self._recipe = recipe
        self._console = console or Console(highlight=False, markup=False, soft_wrap=True)
        self._progress = RunProgress(self._console, recipe.run.steps)
        self._sinks: list[Sink] = []
        self._stopping: dict[str, Metric] = {"on": False, "reason": ""}
        self.start = 0
        for key, package, extra in (
            ("logs.wandb", "wandb", "espo[wandb]"),
            ("logs.tensorboard", "tensorboard", "espo[train]"),
        ):
            wanted = getattr(recipe.logs, package)
            if wanted and importlib.util.find_spec(package) is None:
                off = f"; without it: {key}=false" if wanted is True else ""
                raise RecipeError(f"{key} needs {package}: pip install '{extra}'{off}")

    def __enter__(self) -> RunLog:
        folder, logs = self._recipe.run.output, self._recipe.logs
        with log_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            recipe = self._recipe.model_dump(mode="json")
            (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
        self._sinks = [JsonLines(folder / "metrics.jsonl", self.start)]
        if logs.tensorboard:
            self._sinks.append(TensorBoard(folder / "tensorboard", self.start))
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
        f" (false {say('rollout/audited_correct', 'd')}/{say('rollout/audited', 'd')},"
        f" ≤ {say('stopping/false_positives_upper', '.1%')})"
        f"  tokens {say('rollout/tokens', ',')} ({say('rollout/tokens_saved_share', '.0%')} saved)"
        f"  length {say('rollout/length', '.0f')}  entropy {say('ppo/entropy', '.3f')}"
        f"  explained {say('stopping/explained_variance', '.2f')}"
        f"  rollout {say('seconds/rollout', '.1f')} s  update {say('seconds/update', '.1f')} s"
        f"  [{gate}]"
    )


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, truths as 0 and 1; of an estimate also its interval's ends."""
    flat = dict(row)
    for name, value in row.items():
        if isinstance(value, dict):
            low, high = value.get("interval") or (None, None)
            flat |= {name: value.get("value"), f"{name}/low": low, f"{name}/high": high}
    return {
        name: float(value)
        for name, value in flat.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _step_of(row: str) -> int:
    """The step of a row of metrics.jsonl; -1 for what a kill left of one."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
