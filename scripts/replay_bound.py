"""What stopping saves and what it costs the training, played over runs without stopping.

    RUNS=$(ls -d runs/real/leg-counting/none/seed-*)
    python scripts/replay_bound.py $RUNS --joined 1 5
    python scripts/replay_bound.py $RUNS --rule regret-only --share 0.25

The runs are of one recipe with `stopping.rule=none`, so that their rollouts are full ones. The
trainer's own controller, by its default settings, learns from them step by step and stops them by
the stream alone; of each rollout it sees what it would have seen, with its audits. It keeps its
bound, or with `--share` the paper's share of stops. `--joined 5` makes one run of five, whose steps
hold the rollouts of all: how many does the bound need? With `--head` the estimate reads V of a
head, too, as a run records it that has one (`stopping.value_head`) and a warm-up of all its steps.

Of training it tells how near what is left comes to full rollouts: the correlation (uncentred) of
the group advantages over all tokens, 0 for those that were not generated; and what that would be if
only the labels changed (a right rollout that is stopped is a failure, and shifts its group), or
only the cuts did (failures are punished for fewer tokens, and what is right is not rewarded for
fewer). What the policy would have learnt is not in it. Prints a Markdown table: means over the runs
and over draws of the audits, in brackets from the least to the most.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.replay import first_stops
from espo_rl.config import Stopping
from espo_rl.gate.audits import Audits
from espo_rl.gate.batch_gates import StopController
from espo_rl.gate.outcomes import recorded_of
from espo_rl.ppo.advantages import group_advantages
from espo_rl.record.progress import progress_bar
from espo_rl.record.rollout_files import read_rollouts
from espo_rl.record.run_folder import RunFolderError, read_run
from espo_rl.types import EndReason, Rollout
from study.table import markdown_table

Steps = list[list[Rollout]]

#: those that a stream's own numbers decide, and chance
RULES = ("success-probability", "regret-only", "value-gated", "surprise", "random")

#: what is told of a run that was played, and how it is written
COLUMNS = {
    "tokens saved": "{:.1%}",
    "right rollouts lost": "{:.1%}",
    "stopped": "{:.1%}",
    "advantages, correlation": "{:.3f}",
    "labels alone": "{:.3f}",
    "cuts alone": "{:.3f}",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders of runs")
    add("--joined", nargs="+", type=int, default=[1], metavar="N", help="runs (%(default)s)")
    add("--rule", choices=RULES, default=RULES[0], help="(default: %(default)s)")
    add("--share", type=float, metavar="S", help="stop it, as the paper does, and keep no bound")
    add("--head", action="store_true", help="the estimate reads the recorded V, too")
    add("--draws", type=int, default=3, help="of the audits (%(default)s)")
    options = parser.parse_args()
    if options.draws < 1:
        parser.error("--draws must be at least 1")
    if options.share is not None and not 0.0 < options.share < 1.0:
        parser.error(f"--share must lie between 0 and 1, not {options.share:g}")
    if options.rule == "random" and options.share is None:
        parser.error("--rule random keeps no bound: give it a --share")
    if wrong := [n for n in options.joined if not 1 <= n <= len(options.runs)]:
        parser.error(f"--joined {wrong[0]}: {len(options.runs)} runs are given")
    return options


def steps_of(folder: Path) -> tuple[Steps, int]:
    """A run's rollouts by step, and how many of them a prompt has.

    Raises RunFolderError: it has no rollouts, or they were stopped.
    """
    run = read_run(folder)
    steps = [read_rollouts(file)[0] for file in run.rollout_files]
    if not steps or any(rollout.stopped for step in steps for rollout in step):
        raise RunFolderError(
            f"{folder} has no full rollouts: give runs of stopping.rule=none, or with a warm-up of "
            "all their steps"
        )
    return steps, run.setting("rollout", "n")


def joined(runs: Sequence[Steps]) -> Steps:
    """One run of several: a step has the rollouts of all, and prompts stay apart."""
    together = []
    for batches in zip(*runs, strict=True):
        step: list[Rollout] = []
        for batch in batches:
            first = 1 + max((rollout.group for rollout in step), default=-1)
            step += [dataclasses.replace(r, group=first + r.group) for r in batch]
        together.append(step)
    return together


def cut(rollout: Rollout, kept: int, *, audited: bool) -> Rollout:
    """What training sees of a full rollout that is stopped."""
    seen = dataclasses.replace(rollout, end=EndReason.EARLY_STOP, kept=kept, audited=audited)
    if audited:
        return seen
    return dataclasses.replace(
        seen,
        correct=None,
        token_ids=rollout.token_ids[:kept],
        logprobs=rollout.logprobs[:kept],
        max_logprobs=rollout.max_logprobs[:kept],
        values=None,
    )


@dataclass
class Fidelity:
    """Correlation, over all tokens of a run, of the advantages with those of full rollouts.

    Uncentred, as their mean over a group's rollouts is 0. `products`: by what differs, sums over
    tokens of full times left, full squared, left squared.
    """

    products: dict[str, NDArray[np.float64]] = field(
        default_factory=lambda: {name: np.zeros(3) for name in ("both", "labels", "cuts")}
    )

    def add(self, step: Sequence[Rollout], seen: Sequence[Rollout]) -> None:
        """seen: what training sees of a step's full rollouts."""
        groups = [rollout.group for rollout in step]
        full, left = (
            group_advantages([float(bool(one.correct)) for one in rollouts], groups)
            for rollouts in (step, seen)
        )
        whole, kept = (np.array([one.trained for one in rollouts]) for rollouts in (step, seen))
        for name, advantages, tokens in (
            ("both", left, kept),
            ("labels", left, whole),
            ("cuts", full, kept),
        ):
            sums = [full * advantages * tokens, full**2 * whole, advantages**2 * tokens]
            self.products[name] += np.sum(sums, axis=1)

    def told(self) -> list[float]:
        """Of both, labels alone, cuts alone; 0 where one side alone has a lesson, NaN where none
        has: no prompt with right and with wrong rollouts."""
        return [
            math.nan if not full and not left else float(dot / max(1e-9, math.sqrt(full * left)))
            for dot, full, left in self.products.values()
        ]


def play(steps: Steps, config: Stopping, n: int, seed: int) -> list[float]:
    """Shares of a run: of the tokens those saved, of the right rollouts those that are lost but for
    the audits, of the rollouts those stopped; and its `Fidelity`."""
    audits = Audits.of(config.audit_share, n)
    controller = StopController(config, len(steps), random.Random(seed), audits=audits)
    tokens = saved = right = lost = stopped = count = 0
    fidelity = Fidelity()
    for step in steps:
        audited = controller.draw_audits(len(step))
        cuts = first_stops(controller.gate(""), recorded_of(step)).tolist()
        full, seen = [], []
        for rollout, kept, spared in zip(step, cuts, audited, strict=True):
            if rollout.end is EndReason.ERROR:
                continue
            length = len(rollout.token_ids)
            tokens, count, right = tokens + length, count + 1, right + bool(rollout.correct)
            full.append(rollout)
            if not kept:
                seen.append(rollout)
                continue
            stopped += 1
            if not spared:
                saved += length - kept
                lost += bool(rollout.correct)
            seen.append(cut(rollout, kept, audited=spared))
        controller.observe(seen, None)
        fidelity.add(full, seen)
    return [saved / tokens, lost / max(1, right), stopped / count, *fidelity.told()]


def row(runs: Sequence[Steps], config: Stopping, n: int, number: int, draws: int) -> list[str]:
    """Of so many runs joined; each run is in one group at least."""
    starts = range(0, len(runs), number)
    groups = [joined([runs[(start + i) % len(runs)] for i in range(number)]) for start in starts]
    tasks = [(group, seed) for group in groups for seed in range(draws)]
    with progress_bar() as progress:
        bar = progress.add_task(f"{number} joined", total=len(tasks))
        played = []
        for group, seed in tasks:
            played.append(play(group, config, n, seed))
            progress.advance(bar)
    told = [
        f"{form} [{form}, {form}]".format(sum(values) / len(values), min(values), max(values))
        if not any(map(math.isnan, values))
        else "–"
        for form, values in zip(COLUMNS.values(), zip(*played, strict=True), strict=True)
    ]
    return [str(len(groups[0][0])), str(len(played)), *told]


def main() -> None:
    options = parse()
    try:
        read = [steps_of(folder) for folder in options.runs]
    except ValueError as error:
        raise SystemExit(f"replay_bound: {error}") from error
    runs, n = [steps for steps, _ in read], read[0][1]
    if len({(len(steps), each) for steps, each in read}) > 1:
        raise SystemExit("replay_bound: give runs of one recipe, with all steps' rollouts there")
    for folder, steps in zip(options.runs, runs, strict=True):
        if options.head and all(one.values is None for step in steps for one in step):
            raise SystemExit(f"replay_bound: --head: {folder} recorded no V of one")
    head = {"sources": ["critic"], "value_head": "recorded"} if options.head else {}
    share = {} if options.share is None else {"threshold": "share", "target_share": options.share}
    config = Stopping.model_validate({"rule": options.rule, "sources": [], **share, **head})
    if options.head and config.head is None:
        raise SystemExit(f"replay_bound: --head: --rule {options.rule} reads no V")
    rows = [row(runs, config, n, number, options.draws) for number in options.joined]
    print(markdown_table(["rollouts a step", "played", *COLUMNS], rows))


if __name__ == "__main__":
    main()
