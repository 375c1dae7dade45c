r"""Full rollouts with outcomes, for `python -m espo_rl.replay`.

    python -m espo_rl.collect --url http://127.0.0.1:8000 --model MODEL --data problems.jsonl \
        --grader math --k 8 --out rollouts

Asks and grades as `espo_rl.evaluate` does, with no stop, and writes a Parquet file for each problem
once all its samples ended; the same command goes on where an earlier one stopped. Without --url a
vLLM server of the model is started. One by --url must send token ids and logprobs, as vLLM does;
--model is where its tokenizer lies.
"""

from __future__ import annotations

import argparse
import sys

from espo_rl.evaluate.arguments import parse

SAMPLING = (
    "What is trained on is sampled from the whole policy, and so is what a detector is judged on."
)
#: There is no gate: the rollouts are full ones.
DEFAULTS = {"k": 8, "temperature": 1.0, "top_p": 1.0, "gate": None, "audit": None}


def probing(parser: argparse.ArgumentParser) -> None:
    """What this command takes beside those of `espo_rl.evaluate`."""
    parser.add_argument(
        "--probe-every",
        type=int,
        default=0,
        metavar="TOKENS",
        help="ask the policy every so often how likely it finds the reference answer by then, and "
        "keep what it says (default: never); `python -m espo_rl.probe` asks afterwards",
    )


def main() -> int:
    """The command line; its exit code is that of `evaluate.command.run_command`."""
    options = parse(
        prog="python -m espo_rl.collect",
        about=__doc__,
        defaults=DEFAULTS,
        more=probing,
        sampling=SAMPLING,
    )
    from espo_rl.collect.command import CollectCommand
    from espo_rl.evaluate.command import run_command

    return run_command(lambda: CollectCommand(options))


if __name__ == "__main__":
    sys.exit(main())
