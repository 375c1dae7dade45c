"""What a client is told of a choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Record:
    """What the monitor saw and did, in each finished choice's `espo`.

    stopped: whether the choice was cut. audited: whether it was let finish in spite of it. cut: the
    token it was, or in shadow mode would have been, cut at. overshoot: tokens the server sent past
    the cut. missing: tokens without a usable logprob. reason: why the choice was not monitored.
    """

    mode: Literal["enforce", "shadow", "off"]
    stopped: bool
    audited: bool = False
    reason: str | None = None
    rule: str | None = None
    cut: int | None = None
    tokens: int = 0
    overshoot: int = 0
    missing: int = 0
    z: float | None = None
    threshold: float | None = None
    value: float | None = None
    beta: float | None = None
    gate_version: int = 0
    weights_version: str = ""
    trace: list[Any] | None = None


End = Literal["completed", "length", "early_stop", "aborted"]
