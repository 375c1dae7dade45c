"""Problems of a data set: a local file, a folder, or a name on the Hugging Face hub.

Owns how rows become problems, and which of them are kept for evaluation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from espo_rl.config import TaskSection
from espo_rl.tasks.file_rows import FileRows, JsonFile, Written, csv_rows
from espo_rl.tasks.task import TaskError, did_you_mean, fill_template, log
from espo_rl.types import Problem


class DatasetTask:
    """Problems of a Hugging Face data set: a local file, a folder, or a name on the hub.

    All is read and every row checked when the task is made. A problem that repeats counts once,
    with its first answer. Without an evaluation set a tenth of the problems, drawn once and for
    all, is held out; with one, training leaves out the problems that stand in it as well. Training
    shuffles anew every epoch.

    Raises:
        TaskError: no such file, data set, subset, split or column; a row without problem or answer.
    """

    def __init__(self, config: TaskSection) -> None:
        self._train = self._eval = Split.load(config, "train")
        train, fixed = self._train.distinct(), random.Random("held-out")
        if config.eval is None:
            held_out = dict(fixed.sample(list(train.items()), len(train) // 10))
        else:
            self._eval = Split.load(config, "eval")
            held_out = self._eval.distinct()
            if shared := len(train.keys() & held_out.keys()):
                log.warning(
                    f"{shared} of {len(train)} training problems are in the evaluation set too: "
                    "they are not trained on"
                )
        self._held_out = fixed.sample(list(held_out.values()), len(held_out))
        self._training = [row for text, row in train.items() if text not in held_out]
        if not self._training:
            raise TaskError("task.eval holds every problem of task.train: none is left to train on")

    def training(self, seed: int) -> Iterator[Problem]:
        rng = random.Random(seed)
        while True:
            yield from map(self._train.problem, rng.sample(self._training, len(self._training)))

    def held_out(self, count: int) -> Sequence[Problem]:
        return [self._eval.problem(row) for row in self._held_out[:count]]


@dataclass(frozen=True)
class Split:
    """Rows with a problem and an answer; memory-mapped, so problems are made when asked for."""

    part: str  # of the recipe's task: "train" or "eval"
    name: str
    rows: Any  # a datasets.Dataset, or FileRows
    columns: Mapping[str, str]  # by the key that names them: the problem's, then the answer's
    pattern: tuple[str, str | None]  # that finds the answer in its column, after its key
    template: str

    @classmethod
    def load(cls, config: TaskSection, part: str) -> Split:
        """The recipe's `train` or `eval`."""
        source, split = getattr(config, part), getattr(config, f"{part}_split")
        keys, subset = ["problem_column", "answer_column", "answer_pattern"], config.subset
        if part == "eval":
            keys = [f"eval_{key}" if getattr(config, f"eval_{key}") else key for key in keys]
            subset = config.eval_subset or (subset if source == config.train else None)
        *columns, pattern = ((key, getattr(config, key)) for key in keys)
        rows = _load(part, source, split, subset)
        name = f"{Path(source).name}/{split}"
        return cls(part, name, rows, dict(columns), pattern, config.template)

    def distinct(self) -> dict[str, int]:
        """The number of each problem's first row, by its text with white space made even."""
        found: dict[str, int] = {}
        try:
            for number, row in enumerate(self._needed()):
                found.setdefault(" ".join(self._read(row, number)[0].split()), number)
        except TaskError:
            raise
        except ValueError as error:  # of a JSON file's row
            raise TaskError(f"task.{self.part}: {error}") from error
        return found

    def _needed(self) -> Any:
        """The rows, of a table only the columns that are read: the others may hold much."""
        if isinstance(self.rows, FileRows):
            return self.rows
        there = self.rows.column_names
        tops = [c if c in there else c.partition(".")[0] for c in self.columns.values()]
        return self.rows.select_columns([c for c in there if c in tops] or there)

    def problem(self, number: int) -> Problem:
        """The problem of a row, which it keeps as its `extra`."""
        row = self.rows[number]
        text, answer = self._read(row, number)
        return Problem(
            f"{self.name}:{number}", fill_template(self.template, text), answer, extra=row
        )

    def _read(self, row: Mapping[str, Any], number: int) -> tuple[str, str]:
        """Text and answer of a row."""
        text, answer = (self._cell(row, number, key) for key in self.columns)
        key, pattern = self.pattern
        if pattern is not None:
            matches = list(re.finditer(pattern, answer))
            if not matches or not (found := (matches[-1].group(1) or "").strip()):
                raise TaskError(
                    f"task.{key} = {pattern!r} finds nothing in row {number + 1} of {self.name}: "
                    f"{answer[-80:]!r}"
                )
            answer = found
        return text, answer

    def _cell(self, row: Mapping[str, Any], number: int, key: str) -> str:
        column = self.columns[key]
        value: Any = row
        # A name with dots may also be just a name.
        for name in [column] if column in row else column.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, list):  # a chat
            turns = [turn for turn in value if isinstance(turn, Mapping)]
            value = next(
                (t.get("content") for t in reversed(turns) if t.get("role") == "user"), None
            )
        feature = self._feature(column)
        if isinstance(value, int) and hasattr(feature, "int2str"):  # a number for each label
            value = feature.int2str(value) if value >= 0 else None
        if not (text := _text(value, getattr(feature, "dtype", ""))):
            there = list(_names(row if isinstance(self.rows, FileRows) else self.rows[number]))
            raise TaskError(
                f"task.{key} = {column!r}: no text or number there in row {number + 1} of "
                f"{self.name}; its columns are {', '.join(there)}{did_you_mean(column, there)}"
            )
        return text

    def _feature(self, column: str) -> Any:
        """Of a table's column: what `datasets` knows of its type."""
        features: Any = {} if isinstance(self.rows, FileRows) else self.rows.features
        for name in [column] if column in features else column.split("."):
            features = features.get(name) if isinstance(features, Mapping) else None
        return features


def _text(value: Any, of_type: str) -> str:
    """A text or number as it was written, as far as that is known; else nothing."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | Written):
        return str(value).strip()
    if isinstance(value, date):  # or a moment, of which midnight is a day
        return value.isoformat().removesuffix("T00:00:00")
    # A table has made 15.0 of 15 where there was another that is not whole, or none.
    if isinstance(value, Decimal) and isfinite(value):
        return str(int(value)) if value == int(value) else f"{value:f}"
    if isinstance(value, float) and isfinite(value):
        # Python would write digits of its wider type that the column has never held.
        narrow = of_type if of_type in ("float16", "float32") else "float64"
        return np.format_float_positional(np.dtype(narrow).type(value) + 0, trim="-")
    return ""


def _names(row: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Of a row's columns, with dots before those of nested ones."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{above}{name}.")
        else:
            yield above + name


def _file_rows(
    files: Mapping[str, Sequence[str]],
    split: str,
    read: Callable[[str], Sequence[dict[str, Any]]],
) -> FileRows:
    """Those of a split, which may be a sum of slices of several."""
    import datasets

    loader, files = datasets.DownloadManager(), {str(name): of for name, of in files.items()}
    found = {
        name: [read(path) for path in loader.download_and_extract(list(paths))]
        for name, paths in files.items()
        if re.search(rf"(^|\+)\s*{re.escape(name)}\s*($|\+|\[)", split)
    }
    sizes = {name: sum(map(len, found.get(name, ()))) for name in files}
    parts = []
    for one in datasets.ReadInstruction.from_spec(split).to_absolute(sizes):
        first = 0
        for file in found[one.splitname]:
            start, end = max(one.from_ - first, 0), min(one.to - first, len(file))
            parts.append((file, range(start, end)))
            first += len(file)
    return FileRows(parts)


_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def _load(part: str, source: str, split: str, subset: str | None) -> Any:
    """A split as a `datasets.Dataset` or FileRows; files and folders without asking any network.

    Numbers, and what looks like one, stay as they are written, as far as a file says it.
    """
    import datasets  # takes a second

    datasets.disable_progress_bars()
    path = Path(source).expanduser()
    builder = next((_FORMATS[end] for end in reversed(path.suffixes) if end in _FORMATS), None)
    name, options = source, dict[str, Any](name=subset)
    if path.is_dir():
        name = str(path.resolve())
    elif path.is_file() and builder is not None:
        # A lone file is the split that is asked for, or of which a slice is: "train[:90%]".
        name = builder
        options = {"data_files": {re.split(r"[\[+]", split)[0]: str(path)}}
    elif path.is_file():
        raise TaskError(f"task.{part}: {path} is none of: {', '.join(_FORMATS)}")
    elif builder is not None or path.is_absolute() or source.count("/") > 1 or source[0] in ".~":
        raise TaskError(f"task.{part}: No such file or folder: {path}")
    try:
        made = datasets.load_dataset_builder(name, **options)
        if made.name == "json" and not made.config.field:
            return _file_rows(made.config.data_files, split, JsonFile)
        if made.name == "csv":  # no 7.0 for 007, no null for "NA"
            csv_options = made.config.pd_read_csv_kwargs
            return _file_rows(made.config.data_files, split, partial(csv_rows, options=csv_options))
        return datasets.load_dataset(name, split=split, **options)
    except Exception as error:  # of any library below; each names what is wrong
        key = part
        if "Unknown split" in str(error):
            key = f"{part}_split"
        elif "BuilderConfig" in str(error):
            key = "subset" if part == "train" else "eval_subset"
        reason = str(error.__cause__ or error) or "it holds nothing"
        hint = ""
        if name == source and key == part:
            hint = (
                " (neither a file nor a folder here, so it was asked for on the Hugging Face hub)"
            )
        raise TaskError(
            f"task.{key}: cannot load {source}, split {split!r}: {reason}{hint}"
        ) from error
