"""The rollouts of a report: which ones of a run, and all of them packed for the page."""

from __future__ import annotations

import base64
import gzip
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from espo_gateway.stop.rules import Gate
from espo_rl.record.rollout_files import read_rollouts
from espo_rl.record.run_folder import Row, RunFolder, RunFolderError
from espo_rl.report.token_texts import Pieces, load_tokenizer
from espo_rl.report.traces import gate_row, row, trace
from espo_rl.types import Rollout

#: Tokens of a report, all rollouts together. One costs some 9 bytes, so the file stays under 15 MB.
MOST_TOKENS = 1_200_000


@dataclass(frozen=True)
class Choice:
    """Rollouts to show. places: by file, the numbers of its rows."""

    places: dict[Path, list[int]]
    wanted: int
    total: int
    audited: int  # of those that are shown
    audited_total: int
    lengths: list[int]

    @property
    def longest(self) -> int:
        """Tokens of one rollout that can be shown so that all fit."""
        return fitting(self.lengths, MOST_TOKENS)


def choose(run: RunFolder, wanted: int, advance: Callable[[], None] = lambda: None) -> Choice:
    """All audited rollouts, as only of these is known what a stop cost, then others at random, the
    same ones each time; when there are more audited ones than half of what is wanted, some of them.

    Raises:
        RunFolderError: a file holds no rollouts, or is damaged.
    """
    audited: list[tuple[Path, int, int]] = []
    others: list[tuple[Path, int, int]] = []
    for path in run.rollout_files:
        for place, (is_audited, length) in enumerate(_lengths(path)):
            (audited if is_audited else others).append((path, place, length))
        advance()
    chance = random.Random(0)
    shown = chance.sample(audited, min(len(audited), max(wanted // 2, wanted - len(others))))
    count = len(shown)
    shown += chance.sample(others, min(len(others), wanted - count))
    places: dict[Path, list[int]] = {}
    for path, place, _ in sorted(shown):
        places.setdefault(path, []).append(place)
    lengths = [length for _, _, length in shown]
    total = len(audited) + len(others)
    return Choice(places, wanted, total, count, len(audited), lengths)


def rollouts(run: RunFolder, choice: Choice, advance: Callable[[], None] = lambda: None) -> Row:
    """The chosen rollouts for the page: columns of the table, gates, texts of tokens, and a packed
    trace of each.

    Raises:
        RunFolderError: as `choose`.
    """
    tokenizer, pieces = load_tokenizer(run), Pieces()
    rows: list[Row] = []
    gates: list[Row] = []
    traces: list[str] = []
    for step, gate, chosen in _read(choice):
        gates.append(gate_row(gate))
        for rollout in chosen:
            rows.append(row(rollout, step, len(gates) - 1))
            traces.append(_packed(trace(rollout, gate, tokenizer, pieces, choice.longest)))
        advance()
    return {
        "run": run.name,
        "total": choice.total,
        "audited": choice.audited,
        "auditedTotal": choice.audited_total,
        "longest": choice.longest if max(choice.lengths, default=0) > choice.longest else None,
        "tokenizer": tokenizer is not None,
        "columns": {name: [row[name] for row in rows] for name in rows[0]} if rows else {},
        "gates": gates,
        "pieces": pieces.texts,
        "traces": traces,
    }


def fitting(lengths: Sequence[int], most: int) -> int:
    """The largest cap of each length under which all come to no more than `most`."""
    left, many = most, len(lengths)
    for length in sorted(lengths):
        if length * many > left:
            return left // many
        left, many = left - length, many - 1
    return max(lengths, default=0)


def _lengths(path: Path) -> Iterator[tuple[bool, int]]:
    """Whether each rollout of a file was audited, and its tokens."""
    try:
        table = pq.read_table(path, columns=["audited", "token_ids"])
        lengths = pa.compute.list_value_length(table["token_ids"]).to_pylist()
        yield from zip(table["audited"].to_pylist(), lengths, strict=True)
    except (pa.ArrowException, OSError) as error:
        raise RunFolderError(_damaged(path, error)) from error


def _read(choice: Choice) -> Iterator[tuple[int, Gate, list[Rollout]]]:
    for path, places in choice.places.items():
        try:
            found, gate = read_rollouts(path)
        except (OSError, ValueError) as error:
            raise RunFolderError(_damaged(path, error)) from error
        yield int(path.stem.removeprefix("step-")), gate, [found[place] for place in places]


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} cannot be read: {error}; remove it to make the report without it"


def _packed(shown: Any) -> str:
    """Gzip in base64: the page unpacks a rollout when it is looked at."""
    data = json.dumps(shown, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()
