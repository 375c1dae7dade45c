r"""Asks a server, along recorded rollouts, how likely it finds the reference answer by then.

    python -m espo_rl.probe rollouts --url http://127.0.0.1:8000 --model MODEL --output probed
    python -m espo_rl.replay probed

Takes what `python -m espo_rl.collect` or a run wrote (a folder, or Parquet files) and writes the
same rollouts with what the probes said, a file for each; the same command goes on where an earlier
one stopped. The server is vLLM with the model that sampled them; --model has its tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from espo_gateway.stop.told import Schedule


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with a message, code 2, when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m espo_rl.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("rollouts", nargs="+", type=Path, help="a folder, or Parquet files")
    add("--url", required=True, help="of the server, without /v1")
    add("--model", required=True, help="a checkpoint's folder or its name on the hub")
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--every", type=int, default=32, metavar="TOKENS", help="(default: %(default)s)")
    add(
        "--growth",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of its length, by which a rollout must have grown (default: %(default)s)",
    )
    add("--phrase", help="after which the answer is read (default: that of stopping.probe_phrase)")
    add("--end", help="what ends the answer (default: that of stopping.probe_end)")
    add("--concurrency", type=int, default=16, help="rollouts at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("every", "concurrency"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        Schedule(every=options.every, growth=options.growth)
    except ValueError as error:
        parser.error(f"--{error}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0 on success, 1 when a probe failed, 2 on arguments that cannot work."""
    options = parse(arguments)
    from espo_rl.probe.command import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
