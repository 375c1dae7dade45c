"""Rows 1, 3 and 4 of the method, a function a row: what `Watch` and the array code are held to."""

from __future__ import annotations

import math

from espo_gateway.stop.regret import MISSING_LOGPROB, MonitorConfig, RegretStatistics


def surrogate_regret(logprob: float | None, max_logprob: float | None) -> float | None:
    """g_t = max_a log π(a|s_t) - log π(a_t|s_t), never negative (row 1).

    Returns None when either number is missing, a placeholder, or not finite: a bad number carries
    no evidence and must never stop a rollout.
    """
    if logprob is None or max_logprob is None:
        return None
    if not (MISSING_LOGPROB < logprob < math.inf and MISSING_LOGPROB < max_logprob < math.inf):
        return None
    return max(max_logprob - logprob, 0.0)


class RegretMonitor:
    """Follows one stream: `push` each token's g, read `z`.

    A missing g leaves z as it was: no evidence, no change.
    """

    __slots__ = ("_clip", "_inverse_deviation", "_mean", "_smoothing", "z")

    def __init__(self, statistics: RegretStatistics, config: MonitorConfig) -> None:
        self._mean = statistics.mean
        self._inverse_deviation = 1.0 / math.sqrt(statistics.variance + config.delta)
        self._clip = config.clip
        self._smoothing = config.smoothing
        self.z = 0.0

    def push(self, regret: float | None) -> float:
        """Take the next token's g and return z_t (rows 3 and 4)."""
        if regret is not None:
            normalised = (regret - self._mean) * self._inverse_deviation
            normalised = min(max(normalised, -self._clip), self._clip)
            self.z = self._smoothing * self.z + (1.0 - self._smoothing) * normalised
        return self.z
