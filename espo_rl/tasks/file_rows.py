"""Rows of JSON, JSON Lines and CSV files, with numbers as written.

A data frame would make `15.0` of 15 where 2.5 stands in the same column, round what is large, and
refuse a column of numbers and texts.
"""

from __future__ import annotations

import json
import mmap
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Written(float):
    """A number that remembers how it was written: its text is `1.50`, not 1.5."""

    text: str

    def __new__(cls, text: str) -> Written:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[Written], tuple[str]]:
        return Written, (self.text,)


class JsonFile(Sequence[dict[str, Any]]):
    """The objects of one file, each parsed when it is asked for: one a line, or all in one list.

    Raises:
        ValueError: it holds none; later, a row that is asked for is none. The message says where.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._data: bytes | mmap.mmap = b""
        self._places = array("Q")  # where rows begin and end, in turns
        with self._path.open("rb") as file:
            if self._path.stat().st_size:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._data[: 1 << 20].lstrip(b" \t\r\n\xef\xbb\xbf")[:1] == b"[":
            self._data, self._places = _listed(self._data, self._path)
        else:
            self._places = _lines(self._data)
        if not self._places:
            raise ValueError(f"{self._path} holds nothing: no data")

    def __len__(self) -> int:
        return len(self._places) // 2

    def __getitem__(self, number: Any) -> Any:
        start, end = self._places[2 * number : 2 * number + 2]
        try:
            row = _DECODER.decode(self._data[start:end].decode("utf-8-sig").strip())
        except ValueError as error:
            raise ValueError(
                f"{self._path}: JSON parse error in row {number + 1}: {error}"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{self._path}: row {number + 1} is no object but {row!r:.80}")
        return row


def csv_rows(path: str | Path, options: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of a CSV file, all cells as text; `options` are those of pandas.read_csv.

    Raises:
        ValueError: it holds none, or no table. The message says where.
    """
    import pandas

    as_written = {"dtype": str, "na_filter": False, "index_col": False, "chunksize": None}
    try:
        with warnings.catch_warnings():
            # By itself pandas shifts or drops cells where the first row has more than the header.
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            table = pandas.read_csv(path, **{**options, **as_written})
    except pandas.errors.ParserWarning:
        raise ValueError(f"{path}: row 1 has more cells than there are columns") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if table.empty:
        raise ValueError(f"{path} holds nothing: no data")
    return table.to_dict("records")


class FileRows:
    """Rows of several files, or of parts of them. Columns that a row lacks are None, once known."""

    def __init__(self, parts: Sequence[tuple[Sequence[dict[str, Any]], range]]) -> None:
        self._places = [(file, number) for file, numbers in parts for number in numbers]
        self._columns: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> dict[str, Any]:
        file, number = self._places[place]
        row = file[number]
        self._columns |= dict.fromkeys(row)
        return self._columns | row

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return map(self.__getitem__, range(len(self)))


def _constant(name: str) -> None:
    """NaN and the infinities are no answers."""


def _integer(text: str) -> int | str:
    return int(text) if len(text) < 4000 else text  # Python itself refuses to read longer ones


_DECODER = json.JSONDecoder(parse_float=Written, parse_int=_integer, parse_constant=_constant)


def _lines(data: bytes | mmap.mmap) -> array[int]:
    places, start = array("Q"), 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if data[start:end].strip():
            places.extend((start, end))
        start = end + 1
    return places


def _listed(data: bytes | mmap.mmap, path: Path) -> tuple[bytes, array[int]]:
    """The rows of a list, one after another, and their places."""
    text, places = data[:].decode(), array("Q")
    rows: list[bytes] = []
    at, size = _after_space(text, text.index("[") + 1), 0
    more = text[at : at + 1] != "]"
    while more:
        try:
            _, end = _DECODER.raw_decode(text, at)
        except ValueError as error:
            raise ValueError(f"{path}: JSON parse error in row {len(rows) + 1}: {error}") from None
        rows.append(text[at:end].encode())
        places.extend((size, size + len(rows[-1])))
        size, at = size + len(rows[-1]), _after_space(text, end)
        if more := text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
    if text[at : at + 1] != "]" or _after_space(text, at + 1) < len(text):
        raise ValueError(
            f"{path}: JSON parse error after row {len(rows)}: the list is cut, lacks a comma, or "
            "something follows it"
        )
    return b"".join(rows), places


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
