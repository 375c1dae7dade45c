"""Train with early stopping, from a recipe.

    python -m espo_rl.run arithmetic run.seed=1 ppo.learning_rate=1e-4 --resume auto
    python -m espo_rl.run arithmetic --dry-run
    python -m espo_rl.run --explain stopping ppo.lam
    deepspeed --num_gpus 8 --module espo_rl.run espo-1.5b

A run's folder holds the recipe, metrics.jsonl, TensorBoard events, rollouts, the servers' logs,
checkpoints, the trained models and summary.json. One that is not empty is refused, unless --resume
or --overwrite says what becomes of the run there. Ctrl-C finishes the step, saves and ends; pressed
twice it ends at once. Exit codes: 0 done, 1 a fault, 2 a recipe or set-up that cannot work,
130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys


def main() -> int:
    """The command line; the exit code."""
    from espo_rl.config import RecipeError
    from espo_rl.config.explain import explained, overview

    parser = argparse.ArgumentParser(
        prog="python -m espo_rl.run",
        description=__doc__,
        epilog=overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe", nargs="?", help="a TOML file, or the name of a recipe in the package"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--explain",
        nargs="*",
        metavar="SECTION[.KEY]",
        help="what settings mean, their defaults and the paper's values; without a name, of all",
    )
    parser.add_argument(
        "--resume", metavar="auto|CHECKPOINT", help="auto: from the newest checkpoint, if any"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="delete an older run in run.output; with --resume auto only one without a checkpoint",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the recipe, start nothing")
    # The launchers pass it to every rank; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.explain is not None:
        try:
            print(explained(options.explain))
        except RecipeError as error:
            parser.error(str(error))
        return 0
    if options.recipe is None:
        parser.error("a recipe is needed: --help lists those of the package")
    from espo_rl.train import INTERRUPTED, train

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return train(options)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
