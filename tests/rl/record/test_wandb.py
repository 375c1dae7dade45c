"""Weights & Biases: one run across restarts, and what is missing said before it."""

from __future__ import annotations

import json
import math
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from espo_rl.config import RecipeError
from espo_rl.record.log import RunLog
from espo_rl.record.log_errors import LogError
from tests.helpers.run_log import recipe_for, write_steps


def wandb_records(path: Path) -> Iterator[bytes]:
    """What a .wandb file holds: records in LevelDB's log format, after a header of 7 bytes."""
    data, position, record = path.read_bytes(), 7, b""
    while position < len(data):
        if (left := 32_768 - position % 32_768) < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7].ljust(3, b"\0"))
        if position + 7 + length > len(data):
            return  # still being written
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_runs(folder: Path) -> list[tuple[str, list[Any]]]:
    """The offline runs in the order they were made: each one's id and records."""
    paths = folder.glob("wandb/offline-run-*/run-*.wandb")
    runs = [(path.stem.removeprefix("run-"), whole_wandb_run(path)) for path in paths]
    return sorted(runs, key=lambda run: started(run[1]))


def started(records: list[Any]) -> float:
    """When a run began, since 1970."""
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    return run.start_time.ToNanoseconds()


def whole_wandb_run(path: Path) -> list[Any]:
    """Its records, once the last is there: W&B's own process may write after `finish` returns."""
    from wandb.proto import wandb_internal_pb2

    records: list[Any] = []
    while not records or records[-1].WhichOneof("record_type") != "exit":
        data = list(wandb_records(path))
        if len(data) == len(records):
            time.sleep(0.02)
        records = list(map(wandb_internal_pb2.Record.FromString, data))
    return records


def history(records: list[Any]) -> list[dict[str, float]]:
    """The rows that a run logged."""
    return [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = recipe_for(tmp_path, "logs.wandb=espo-test")
    write_steps(recipe, 1, 2, reward=math.nan)
    run_id = (tmp_path / "wandb_run").read_text()
    write_steps(recipe, 2, 3, start=1, reward=0.5)
    (first, records), (resumed, more) = wandb_runs(tmp_path)
    assert first == resumed == run_id
    rows, later = history(records), history(more)
    assert [(row["step"], row["rollout/tokens"]) for row in rows] == [(1, 10.0), (2, 20.0)]
    # The repeated step is there again, not dropped as older than the last; `step` is the x axis.
    axes = [record.metric for record in more if record.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in [(axis.glob_name, axis.step_metric) for axis in axes]
    assert [(row["step"], row["rollout/reward"]) for row in later] == [(2, 0.5), (3, 0.5)]
    assert all("rollout/reward" not in row for row in rows)
    write_steps(recipe, 1)
    assert wandb_runs(tmp_path)[-1][0] == (tmp_path / "wandb_run").read_text() != run_id


def test_wandb_that_cannot_start_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("no API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(LogError, match=r"logs\.wandb: no API key.*wandb login.*WANDB_MODE=offline"):
        write_steps(recipe_for(tmp_path, "logs.wandb=espo-test"), 1)


@pytest.mark.parametrize(
    ("key", "package", "fix"),
    [
        ("logs.wandb", "wandb", r"pip install '\.\[wandb\]'"),
        (
            "logs.tensorboard",
            "tensorboard",
            r"pip install '\.\[train\]'.*logs\.tensorboard=false",
        ),
    ],
)
def test_a_missing_package_is_found_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, package: str, fix: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else name)
    recipe = recipe_for(tmp_path, f"{key}=true" if package == "tensorboard" else f"{key}=mine")
    with pytest.raises(
        RecipeError, match=f"{re.escape(key)} needs {package}; in the repository: {fix}"
    ):
        RunLog(recipe)
    assert not list(tmp_path.iterdir())
