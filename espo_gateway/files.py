"""Files and folders: read, written whole or not at all, and told from names on the hub."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: Path, *, fsync: bool = False) -> Iterator[Path]:
    """A scratch path beside `path`, for a file or a folder: it takes the name when the block ends
    well and is removed when it does not.

    A kill at any moment leaves under the name what was there before or the new one, whole; and
    maybe the scratch, which the next write removes. (A folder that was there is removed before the
    new one takes its name: a kill between the two leaves none.)

    Args:
        fsync: the same holds when the machine goes down: nothing takes the name before all of it
            is on the disk.

    Raises:
        OSError: what the block raises, and a name that cannot be taken.
    """
    scratch = path.with_name(path.name + ".tmp")
    _remove(scratch)
    try:
        yield scratch
        if fsync:
            for part in (scratch, *scratch.rglob("*")):
                _fsync(part)
        if scratch.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        scratch.replace(path)
    finally:
        _remove(scratch)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, and ValueError for a file that holds none."""
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def is_folder(model: str) -> bool:
    """Whether a model's name can only be that of a folder, there or not: asked for it, the Hugging
    Face hub takes a minute offline, and what it says is no help."""
    first, _, rest = model.rstrip("/").partition("/")
    named = bool(rest) and "/" not in rest and first not in ("", ".", "..", "~", "runs")
    return not named or Path(first).is_dir()


def _remove(path: Path) -> None:
    """Without an error of its own, which would hide that of the write."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
