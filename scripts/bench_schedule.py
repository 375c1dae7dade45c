"""The rollout phase alone: tokens and time saved by stopping, with either schedule.

  python scripts/bench_schedule.py --model runs/base
  python scripts/bench_schedule.py --model MODEL --recipe mine.toml --set rollout.n=4 --json FILE

Trains nothing: a run of the recipe whose updates do nothing, so the policy stays as it is, with
syncs and all. Each seed goes through all four in turn: plain and stopping, batch and refill. What
is counted begins after the warm-up and ends before the last steps, which have nothing to refill.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark.arguments import count
from espo_rl.config import RecipeError, load_recipe
from espo_rl.loop import Loop
from espo_rl.record.json_files import write_json
from espo_rl.record.output import OutputError, check_own, json_with
from espo_rl.record.run_folder import read_run
from espo_rl.rollouts.batch import Batch
from espo_rl.train import FAULTS

#: Not counted: steps at the start, until the gate of a step drawn ahead stops anything, and those
#: at the end that have no next one to fill in with.
FIRST, LAST = 4, 2
#: A rule that needs no outcomes and stops from the second step on.
RULE = [
    "stopping.rule=regret-only",
    "stopping.threshold=quantile",
    "stopping.target_share=0.5",
    "stopping.warmup_batches=1",
]
SETTINGS = ["evaluation.problems=1", "checkpoints.every=0", "logs.tensorboard=false"]


class Sampling(Loop):
    """A run that learns when to stop, and nothing else."""

    async def learn(self, batch: Batch) -> tuple[dict[str, float], int]:
        self.step += 1
        self.stopping.observe(batch.usable, None, gated=batch.gate.rule != "none")
        return {}, len(batch.usable)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or name on the hub")
    parser.add_argument("--recipe", default="arithmetic", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=count, default=3, help="(default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value")
    parser.add_argument("--json", type=Path, help="where the numbers go, too")
    options = parser.parse_args()
    if options.steps <= FIRST + LAST:
        parser.error(f"--steps must be above {FIRST + LAST}, which are not counted")
    if options.json is not None:
        try:
            own = json_with("runs")
            check_own(options.json, "--json", "report of this benchmark", own)
        except OutputError as error:
            print(f"bench_schedule: {error}", file=sys.stderr)
            return 2
    transformers.utils.logging.set_verbosity_error()
    found: dict[str, list[dict[str, float]]] = {}
    for seed, schedule, stops in product(range(options.seeds), ("batch", "refill"), (False, True)):
        settings = [
            *(f"model.path={options.model}", f"run.steps={options.steps}", f"run.seed={seed}"),
            *(*SETTINGS, f"rollout.schedule={schedule}"),
            *(RULE if stops else ["stopping.rule=none"]),
            *options.set,
        ]
        name = f"{'stopping' if stops else 'plain'}, {schedule}"
        try:
            found.setdefault(name, []).append(measured(options.recipe, settings))
        except (RecipeError, *FAULTS) as error:
            print(f"bench_schedule: {error}", file=sys.stderr)
            return 2
        # After each seed, as an hour goes by until the last.
        if schedule == "refill" and stops:
            results = summary(found)
            print(f"{seed + 1} of {options.seeds} seeds\n{table(results)}", flush=True)
            if options.json is not None:
                write_json(options.json, {"runs": found, **results}, indent=1)
    return 0


def measured(recipe: str, settings: list[str]) -> dict[str, float]:
    """One run: seconds and tokens of a step, mean length, share stopped."""
    with tempfile.TemporaryDirectory() as folder:
        loop = Sampling(load_recipe(recipe, [*settings, f"run.output={folder}/run"]))
        try:
            asyncio.run(loop.run())
        finally:
            loop.trainer.close()
        run = read_run(Path(folder) / "run")
        columns = {
            "seconds": run.column("seconds/step"),
            "tokens": run.column("rollout/tokens"),
            "length": run.column("rollout/length"),
            "length_max": run.column("rollout/length_max"),
            "accuracy": run.column("rollout/accuracy"),
            "stopped": run.column("rollout/stop_share"),
        }
        return {name: float(np.nanmean(values[FIRST:-LAST])) for name, values in columns.items()}


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Means over seeds; of each schedule, what stopping saves of tokens and of time."""
    means = {
        name: {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        for name, runs in found.items()
    }
    for schedule in ("batch", "refill"):
        plain, stopping = means[f"plain, {schedule}"], means[f"stopping, {schedule}"]
        tokens, time = (1 - stopping[key] / plain[key] for key in ("tokens", "seconds"))
        stopping |= {"tokens_saved": tokens, "time_saved": time, "ratio": time / tokens}
    return means


def table(means: dict[str, dict[str, float]]) -> str:
    """In Markdown."""
    names = [*means["stopping, refill"]]
    rows = [["", *names], ["---"] * (len(names) + 1)]
    rows += [
        [title, *(f"{of[name]:,.3g}" if name in of else "–" for name in names)]
        for title, of in means.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
