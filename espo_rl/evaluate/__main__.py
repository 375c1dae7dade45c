r"""Accuracy of a model on data sets: avg@k, pass@k and maj@k, with 95 % intervals over problems.

    python -m espo_rl.evaluate --model MODEL --data aime24.jsonl amc23.jsonl --k 32

Starts a vLLM server for the model, and the gateway in front of it. Every problem is written to the
output folder once all its samples are graded; the same command goes on where an earlier one
stopped, and asks again what failed. What follows `--` goes to vLLM.
"""

from __future__ import annotations

import sys

from espo_rl.evaluate.arguments import parse


def main() -> int:
    """The command line; its exit code is that of `run_command`."""
    options = parse(about=__doc__)
    from espo_rl.evaluate.command import Command, run_command

    return run_command(lambda: Command(options))


if __name__ == "__main__":
    sys.exit(main())
