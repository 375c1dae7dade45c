"""A tiny base model for the arithmetic task, trained from scratch in about two minutes.

    python -m espo_rl.base_model --out runs/base

The demonstrations carry slips: each step's result is wrong with probability `error`. With
`--kind sampled` any step may slip, to any digit: the model learns to *sample* errors that it does
not *believe* (greedy decoding is right, sampling often is not). That is the kind of base in which
an error shows in the logprobs, and so the kind that shows what early stopping does. With
`--kind believed` as many slips fall on a few sums, always to the same digit: there the wrong digit
is the likelier one, and it is the right one that looks like a mistake.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from espo_rl.base_model.slips import BELIEF, Kind
from espo_rl.record.output import OutputError
from espo_rl.tasks.arithmetic import Arithmetic


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m espo_rl.base_model", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/base"), help="checkpoint folder")
    parser.add_argument("--error", type=float, default=0.06, help="share of demonstrated slips")
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kind",
        choices=get_args(Kind),
        default="sampled",
        help="slips on any sum, or always the same ones on a few (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a base model of other settings in --out"
    )
    task = Arithmetic()
    parser.add_argument(
        "--min-steps", type=int, default=task.min_steps, help="of a problem (default: %(default)s)"
    )
    parser.add_argument(
        "--max-steps", type=int, default=task.max_steps, help="of a problem (default: %(default)s)"
    )
    options = vars(parser.parse_args())
    if not 1 <= options["min_steps"] <= options["max_steps"] <= 26:
        parser.error("--min-steps and --max-steps must lie in 1 to 26, the lesser first")
    if not 1 <= options["steps"] < 2**31:
        parser.error("--steps must be at least 1")
    if not 0 <= options["seed"] < 2**63:
        parser.error("--seed must lie in 0 to 2^63 - 1")
    if not 0.0 <= options["error"] <= BELIEF:
        parser.error(f"--error must lie in 0 to {BELIEF}")
    from espo_rl.base_model.train import NotLearntError, train_base_model

    try:
        train_base_model(options.pop("out"), **options)
    except OutputError as error:
        parser.error(str(error))
    except (NotLearntError, OSError) as error:
        sys.exit(f"espo: {error}")
    except KeyboardInterrupt:
        sys.exit("espo: interrupted")


if __name__ == "__main__":
    main()
