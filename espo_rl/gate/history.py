"""How often each prompt was solved before: what the source "history" tells (`told.TOLD`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from espo_gateway.stop.regret import Array
from espo_rl.types import Rollout

#: A prompt's own rollouts are mixed with so many of the average prompt.
PRIOR = 2.0


class History:
    """Outcomes by problem id, of all steps so far."""

    def __init__(self) -> None:
        #: right, and all, by problem id; in rollouts
        self._seen: dict[str, tuple[float, float]] = {}
        self._right = self._all = 0.0

    def log_odds(self, problem_id: str) -> float:
        """Of a rollout of the problem being right; of one never seen, the average's."""
        average = (self._right + 0.5) / (self._all + 1.0)
        right, all_ = self._seen.get(problem_id, (0.0, 0.0))
        share = (right + PRIOR * average) / (all_ + PRIOR)
        return math.log(share) - math.log1p(-share)

    def add(self, rollouts: Sequence[Rollout], weights: Array) -> None:
        """Take rollouts of known outcome; weights: how many each stands for, [rollouts]."""
        for rollout, weight in zip(rollouts, weights.tolist(), strict=True):
            right, all_ = self._seen.get(rollout.problem.id, (0.0, 0.0))
            one = weight * bool(rollout.correct)
            self._seen[rollout.problem.id] = right + one, all_ + weight
            self._right += one
            self._all += weight
