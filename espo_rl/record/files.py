"""Files that are there whole or not at all; and where rollouts lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A scratch path beside `path`: it takes its name when the block ends well, else it goes."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write it whole or not at all."""
    with written_whole(path) as scratch:
        scratch.write_text(json.dumps(content, indent=2) + "\n")


def rollout_files(path: Path) -> list[Path]:
    """The dumps of a run's folder, or of a folder of them, in order; of a file, itself if there."""
    if path.is_file():
        return [path]
    found = (sorted(folder.glob("*.parquet")) for folder in (path / "rollouts", path))
    return next(filter(None, found), [])
