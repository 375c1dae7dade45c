"""What a run came to, in numbers a person and a program can read; accumulated step by step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from espo_rl.config import Recipe
from espo_rl.gate.audits import Audits
from espo_rl.gate.batch_gates import StopController
from espo_rl.record.intervals import ProblemMean, Share
from espo_rl.record.json_files import nulls, write_json
from espo_rl.record.provenance import machine, versions
from espo_rl.record.totals import Totals
from espo_rl.types import Rollout


class Summary:
    """Accumulates, then writes summary.json and says it in words."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.totals = Totals()
        self.accuracy: dict[str, ProblemMean] = {}
        self.seconds: dict[str, float] = {}
        self.restarts = 0  # of servers
        self._explained: list[float] = []
        self._staleness: list[float] = []

    def add(
        self,
        rollouts: Sequence[Rollout],
        tokens: int,
        stopping: StopController,
        rule: str,
        staleness: float = 0.0,
    ) -> None:
        """Take note of a finished step, for whose rollouts the server sampled `tokens`.

        staleness: mean number of updates since the weights they were sampled with.
        """
        self._staleness.append(staleness)
        self.totals.add(rollouts, tokens, gated=rule != "none")
        explained = stopping.explained_variance
        if rule != "none" and explained is not None and math.isfinite(explained):
            self._explained.append(explained)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to the seconds of that phase."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def count_restart(self) -> None:
        """Take note of a server that was brought back."""
        self.restarts += 1

    def token_metrics(self) -> dict[str, float]:
        """Tokens of the run so far, for the group `rollout`."""
        without, _ = self.totals.tokens_without_stopping()
        return {"tokens_total": self.totals.tokens, "tokens_total_without_stopping": without}

    @property
    def bound(self) -> str | None:
        """Whether the audits of the whole run show that `Stopping.bound` was kept.

        None where nothing was to be kept: the threshold follows another aim.
        """
        stopping = self.recipe.stopping
        if not stopping.bounded:
            return None
        low, high = self.cost.interval
        if high <= stopping.bound.limit:
            return "met"
        return "not met" if low > stopping.bound.limit else "not shown"

    @property
    def cost(self) -> Share:
        """What `Stopping.bound` bounds, over the run."""
        if self.recipe.stopping.bound.of == "right-lost":
            return self.right_lost
        return Share(self.totals.audited_correct, self.totals.audited)

    @property
    def _audits(self) -> Audits:
        return Audits.of(self.recipe.stopping.audit_share, self.recipe.rollout.n)

    @property
    def right_lost(self) -> Share:
        """Of the right rollouts the share that was stopped, by the audits."""
        return self.totals.right_lost(self._audits.share)

    @property
    def staleness(self) -> float:
        """Mean over the steps."""
        return float(np.nanmean(self._staleness)) if self._staleness else math.nan

    def as_dict(self) -> dict[str, Any]:
        """What summary.json holds; unknown numbers are null."""
        totals = self.totals
        without, half_width = totals.tokens_without_stopping()
        false_positives = Share(totals.audited_correct, totals.audited)
        greedy = [when for when in ("greedy_before", "greedy_after") if when in self.accuracy]
        accuracy = {
            when: self.accuracy.get(when, ProblemMean.of([]))
            for when in ("before", "after", *greedy)
        }
        return nulls(
            {
                **{f"accuracy_{when}": mean.value for when, mean in accuracy.items()},
                **{f"accuracy_{when}_interval": mean.interval for when, mean in accuracy.items()},
                "tokens_generated": totals.tokens,
                "tokens_without_stopping": without,
                "tokens_without_stopping_half_width": half_width,
                "stop_rate": Share(totals.stopped, totals.gated).value,
                "false_positive_rate": false_positives.value,
                "false_positive_interval": false_positives.interval,
                "right_lost": self.right_lost.value,
                "right_lost_interval": self.right_lost.interval,
                "right_lost_trials": self.right_lost.trials,
                "bound": self.bound and dataclasses.asdict(self.recipe.stopping.bound),
                "bound_kept": self.bound,
                "audited": totals.audited,
                "overshoot_tokens": totals.overshoot,
                "errors": totals.errors,
                "restarts": self.restarts,
                "staleness": self.staleness,
                "rule": self.recipe.stopping.rule,
                "explained_variance": float(np.mean(self._explained))
                if self._explained
                else math.nan,
                "seconds": {phase: round(value, 1) for phase, value in self.seconds.items()},
                "steps": self.recipe.run.steps,
                "seed": self.recipe.run.seed,
                "versions": versions(),
                "machine": machine(),
                "recipe": self.recipe.model_dump(mode="json"),
            }
        )

    def write(self, path: Path) -> Path:
        """Write summary.json; returns its path."""
        write_json(path, self.as_dict())
        return path

    def text(self) -> str:
        """The summary for a person."""
        totals, stopping = self.totals, self.recipe.stopping
        without, half_width = totals.tokens_without_stopping()
        unstopped, saved = "unknown: no stopped rollout was audited", "unknown"
        if math.isfinite(without) and without:
            used = totals.tokens / without
            spread, spread_used = "unknown", "unknown"
            if math.isfinite(half_width):
                spread, spread_used = f"{half_width:,.0f}", f"{used * half_width / without:.1%}"
            unstopped = f"{without:,.0f} ± {spread} (95 %, {totals.audited} audited rollouts)"
            saved = f"{1 - used:.1%} ± {spread_used}, the warm-up and the audits included"
        rule = "none (plain PPO)"
        if stopping.rule != "none":
            rule = (
                f"{stopping.rule}, threshold by {stopping.threshold}, "
                f"{100 * self._audits.share:g}% audited"
            )
        explained = "unknown"
        if self._explained:
            mean = float(np.mean(self._explained))
            explained = f"{mean:.2f} of the outcome, by the estimate that gates"
        phases = ", ".join(f"{phase} {value:.0f} s" for phase, value in self.seconds.items())
        unknown = ProblemMean.of([])
        lines = {
            "rule": rule,
            "accuracy before": self.accuracy.get("before", unknown),
            "accuracy after": self.accuracy.get("after", unknown),
            **{
                f"greedy {when}": self.accuracy[f"greedy_{when}"]
                for when in ("before", "after")
                if f"greedy_{when}" in self.accuracy
            },
            "rollouts stopped": Share(totals.stopped, totals.gated),
            "right rollouts lost": self.right_lost,
            "false positives (audit)": Share(totals.audited_correct, totals.audited),
            **self._bound_line(),
            "tokens generated": f"{totals.tokens:,}",
            "tokens without stopping": unstopped,
            "tokens saved": saved,
            "tokens past the decision": f"{totals.overshoot:,}",
            "explained variance": explained,
            "time": phases,
        }
        if self.staleness > 0:
            lines["staleness"] = f"{self.staleness:.2f} updates, on average"
        if self.restarts:
            lines["servers restarted"] = self.restarts
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())

    def _bound_line(self) -> dict[str, str]:
        reading = {
            "met": "met: the interval lies below it",
            "not met": "NOT MET: the interval lies above it",
            "not shown": "not shown: it lies within the interval",
        }
        if self.bound is None:
            return {}
        bound = self.recipe.stopping.bound
        known = reading[self.bound] if self.cost.trials else "not shown: nothing was audited"
        return {"bound": f"{bound.cost} under {bound.limit:.1%}, {known}"}
