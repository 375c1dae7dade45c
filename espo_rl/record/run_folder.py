"""What a run left in its folder: the rows of metrics.jsonl, summary.json, the recipe, and where its
rollouts lie.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espo_gateway.files import read_object

Row = dict[str, Any]


class RunFolderError(ValueError):
    """The folder holds no run that can be read; the message names the file and the fix."""


@dataclass(frozen=True)
class RunFolder:
    """A run, finished or still going.

    steps: a row for each training step; evaluations: a row for each evaluation. Names are those of
    `record.metrics.METRICS`, and unknown numbers are None.
    summary: empty while the run goes.
    """

    path: Path
    name: str
    steps: list[Row]
    evaluations: list[Row]
    summary: Row
    recipe: Row

    def column(self, name: str) -> list[float]:
        """A number of every step, NaN where it is not known."""
        return [number(row.get(name)) for row in self.steps]

    def setting(self, section: str, key: str) -> Any:
        """A key of the recipe; None where it is not known."""
        return self.recipe.get(section, {}).get(key)

    @property
    def rollout_files(self) -> list[Path]:
        """The files of rollouts, in the order of steps; the oldest may be gone."""
        return sorted((self.path / "rollouts").glob("step-*.parquet"))


def read_run(path: Path) -> RunFolder:
    """Read what there is.

    Raises:
        RunFolderError: the path is no folder, or has no steps, or a file is damaged.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise RunFolderError(f"{path} {what}: give a run's folder, the recipe's run.output")
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise RunFolderError(
            f"{path} has no metrics.jsonl, so it is no run's folder; give the recipe's run.output"
        )
    rows = list(_rows(metrics))
    steps = [row for row in rows if "rollout/tokens" in row]
    if not steps:
        raise RunFolderError(f"{metrics} has no training step yet: wait for the first one to end")
    return RunFolder(
        path,
        path.resolve().name,
        steps,
        [row for row in rows if any(name.startswith("evaluation/") for name in row)],
        _json(path / "summary.json"),
        _json(path / "recipe.json"),
    )


def rollout_files(path: Path) -> list[Path]:
    """Those of a run's folder, or of a folder of them, in order; of a file, itself if there."""
    if path.is_file():
        return [path]
    found = (sorted(folder.glob("*.parquet")) for folder in (path / "rollouts", path))
    return next(filter(None, found), [])


def number(value: Any) -> float:
    """A metric as a number, NaN where it is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def _rows(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"cannot read {path}: {error}") from error
    for place, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row["step"], int):
                raise ValueError("no object with a step")
        except (ValueError, KeyError) as error:
            if place == len(lines):  # a running or killed process left a part of it
                return
            raise RunFolderError(
                f"{path}, line {place} is no row of metrics: {error}; mend or remove that line"
            ) from error
        yield row


def _json(path: Path) -> Row:
    if not path.exists():
        return {}
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"cannot read {path}: {error}; remove it to go without") from error
