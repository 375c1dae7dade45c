"""Recorded rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.regret import (
    MISSING_LOGPROB,
    Array,
)


@dataclass(frozen=True)
class Recorded:
    """Rollouts to replay, shape [rollouts, tokens]; known: where g is a number."""

    logprobs: Array
    known: NDArray[np.bool_]
    confidences: Array | None


def pad(rows: Sequence[Sequence[float] | Array]) -> Array:
    """Stack rows of different lengths to [rows, longest], padded with NaN."""
    out = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def recorded_regrets(logprobs: Array, max_logprobs: Array) -> Array:
    """g of recorded rollouts, NaN where `surrogate_regret` has no number; same shape."""
    with np.errstate(invalid="ignore"):
        known = [(rows > MISSING_LOGPROB) & (rows < np.inf) for rows in (logprobs, max_logprobs)]
        return np.where(known[0] & known[1], np.maximum(max_logprobs - logprobs, 0.0), np.nan)
