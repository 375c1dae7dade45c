"""Recorded traces read back, some at a time: the gateway's JSON lines, or the trainer's Parquet.

A trace that was cut says nothing of what would have come after, nor whether it would have been
right. One that was stopped in word only (an audit, shadow mode) is whole.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from espo_gateway.optional import needed
from espo_gateway.stop.recorded import Recorded, pad, padded_probes
from espo_gateway.stop.regret import Array

#: Limits of what is read at once; with padding it may be twice as many numbers.
_TRACES, _NUMBERS = 256, 2**20
_COLUMNS = (
    *("prompt", "prompt_ids", "logprobs", "max_logprobs"),
    *("end", "kept", "audited", "correct"),
)

#: What an outcome may be told of.
_NAMES = ("request", "id", "session")

#: From a request's or an answer's id, with the choice's index or None, to what is known of it.
Known = Mapping[tuple[str, int | None], bool]


class TraceError(ValueError):
    """A file that cannot be read, or a line that makes no sense; the message names it."""


class Trace(NamedTuple):
    """One choice, or a session's turns under one monitor. correct: None: unknown.

    key: traces of one prompt, request or session have the same. earlier: where the turns before the
    last ended by themselves, in tokens. cut: generated no further than the cut. spared: the rule
    would have cut it. values: a critic's V of each token. history, probes: what was told beside
    (`espo_gateway.stop.told`).
    """

    key: str
    logprobs: Array
    max_logprobs: Array
    confidences: Array | None
    prompt_tokens: int | None
    completed: bool
    cut: bool
    spared: bool
    correct: bool | None
    values: Array | None = None
    history: float | None = None
    probes: list[list[float]] | None = None
    earlier: tuple[int, ...] = ()


@dataclass(frozen=True)
class Traces:
    """Some traces as arrays, [traces].

    keys: of the prompt or request. recorded: their tokens; critic: as it was recorded.
    correct: NaN where unknown. cut, spared: see `Trace`.
    """

    keys: NDArray[np.uint32]
    recorded: Recorded
    lengths: NDArray[np.int64]
    cut: NDArray[np.bool_]
    spared: NDArray[np.bool_]
    correct: Array

    def __len__(self) -> int:
        return len(self.keys)

    def where(self, rows: NDArray[np.bool_]) -> Traces:
        """Some of them."""
        if rows.all():
            return self
        return Traces(
            keys=self.keys[rows],
            recorded=self.recorded.where(rows),
            lengths=self.lengths[rows],
            cut=self.cut[rows],
            spared=self.spared[rows],
            correct=self.correct[rows],
        )


def itself(traces: Traces) -> Traces:
    """The work of who wants the traces themselves."""
    return traces


def read_traces(paths: Iterable[Path], *, outcome: str, known: Known | None) -> Iterator[Traces]:
    """All traces that ended by themselves, by their limit or by a stop.

    Args:
        outcome: the field or column that says whether a trace was right.
        known: outcomes by id, in the place of that field.

    Raises:
        TraceError: naming the file, and the line where there is one.
    """
    waiting: list[Trace] = []
    longest = numbers = 0
    for path in paths:
        for trace in _read(path, outcome, known):
            if not len(trace.logprobs):
                continue
            length = len(trace.logprobs)
            padded = max(longest, length) * (len(waiting) + 1)
            full = len(waiting) == _TRACES or numbers + length > _NUMBERS or padded > 2 * _NUMBERS
            if waiting and full:
                yield _stacked(waiting)
                waiting, longest, numbers = [], 0, 0
            waiting.append(trace)
            longest = max(longest, length)
            numbers += length
    if waiting:
        yield _stacked(waiting)


def read_outcomes(path: Path, outcome: str) -> dict[tuple[str, int | None], bool]:
    """Outcomes from a file of JSON lines: `request` or `id`, perhaps `index`, and the outcome."""
    known: dict[tuple[str, int | None], bool] = {}
    for number, row in _rows(path):
        where = f"{path}:{number}"
        key = next((row[name] for name in _NAMES if name in row), None)
        if not isinstance(key, str):
            raise TraceError(f"{where}: an outcome needs the `request` or `id` of its trace")
        correct = _outcome(row.get(outcome), outcome, where)
        if correct is None:
            raise TraceError(f"{where}: no {outcome!r}; name the field with --outcome")
        index = row.get("index")
        known[key, index if isinstance(index, int) else None] = correct
    return known


def _read(path: Path, outcome: str, known: Known | None) -> Iterator[Trace]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path, outcome)
        return
    # Of a session whose monitor went on from turn to turn, which stand together: one rollout.
    last: Trace | None = None
    turn: tuple[object, object] = (None, None)
    for number, row in _rows(path):
        where = f"{path}:{number}"
        if row.get("end") == "aborted":
            continue  # where it would have ended nobody knows
        logprobs, max_logprobs = (
            _numbers(row, name, where) for name in ("logprobs", "max_logprobs")
        )
        confidences = _numbers(row, "confidences", where) if "confidences" in row else None
        if len({len(c) for c in (logprobs, max_logprobs, confidences) if c is not None}) > 1:
            raise TraceError(f"{where}: the numbers of tokens differ between the columns")
        if known is None:
            correct = _outcome(row.get(outcome), outcome, where)
        else:
            index = row.get("index")
            ids = [row[name] for name in _NAMES if isinstance(row.get(name), str)]
            found = [known.get((key, i)) for key in ids for i in (index, None)]
            correct = next((value for value in found if value is not None), None)
        cut = row.get("end") == "early_stop"
        trace = Trace(
            key=str(row.get("session") or row.get("request") or row.get("id") or where),
            logprobs=logprobs,
            max_logprobs=max_logprobs,
            confidences=confidences,
            prompt_tokens=row.get("prompt_tokens"),
            completed=row.get("end", "completed") == "completed",
            cut=cut,
            spared=row.get("cut") is not None and not cut,
            correct=None if cut else correct,
        )
        if carried := row.get("carried"):
            before = last is not None and turn == (row.get("session"), row.get("turn"))
            if last is None or not before or len(last.logprobs) != carried:
                continue  # its beginning is not there, so nobody knows what its monitor saw
            last = _joined(last, trace)
        else:
            if last is not None:
                yield last
            last = trace
        turn = (row.get("session"), row["turn"] + 1) if "turn" in row else (None, None)
    if last is not None:
        yield last


def _joined(before: Trace, trace: Trace) -> Trace:
    """Two turns as one rollout; what is known of it is what is known of the last."""
    confidences = None
    if before.confidences is not None and trace.confidences is not None:
        confidences = np.concatenate([before.confidences, trace.confidences])
    ended = (len(before.logprobs),) if before.completed else ()
    return trace._replace(
        logprobs=np.concatenate([before.logprobs, trace.logprobs]),
        max_logprobs=np.concatenate([before.max_logprobs, trace.max_logprobs]),
        confidences=confidences,
        prompt_tokens=before.prompt_tokens,
        earlier=(*before.earlier, *ended),
    )


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield number, msgspec.json.decode(line, type=dict[str, Any])
                except msgspec.MsgspecError as error:
                    raise TraceError(f"{path}:{number}: no JSON object: {error}") from error
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error


def _numbers(row: dict[str, Any], name: str, where: str) -> Array:
    try:
        numbers = np.array(row[name], dtype=np.float64)  # null becomes NaN
    except KeyError:
        raise TraceError(f"{where}: no {name!r}; is it a trace of --record?") from None
    except (TypeError, ValueError) as error:
        raise TraceError(f"{where}: {name} must be a list of numbers: {error}") from error
    if numbers.ndim != 1:
        raise TraceError(f"{where}: {name} must be a list of numbers")
    return numbers


def _outcome(value: object, name: str, where: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if value in (0, 1):
        return bool(value)
    raise TraceError(f"{where}: {name} must be true or false, not {value!r:.60}")


def _read_parquet(path: Path, outcome: str) -> Iterator[Trace]:
    parquet = needed("pyarrow.parquet", "train")
    columns = [*_COLUMNS[:-1], outcome]
    try:
        with parquet.ParquetFile(path) as file:
            absent = sorted({*columns} - {*file.schema_arrow.names})
            if absent:
                raise TraceError(f"{path}: no column {absent[0]!r}; is it a dump of rollouts?")
            more = {*file.schema_arrow.names} & {"values", "history", "probes"}
            columns += sorted(more)
            for batch in file.iter_batches(batch_size=_TRACES, columns=columns):
                yield from _rollouts(batch, outcome, str(path))
    except OSError as error:
        raise TraceError(f"{path}: {error}") from error
    except needed("pyarrow", "train").ArrowException as error:
        raise TraceError(f"{path} is no Parquet file, or damaged: {error}") from error


def _rollouts(batch: Any, outcome: str, where: str) -> Iterator[Trace]:
    names = [name for name in ("logprobs", "max_logprobs", "values") if name in batch.schema.names]
    numbers = {name: _lists(batch.column(name)) for name in names}
    prompts = batch.column("prompt_ids").value_lengths().to_pylist()
    beside = [name for name in ("history", "probes") if name in batch.schema.names]
    told = batch.select(["prompt", "end", "kept", "audited", outcome, *beside]).to_pylist()
    for number, row in enumerate(told):
        if row["end"] == "error":
            continue
        stopped = row["end"] == "early_stop"
        cut = stopped and not row["audited"]
        tokens = row["kept"] if cut else None
        rows = {name: column[number][:tokens] for name, column in numbers.items()}
        if len({*map(len, rows.values())}) > 1:
            raise TraceError(f"{where}: {' and '.join(rows)} differ in length in a row")
        yield Trace(
            # Not the problem's name: two recordings may name one problem differently, or two alike.
            key=row["prompt"],
            confidences=None,
            prompt_tokens=prompts[number],
            completed=row["end"] != "length" and not cut,
            cut=cut,
            spared=stopped and not cut,
            correct=None if cut else _outcome(row[outcome], outcome, where),
            history=row.get("history"),
            probes=row.get("probes"),
            earlier=(),
            **rows,
        )


def _lists(column: Any) -> list[Array]:
    """A column of lists as arrays, without a Python number for each of theirs."""
    offsets = column.offsets.to_numpy()
    numbers = column.values.to_numpy(zero_copy_only=False)
    return [numbers[start:end] for start, end in itertools.pairwise(offsets)]


def _stacked(traces: list[Trace]) -> Traces:
    lengths = np.array([len(trace.logprobs) for trace in traces], dtype=np.int64)
    ends = [
        (*trace.earlier, length if trace.completed else 0)
        for trace, length in zip(traces, lengths.tolist(), strict=True)
    ]
    prompts = [math.nan if t.prompt_tokens is None else t.prompt_tokens for t in traces]
    correct = [math.nan if t.correct is None else float(t.correct) for t in traces]
    return Traces(
        keys=np.array([zlib.crc32(trace.key.encode()) for trace in traces], dtype=np.uint32),
        recorded=Recorded(
            logprobs=pad([trace.logprobs for trace in traces]),
            max_logprobs=pad([trace.max_logprobs for trace in traces]),
            prompt_tokens=np.array(prompts, dtype=np.float64),
            completed_at=np.nan_to_num(pad(ends)).astype(np.int64),
            critic=_padded([trace.values for trace in traces], lengths.max()),
            confidences=_padded([trace.confidences for trace in traces], lengths.max()),
            history=np.array([trace.history for trace in traces], dtype=np.float64),
            probes=padded_probes([trace.probes or [] for trace in traces], lengths.tolist()),
        ),
        lengths=lengths,
        cut=np.array([trace.cut for trace in traces]),
        spared=np.array([trace.spared for trace in traces]),
        correct=np.array(correct),
    )


def _padded(rows: list[Array | None], longest: int) -> Array | None:
    if all(row is None for row in rows):
        return None
    out = np.full((len(rows), longest), np.nan)
    known = pad([np.empty(0) if row is None else row for row in rows])
    out[:, : known.shape[1]] = known
    return out
