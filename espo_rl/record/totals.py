"""Rollouts, stops and tokens counted over a run; what the rollouts would have taken in full."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtrit

from espo_rl.record.intervals import Share
from espo_rl.types import EndReason, Rollout


@dataclass
class Totals:
    """Counts over all training rollouts so far; sums only, so it stays small."""

    rollouts: int = 0
    gated: int = 0  # rollouts sampled while a rule was on
    stopped: int = 0
    audited: int = 0
    audited_correct: int = 0
    finished_right: int = 0  # right ones that were not stopped, while a rule was on
    errors: int = 0
    tokens: int = 0  # sampled by the server
    needed: int = (
        0  # of these, up to each rollout's end; an audited one ends where it would in full
    )
    remaining: list[int] = field(default_factory=list)  # of audited ones: tokens past the cut

    @property
    def overshoot(self) -> int:
        """Tokens sampled between a decision and the abort."""
        return self.tokens - self.needed

    def add(self, rollouts: Sequence[Rollout], tokens: int, gated: bool) -> None:
        """Count a batch, for which the server sampled `tokens`."""
        self.tokens += tokens
        for rollout in rollouts:
            self.needed += len(rollout.token_ids)
            if rollout.end is EndReason.ERROR:
                self.errors += 1
                continue
            self.rollouts += 1
            self.gated += gated
            self.stopped += rollout.stopped
            self.finished_right += bool(gated and rollout.correct and not rollout.stopped)
            if rollout.audited:
                self.audited += 1
                self.audited_correct += bool(rollout.correct)
                self.remaining.append(len(rollout.token_ids) - rollout.kept)

    def right_lost(self, audit_share: float) -> Share:
        """Of the right rollouts, sampled while a rule was on, the share that it stopped.

        Counted in those that an audit would have shown: this share of them.
        """
        shown = audit_share * self.finished_right
        return Share(self.audited_correct, self.audited_correct + shown)

    def tokens_without_stopping(self) -> tuple[float, float]:
        """Tokens the same rollouts would have had in full, and the half width of a 95 % interval.

        An audited rollout was generated in full. A stopped one that was not is taken to go on for
        as long as the audited ones did on average; audits are a random sample of the stopped ones.
        """
        unaudited = self.stopped - self.audited
        if not unaudited:
            return float(self.needed), 0.0
        if not self.remaining:
            return math.nan, math.nan
        estimate = self.needed + unaudited * float(np.mean(self.remaining))
        if self.audited < 2:
            return estimate, math.nan
        # Both are random: the mean of the audited, and the sum of the others.
        error = np.std(self.remaining, ddof=1) * math.sqrt(unaudited**2 / self.audited + unaudited)
        return estimate, float(stdtrit(self.audited - 1, 0.975) * error)
