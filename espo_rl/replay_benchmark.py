"""Synthetic rollouts to time a replay by, in the format of the dumps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from espo_gateway.rules import Gate
from espo_rl.dumps import rollouts_table
from espo_rl.types import EndReason, Problem, Rollout

_SAMPLES = 4  # of each prompt


def make_rollouts(count: int, tokens: int, seed: int = 0) -> list[Rollout]:
    """Rollouts of a length uniform in [tokens/2, tokens]; those that fail turn unsure somewhere."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for number in range(count):
        prompt = number // _SAMPLES
        correct = bool(rng.random() < (prompt % 5 + 0.5) / 5)
        length = int(rng.integers(max(tokens // 2, 1), tokens + 1))
        mistakes = np.full(length, 0.05)
        if not correct:
            mistakes[int(rng.integers(0, length)) :] = 0.3
        regrets = np.where(rng.random(length) < mistakes, rng.exponential(1.0, length), 0.0)
        best = -rng.exponential(0.1, length)
        rollouts.append(
            Rollout(
                problem=Problem(f"{seed}-{prompt}", "", ""),
                prompt_ids=[1] * 20,
                token_ids=[1] * length,
                logprobs=best - regrets,
                max_logprobs=best,
                text="",
                end=EndReason.COMPLETED,
                kept=length,
                correct=correct,
            )
        )
    return rollouts


def write_rollouts(path: Path, count: int, tokens: int, seed: int = 0) -> int:
    """Write them as a dump; returns how many."""
    rollouts = make_rollouts(count, tokens, seed)
    pq.write_table(rollouts_table(0, rollouts, Gate(), {}), path, compression="zstd")
    return len(rollouts)
