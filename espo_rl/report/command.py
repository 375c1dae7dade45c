"""A run as one HTML file that asks nothing of any network.

    python -m espo_rl.report runs/espo                    writes runs/espo/report.html
    python -m espo_rl.report runs/ppo runs/espo           curves of both; rollouts of the first

It has the curves of metrics.jsonl, and a table of rollouts; each opens token by token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from espo_gateway.files import written_whole
from espo_rl.record.output import OutputError, check_own
from espo_rl.record.progress import progress_bar
from espo_rl.record.run_folder import RunFolder, RunFolderError, read_run
from espo_rl.report.curves import panels, tiles
from espo_rl.report.page import page
from espo_rl.report.rollouts import choose, rollouts

#: More could not be told apart in a plot.
MOST_RUNS = 8


def make_report(runs: Sequence[RunFolder], wanted: int) -> str:
    """The page: curves of all runs, and so many rollouts of the first.

    Raises:
        RunFolderError: a file of rollouts is damaged.
    """
    first = runs[0]
    with progress_bar() as bars:
        line = bars.add_task("looking for rollouts", total=len(first.rollout_files))
        choice = choose(first, wanted, lambda: bars.advance(line))
        bars.remove_task(line)
        line = bars.add_task("reading rollouts", total=len(choice.places))
        shown = rollouts(first, choice, lambda: bars.advance(line))
    return page(
        {
            "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "runs": [{"name": name, **tiles(run)} for name, run in named(runs).items()],
            "panels": panels(runs),
            "rollouts": shown,
        }
    )


def named(runs: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """Runs by their folders' names, with as many parents as tell them apart."""
    paths = [run.path.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs, strict=True))


def is_report(file: Path) -> bool:
    """Whether a file is an older report, by its beginning."""
    with file.open("rb") as opened:
        return b"<title>ESPO report</title>" in opened.read(4096)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exits with 1 and a message when there is no run to report on."""
    parser = argparse.ArgumentParser(
        prog="python -m espo_rl.report", description="Write a run's curves and rollouts as HTML."
    )
    parser.add_argument(
        "runs", metavar="RUN_DIR", nargs="+", type=Path, help="a recipe's run.output"
    )
    parser.add_argument("--output", type=Path, help="default: report.html in the first RUN_DIR")
    parser.add_argument(
        "--rollouts", type=int, default=2000, metavar="N", help="at most; default %(default)s"
    )
    options = parser.parse_args(arguments)
    if options.rollouts < 0:
        parser.error(f"--rollouts must be 0 or more, not {options.rollouts}")
    if len(options.runs) > MOST_RUNS:
        parser.error(f"at most {MOST_RUNS} runs can be told apart in a plot; give fewer RUN_DIR")
    if len({path.resolve() for path in options.runs}) < len(options.runs):
        parser.error("a RUN_DIR is given twice; name each run once")
    output = options.output or options.runs[0] / "report.html"
    try:
        check_own(output, "--output", "report", is_report)
        content = make_report([read_run(path) for path in options.runs], options.rollouts)
    except (OSError, OutputError, RunFolderError) as error:
        sys.exit(f"espo_rl.report: {error}")
    try:
        with written_whole(output) as scratch:
            scratch.write_text(content, encoding="utf-8")
    except OSError as error:
        sys.exit(
            f"espo_rl.report: cannot write {output}: {error.strerror or error}; "
            "name another file with --output"
        )
    print(f"{output}  {len(content.encode()) / 1e6:.1f} MB")
