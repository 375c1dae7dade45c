"""Recorded traces read back, some at a time: the gateway's JSON lines, or the trainer's Parquet.

A trace that was cut says nothing of what would have come after, nor whether it would have been
right. One that was stopped in word only (an audit, shadow mode) is whole.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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


_Count = Annotated[int, msgspec.Meta(ge=0)]


class TraceError(ValueError):
    """A file that cannot be read, or a line that makes no sense; the message names it."""


class _About(msgspec.Struct):
    """Of a JSON line all but its numbers and its outcome. prompt: anything that names it."""

    request: str | int | None = None
    id: str | int | None = None
    session: str | int | None = None
    prompt: str | int | None = None
    prompt_token_ids: list[int] | None = None
    prompt_tokens: _Count | None = None
    turn: int | None = None
    carried: _Count | None = None
    end: str | None = "completed"
    cut: _Count | None = None


class Trace(NamedTuple):
    """One choice, or a session's turns under one monitor. correct: None: unknown.

    key: of the prompt, as far as `by_prompt`; else traces of one request or session have the same.
    session: whose outcome is that of all its turns. earlier: where the turns before the last ended
    by themselves, in tokens. cut: generated no further than the cut. spared: the rule would have
    cut it. values: a critic's V of each token. history, probes: what was told beside
    (`espo_gateway.stop.told`).
    """

    key: str
    by_prompt: bool
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
    session: str | None = None
    earlier: tuple[int, ...] = ()


@dataclass(frozen=True)
class Traces:
    """Some traces as arrays, [traces].

    keys, by_prompt: see `Trace`. sessions: the same for those that share an outcome, 0 for one of
    its own. recorded: their tokens; critic: as it was recorded.
    correct: NaN where unknown. cut, spared: see `Trace`.
    """

    keys: NDArray[np.uint32]
    by_prompt: NDArray[np.bool_]
    sessions: NDArray[np.uint32]
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
            by_prompt=self.by_prompt[rows],
            sessions=self.sessions[rows],
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
        known: outcomes by id, in the place of that field; of JSON lines alone.

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


def unnamed(traces: int) -> list[str]:
    """A warning where so many do not tell their prompt."""
    if not traces:
        return []
    return [
        f"{traces:,} traces do not tell their prompt, so each request or session counts as one of "
        "its own: where they share prompts, estimators judge what they were fitted on, and all is "
        'less sure than is said; give the lines a "prompt", which may be anything that names it'
    ]


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
        if known is not None:
            raise TraceError(
                f"{path}: --outcomes has no effect on a dump of rollouts, which has its own in a "
                "column (--outcome); leave it out, and write those of JSON lines into the lines"
            )
        yield from _read_parquet(path, outcome)
        return
    # Of a session whose monitor went on from turn to turn, which stand together: one rollout.
    last: Trace | None = None
    turn: tuple[object, object] = (None, None)
    begun: dict[object, str | None] = {}  # the prompts that sessions began with
    for number, row in _rows(path):
        where = f"{path}:{number}"
        try:
            about = msgspec.convert(row, _About)
        except msgspec.ValidationError as error:
            raise TraceError(f"{where}: {error}") from error
        if about.end == "aborted":
            continue  # where it would have ended nobody knows
        logprobs, max_logprobs = (
            _numbers(row, name, where) for name in ("logprobs", "max_logprobs")
        )
        confidences = _numbers(row, "confidences", where) if "confidences" in row else None
        if len({len(c) for c in (logprobs, max_logprobs, confidences) if c is not None}) > 1:
            raise TraceError(f"{where}: the numbers of tokens differ between the columns")
        session = None
        if known is None:
            correct = _outcome(row.get(outcome), outcome, where)
        else:
            index = row.get("index")
            ids = [(name, row[name]) for name in _NAMES if isinstance(row.get(name), str)]
            found = [(name, known.get((key, i))) for name, key in ids for i in (index, None)]
            by, correct = next((one for one in found if one[1] is not None), (None, None))
            session = row["session"] if by == "session" else None
        cut = about.end == "early_stop"
        prompt = _first(about.prompt, about.prompt_token_ids or None)
        if about.session is not None:
            if about.session not in begun or about.turn == 1:
                begun[about.session] = prompt
            prompt = begun[about.session]
        trace = Trace(
            key=prompt or _first(about.session, about.request, about.id) or where,
            by_prompt=prompt is not None,
            logprobs=logprobs,
            max_logprobs=max_logprobs,
            confidences=confidences,
            prompt_tokens=about.prompt_tokens,
            completed=about.end == "completed",
            cut=cut,
            spared=about.cut is not None and not cut,
            correct=None if cut else correct,
            session=session,
        )
        if about.carried:
            before = last is not None and turn == (about.session, about.turn)
            if last is None or not before or len(last.logprobs) != about.carried:
                continue  # its beginning is not there, so nobody knows what its monitor saw
            last = _joined(last, trace)
        else:
            if last is not None:
                yield last
            last = trace
        turn = (None, None) if about.turn is None else (about.session, about.turn + 1)
    if last is not None:
        yield last


def _first(*names: object) -> str | None:
    """The first that there is, in words: 0 is one, and "" is none."""
    return next((str(name) for name in names if name not in (None, "")), None)


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
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
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
            _check_types(file.schema_arrow, path)
            row = 0
            for batch in file.iter_batches(batch_size=_TRACES, columns=columns):
                yield from _rollouts(batch, outcome, path, row)
                row += batch.num_rows
    except OSError as error:
        raise TraceError(f"{path}: {error}") from error
    except needed("pyarrow", "train").ArrowException as error:
        raise TraceError(f"{path} is no Parquet file, or damaged: {error}") from error


def _check_types(schema: Any, path: Path) -> None:
    types = needed("pyarrow", "train").types

    def numbers(of: Any) -> bool:
        return bool(types.is_floating(of) or types.is_integer(of) or types.is_null(of))

    def texts(of: Any) -> bool:
        return bool(types.is_string(of) or types.is_large_string(of))

    def lists(of: Any, inner: Callable[[Any], bool] = numbers) -> bool:
        return bool(types.is_list(of) or types.is_large_list(of)) and inner(of.value_type)

    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        **dict.fromkeys(("prompt", "end"), ("texts", texts)),
        **dict.fromkeys(("kept", "history"), ("numbers", numbers)),
        **dict.fromkeys(
            ("prompt_ids", "logprobs", "max_logprobs", "values"), ("lists of numbers", lists)
        ),
        "probes": ("lists of lists of numbers", lambda of: lists(of, lists)),
    }
    for field in schema:
        what, fits = kinds.get(field.name, ("", lambda _: True))
        if not fits(field.type):
            raise TraceError(f"{path}: column {field.name!r} must hold {what}, not {field.type}")


def _rollouts(batch: Any, outcome: str, path: Path, first: int) -> Iterator[Trace]:
    names = [name for name in ("logprobs", "max_logprobs", "values") if name in batch.schema.names]
    numbers = {name: _lists(batch.column(name)) for name in names}
    prompts = batch.column("prompt_ids").value_lengths().to_pylist()
    beside = [name for name in ("history", "probes") if name in batch.schema.names]
    told = batch.select(["prompt", "end", "kept", "audited", outcome, *beside]).to_pylist()
    for number, row in enumerate(told):
        where = f"{path}, row {first + number}"
        if row["end"] == "error":
            continue
        needs = ["prompt", "kept"] if row["end"] == "early_stop" else ["prompt"]
        if missing := [name for name in needs if row[name] is None]:
            raise TraceError(f"{where}: {missing[0]} is missing")
        stopped = row["end"] == "early_stop"
        cut = stopped and not row["audited"]
        tokens = row["kept"] if cut else None
        rows = {name: column[number][:tokens] for name, column in numbers.items()}
        if "values" in rows and not len(rows["values"]):
            del rows["values"]  # of this one nobody told any
        if len({*map(len, rows.values())}) > 1:
            raise TraceError(f"{where}: {' and '.join(rows)} differ in length")
        yield Trace(
            # Not the problem's name: two recordings may name one problem differently, or two alike.
            key=row["prompt"],
            by_prompt=True,
            confidences=None,
            prompt_tokens=prompts[number],
            completed=row["end"] != "length" and not cut,
            cut=cut,
            spared=stopped and not cut,
            correct=None if cut else _outcome(row[outcome], outcome, where),
            history=row.get("history"),
            probes=row.get("probes"),
            logprobs=rows["logprobs"],
            max_logprobs=rows["max_logprobs"],
            values=rows.get("values"),
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
        keys=_hashes(trace.key for trace in traces),
        by_prompt=np.array([trace.by_prompt for trace in traces]),
        sessions=_hashes(trace.session for trace in traces),
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


def _hashes(names: Iterable[str | None]) -> NDArray[np.uint32]:
    return np.array([zlib.crc32((name or "").encode()) for name in names], dtype=np.uint32)


def _padded(rows: list[Array | None], longest: int) -> Array | None:
    if all(row is None for row in rows):
        return None
    out = np.full((len(rows), longest), np.nan)
    known = pad([np.empty(0) if row is None else row for row in rows])
    out[:, : known.shape[1]] = known
    return out
