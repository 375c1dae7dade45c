"""What a run writes while it goes: metrics.jsonl, TensorBoard, one line a step in the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from rich.console import Console

from espo_gateway.rules import Gate
from espo_rl.config import Recipe
from espo_rl.estimator import weights, with_outcome
from espo_rl.types import EndReason, Rollout

if TYPE_CHECKING:
    from espo_rl.stopping import StopController


class RunLog:
    """The log of one run. Steps after `start` are dropped from an older log: they come again."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._folder = recipe.run.output
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self.start = 0

    def __enter__(self) -> RunLog:
        from torch.utils.tensorboard import SummaryWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        recipe = self._recipe.model_dump(mode="json")
        (self._folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
        path = self._folder / "metrics.jsonl"
        rows = path.read_text().splitlines() if self.start and path.exists() else []
        kept = [row for row in rows if 0 < _step_of(row) <= self.start]
        path.write_text("".join(row + "\n" for row in kept))
        self._file: TextIO = path.open("a")
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self.start + 1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._board.close()

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self._console.print(text)

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number for TensorBoard."""
        self._board.add_scalar(name, value, step)

    def step(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        gate: Gate,
        stopping: StopController,
        update: dict[str, float],
        seconds: dict[str, float],
    ) -> None:
        """Write a finished step everywhere."""
        row = step_metrics(rollouts, gate, stopping) | update
        row |= {f"seconds/{phase}": value for phase, value in seconds.items()}
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self.scalar(name, value, step)
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        rule = gate.rule if gate.rule != "none" else stopping.warmup.reason
        self.say(
            f"step {step}/{self._recipe.run.steps}  accuracy {row['accuracy']:.2f}  "
            f"stopped {row['stop_share']:.0%} (false {row['audited_correct']}/{row['audited']})  "
            f"tokens {row['tokens']:,}  length {row['length']:.0f}  "
            f"entropy {row['entropy']:.3f}  explained {row['explained_variance']:.2f}  "
            f"rollout {seconds['rollout']:.1f} s  update {seconds['update']:.1f} s  [{rule}]"
        )


def _step_of(row: str) -> int:
    """The step of a row of metrics.jsonl; 0 for what a kill left of one."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def step_metrics(
    rollouts: Sequence[Rollout], gate: Gate, stopping: StopController
) -> dict[str, Any]:
    """The numbers of a batch. Accuracy is of full rollouts: audited ones stand for the stopped."""
    usable = [rollout for rollout in rollouts if rollout.end is not EndReason.ERROR]
    known = with_outcome(usable)
    audited = [rollout for rollout in known if rollout.audited]
    share = stopping.config.audit_share or 1.0
    weight = weights(known, share)
    count = len(usable)
    return {
        "rule": gate.rule,
        "gate_version": gate.version,
        "warmup": stopping.warmup.reason,
        "accuracy": float(np.average([bool(r.correct) for r in known], weights=weight))
        if known
        else math.nan,
        "reward": float(np.mean([rollout.reward for rollout in usable])),
        "stop_share": sum(rollout.stopped for rollout in usable) / count,
        "completed_share": sum(r.end is EndReason.COMPLETED for r in usable) / count,
        "length_share": sum(r.end is EndReason.LENGTH for r in usable) / count,
        "errors": len(rollouts) - count,
        "audited": len(audited),
        "audited_correct": sum(bool(rollout.correct) for rollout in audited),
        "overshoot": sum(rollout.overshoot for rollout in usable),
        "length": float(np.mean([rollout.kept for rollout in usable])),
        "beta": gate.beta,
        "p_star": gate.p_star,
        "regret_mean": stopping.statistics.mean,
        "regret_variance": stopping.statistics.variance,
        "explained_variance": math.nan
        if stopping.explained_variance is None
        else stopping.explained_variance,
    }
