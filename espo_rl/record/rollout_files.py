"""Rollouts on disk: one Parquet file a step, with the gate that they were sampled under.

    rollouts, gate = read_rollouts("runs/demo/rollouts/step-00000012.parquet")

Any Parquet reader opens them; a rollout is a row. Logprobs are exact, so that a replay of the gate
decides as it did live.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from espo_gateway.errors import InvalidRequest
from espo_gateway.files import written_whole
from espo_gateway.stop.gate_json import gate_from_json, gate_to_json
from espo_gateway.stop.rules import Gate
from espo_rl.config import Recipe
from espo_rl.record.log_errors import LogError, log_errors
from espo_rl.record.provenance import versions
from espo_rl.types import EndReason, Problem, Rollout

_IDS, _LOGPROBS = pa.list_(pa.int32()), pa.list_(pa.float64())
SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        "problem_id": pa.string(),
        "prompt": pa.string(),
        "answer": pa.string(),
        "prompt_ids": _IDS,
        "token_ids": _IDS,  # past the cut too, for an audited rollout
        "logprobs": _LOGPROBS,  # NaN: missing
        "max_logprobs": _LOGPROBS,
        "text": pa.string(),
        "end": pa.string(),
        "kept": pa.int32(),
        "audited": pa.bool_(),
        "audited_right": pa.string(),  # what it is should its audit find it right
        "overshoot": pa.int32(),
        "correct": pa.bool_(),  # null: stopped and not audited
        "reward": pa.float64(),
        "gate_version": pa.int64(),
        "weights_version": pa.string(),  # that it began with, and where others took over: token
        "weights_changes": pa.map_(pa.int32(), pa.string()),
        "group": pa.int32(),
        "seed": pa.int64(),
        "history": pa.float64(),  # log odds that the prompt is solved, by earlier steps
        "probes": pa.list_(_LOGPROBS),  # of an answer probe: token, and what was said
        "error": pa.string(),
        "opened": pa.string(),
        "grader_timed_out": pa.bool_(),
        "values": _LOGPROBS,  # V of each token; no column where nobody told any
    }
)
#: what files of before lack; all of it has defaults
_LATER = {
    *("audited_right", "weights_changes", "history", "probes", "opened", "grader_timed_out"),
    "values",
}
#: a file's note on the rewards, of a wrong and a right answer, that the V in it are of
WORTH = "espo.worth"
_OF_PROBLEM = {"problem_id": "id", "prompt": "prompt", "answer": "answer"}


class RolloutFiles:
    """The folder `rollouts` of a run, held under `logs.rollouts_megabytes`."""

    def __init__(self, recipe: Recipe) -> None:
        self.folder = recipe.run.output / "rollouts"
        self._wanted = recipe.logs.rollouts
        self._bytes = recipe.logs.rollouts_megabytes * 1e6
        self._about = {
            "espo.recipe": recipe_hash(recipe),
            "espo.version": versions().get("espo", ""),
            **worth_note(recipe.ppo.wrong_reward, recipe.ppo.right_reward),
        }

    def drop_after(self, step: int) -> None:
        """Delete what an older run left of later steps, and of a write that was cut short."""
        with log_errors(self.folder):
            for path in self.folder.glob("step-*"):
                if path.suffix == ".tmp" or path.name > _name(step):
                    path.unlink()

    def write(self, step: int, rollouts: Sequence[Rollout], gate: Gate) -> None:
        """Write a step's file, unless the recipe wants none. The oldest files go when all come to
        too much, this one never.

        Raises:
            LogError: the file cannot be written; none is left under its name.
        """
        if not self._wanted:
            return
        final = self.folder / _name(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            table = rollouts_table(step, rollouts, gate, self._about)
            with written_whole(final) as scratch:
                pq.write_table(table, scratch, compression="zstd")
        except OSError as error:
            raise LogError(
                f"cannot write {final}: {error.strerror or error}; free space, or set "
                "logs.rollouts=false and go on with --resume auto"
            ) from error
        self._bound(final)

    def _bound(self, newest: Path) -> None:
        files = sorted(self.folder.glob("step-*.parquet"))
        sizes = {path: path.stat().st_size for path in files}
        excess = sum(sizes.values()) - self._bytes
        for path in files:
            if excess <= 0 or path == newest:
                return
            path.unlink()
            excess -= sizes[path]


def read_rollouts(path: str | Path) -> tuple[list[Rollout], Gate]:
    """The rollouts of a step and their gate.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, or holds no rollouts.
    """
    with open(path, "rb") as file:
        try:
            table = pq.read_table(file)
            text = (table.schema.metadata or {})[b"espo.gate"]
            gate = gate_from_json(text, has_critic=True)
            there = [name for name in SCHEMA.names if name not in _LATER - {*table.column_names}]
            rows = table.select(there).to_pylist()
        except (pa.ArrowException, OSError, KeyError, ValueError, InvalidRequest) as error:
            raise ValueError(f"{path} holds no rollouts, or is damaged: {error}") from error
    return [_rollout(row) for row in rows], gate


def recipe_hash(recipe: Recipe) -> str:
    """The same for recipes with the same settings."""
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]


def _name(step: int) -> str:
    return f"step-{step:08d}.parquet"


def rollouts_table(
    step: int, rollouts: Sequence[Rollout], gate: Gate, about: Mapping[str, str]
) -> pa.Table:
    """What a step's file holds. about: notes on where they come from."""
    schema, columns = SCHEMA, []
    if all(rollout.values is None for rollout in rollouts):
        schema = schema.remove(schema.get_field_index("values"))
    for field in schema:
        name = field.name
        if name == "step":
            values: list[Any] = [step] * len(rollouts)
        elif name in _OF_PROBLEM:
            values = [getattr(rollout.problem, _OF_PROBLEM[name]) for rollout in rollouts]
        else:
            values = [getattr(rollout, name) for rollout in rollouts]
        if pa.types.is_string(field.type):
            # A lone surrogate, which JSON may carry, has no UTF-8.
            values = [str(value).encode(errors="replace").decode() for value in values]
        elif field.type == _LOGPROBS:
            values = [None if value is None else np.asarray(value, np.float64) for value in values]
        columns.append(pa.array(values, field.type))
    notes = {**about, "espo.gate": gate_to_json(gate).decode()}
    return pa.Table.from_arrays(columns, schema=schema.with_metadata(notes))


def with_notes(table: pa.Table, notes: Mapping[str, str]) -> pa.Table:
    """The table with these in its metadata, in the place of those of the same names."""
    new = {name.encode(): text.encode() for name, text in notes.items()}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **new})


def worth_note(wrong: float, right: float) -> dict[str, str]:
    """The note that V in a file is of these rewards."""
    return {WORTH: json.dumps([wrong, right])}


def with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    """The table with this column last, in the place of one of that name; all else stays."""
    others = [other for other in table.column_names if other != name]
    return table.select(others).append_column(name, column)


def _rollout(row: dict[str, Any]) -> Rollout:
    row.pop("step")
    problem = Problem(**{field: row.pop(name) for name, field in _OF_PROBLEM.items()})
    for name in ("logprobs", "max_logprobs", "values"):
        if row.get(name) is not None:
            row[name] = np.array(row[name], np.float64)
    return Rollout(problem=problem, **row | {"end": EndReason(row["end"])})
