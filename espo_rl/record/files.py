"""Files that are there whole or not at all, JSON among them."""

from __future__ import annotations

import json
import math
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


def nulls(value: Any) -> Any:
    """NaN is no JSON."""
    if isinstance(value, dict):
        return {key: nulls(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [nulls(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
