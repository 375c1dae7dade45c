"""Fits a critic to recorded rollouts, so that a run with the value gate starts with one that knows
something.

    python -m espo_rl.run arithmetic-mixed stopping.rule=none run.output=runs/recorded ...
    python -m espo_rl.pretrain_critic runs/recorded --model runs/base-mixed --output runs/critic
    python -m espo_rl.run arithmetic-mixed model.critic=runs/critic stopping.value=critic ...

With --head-only the model, mostly the policy itself, stays as it is, and only V's head is fitted.

The rollouts must be full ones, of one policy that stood still. A share of the problems is held out;
on these the critic is measured. With --head-only each problem is held out once, by a fit of the
others, and the head that is written is of all. What is written is the checkpoint that
`model.critic` and the critic server load, with report.json beside it. V is in the unit of the
recipe's rewards.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from espo_rl.config import Ppo
from espo_rl.pretrain_critic.settings import Settings


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with a message, code 2, when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m espo_rl.pretrain_critic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, defaults, ppo = parser.add_argument, Settings(), Ppo()
    add(
        "rollouts",
        nargs="+",
        type=Path,
        metavar="ROLLOUTS",
        help="folders of runs or of rollouts, or Parquet files",
    )
    add("--model", required=True, help="what the critic starts from: the policy, or any other size")
    add("--output", required=True, type=Path, help="the critic's folder")
    add(
        "--held-out",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of the problems that the critic is only measured on; of each fold with --head-only "
        "(default: %(default)s)",
    )
    add(
        "--values",
        type=Path,
        metavar="FOLDER",
        help="write the held-out rollouts (all with --head-only) with V after each token, "
        "for a replay",
    )
    add(
        "--head-only",
        action="store_true",
        help="fit a linear head on the model's frozen states, by least squares: one pass over the "
        "rollouts",
    )
    add(
        "--layers",
        type=int,
        metavar="N",
        help="with --head-only: of the model's first N layers (about three quarters tell most)",
    )
    add("--learning-rate", type=float, default=defaults.learning_rate, help="(%(default)s)")
    add("--epochs", type=int, default=defaults.epochs, help="at most (%(default)s)")
    add(
        "--patience",
        type=int,
        default=defaults.patience,
        help="epochs without a gain before it ends (%(default)s)",
    )
    add("--right-reward", type=float, default=ppo.right_reward, help="as in ppo (%(default)s)")
    add("--wrong-reward", type=float, default=ppo.wrong_reward, help="as in ppo (%(default)s)")
    add("--seed", type=int, default=defaults.seed)
    options = parser.parse_args(arguments)
    if not 0.0 < options.held_out < 1.0:
        parser.error("--held-out must lie between 0 and 1")
    try:
        Ppo(right_reward=options.right_reward, wrong_reward=options.wrong_reward)
    except ValidationError as error:
        parser.error(f"--right-reward, --wrong-reward: {error.errors()[0]['msg']}")
    if not 0 <= options.seed < 2**63:
        parser.error("--seed must lie in 0 to 2^63 - 1")
    if options.layers is not None and not options.head_only:
        parser.error("--layers needs --head-only: the layers left were trained for those cut off")
    if options.layers is not None and options.layers < 1:
        parser.error("--layers must be at least 1")
    for name in ("learning_rate", "epochs", "patience"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0, and finite")
    for name in ("learning_rate", "epochs", "patience", "seed"):
        if options.head_only and getattr(options, name) != parser.get_default(name):
            parser.error(
                f"--{name.replace('_', '-')} has no effect with --head-only, whose fit is exact; "
                "leave it out"
            )
    return options


def main() -> int:
    """The command line; its exit code is that of `command.run`."""
    options = parse()
    from espo_rl.pretrain_critic.command import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
