"""Controllers of a threshold as the tests of them make them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from espo_gateway.stop.rules import threshold_of
from espo_gateway.stop.threshold_control import (
    AuditThreshold,
    Bound,
    Outcomes,
)

LOW, HIGH = threshold_of("value-only").level(1e-6), 0.0


def outcomes(levels: ArrayLike, correct: ArrayLike, weights: ArrayLike | None = None) -> Outcomes:
    made = np.asarray(levels, np.float32)
    weights = np.ones(len(made)) if weights is None else weights
    return Outcomes(made, np.asarray(correct, bool), np.asarray(weights, np.float32))


def audit(
    limit: float = 0.05,
    confidence: float = 0.9,
    window: int = 20,
    low: float = LOW,
    high: float = HIGH,
) -> AuditThreshold:
    bound = Bound("false-positives", limit, confidence)
    return AuditThreshold(bound, window=window, low=low, high=high)
