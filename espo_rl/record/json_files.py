"""JSON files that are there whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from espo_gateway.files import written_whole


def write_json(path: Path, content: Any, *, indent: int = 2) -> None:
    """Write it whole or not at all; its folder is made. What is no number becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as scratch:
        scratch.write_text(json.dumps(nulls(content), indent=indent) + "\n")


def nulls(value: Any) -> Any:
    """NaN is no JSON."""
    if isinstance(value, dict):
        return {key: nulls(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [nulls(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
