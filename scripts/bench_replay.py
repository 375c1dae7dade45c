"""How fast `espo_rl.replay` is, and how much memory it takes, on synthetic rollouts.

    python scripts/bench_replay.py 20000 --tokens 8192

Prints one JSON object. They are read from one small file over and over. Memory is that of all
processes. The start of these and the fits take seconds whatever the number, so take many.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from espo_gateway.stop.rules import Gate
from espo_gateway.traces.judge import fitted, replayed
from espo_rl.record.rollout_files import rollouts_table
from espo_rl.replay.source import PROCESSES, Source, processes
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
                problem=Problem(f"{seed}-{prompt}", f"{seed}-{prompt}", ""),
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


def benchmark(rollouts: int, tokens: int) -> dict[str, float]:
    """Replay so many rollouts, fits of the estimators included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rollouts.parquet"
        written = make_rollouts(min(rollouts, 512), tokens)
        pq.write_table(rollouts_table(0, written, Gate(), {}), path, compression="zstd")
        source = Source([path] * max(1, round(rollouts / len(written))), "correct", None)
        started = time.perf_counter()
        learnt = fitted(source.read, 5)
        fitting = time.perf_counter() - started
        done = replayed(source.read, learnt)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if processes.cache_info().currsize:
        processes().shutdown()
        peak += PROCESSES * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "rollouts": int(done.judged.correct.size),
        "tokens": source.tokens,
        "rules": len(done.rules),
        "seconds_fit": round(fitting, 2),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(source.tokens / seconds),
        "peak_megabytes": round(peak / 1024),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rollouts", type=int, help="how many, at least 1")
    parser.add_argument("--tokens", type=int, default=8192, help="of each (default: %(default)s)")
    options = parser.parse_args()
    if min(options.rollouts, options.tokens) < 1:
        parser.error("rollouts and --tokens must be at least 1")
    print(json.dumps(benchmark(options.rollouts, options.tokens)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
