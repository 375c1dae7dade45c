"""The places where a run's metrics go: metrics.jsonl, TensorBoard, Weights & Biases.

Each says what becomes of the steps that a resumed run repeats.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from espo_gateway.files import written_whole
from espo_rl.config import Recipe
from espo_rl.record.json_files import nulls
from espo_rl.record.log_errors import LogError, log_errors
from espo_rl.record.metrics import Metric

#: tokens sampled so far
TOTAL = "rollout/tokens_total"


class MetricSink(Protocol):
    """One place where rows go."""

    def write(self, step: int, row: Mapping[str, Metric]) -> None:
        """Take a row; its numbers may be NaN. Raises LogError."""

    def close(self) -> None:
        """Write what is left. Raises LogError."""


class JsonLines:
    """metrics.jsonl: every row, unknown numbers as null. Rows of steps after `start` are dropped
    from an older file: they come again.

    evaluated: the last step with an evaluation there. tokens: sampled by the last step there; None
    where no step is.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        with log_errors(path):
            there = path.read_text() if start and path.exists() else ""
            read = [(line, _row_of(line)) for line in there.splitlines()]
            rows = [(line, row) for line, row in read if row and 0 <= row["step"] <= start]
            kept = "".join(line + "\n" for line, _ in rows)
            self.evaluated, self.tokens = 0, None
            for _, row in rows:
                if any(name.startswith("evaluation/") for name in row):
                    self.evaluated = max(self.evaluated, row["step"])
                self.tokens = row.get(TOTAL, self.tokens)
            if kept != there:
                with written_whole(path) as scratch:
                    scratch.write_text(kept)
            self._file: TextIO = path.open("a" if start else "w")

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

    def __init__(self, folder: Path, start: int, tokens: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._make = SummaryWriter
        self._by_tokens: SummaryWriter | None = None
        # Of a resumed run whose log is not there it is known with the first step.
        self._total = tokens if start else 0
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
        if TOTAL in numbers:
            self._total = int(numbers[TOTAL])
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


def _row_of(line: str) -> dict[str, Any]:
    """A row of metrics.jsonl; nothing of what a kill left of one."""
    try:
        row = json.loads(line)
        return {**row, "step": int(row["step"])}
    except (ValueError, KeyError, TypeError):
        return {}
