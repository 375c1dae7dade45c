"""What a training step takes, beside TRL's GRPO, in one run and on the same work.

Both sides have the same model, prompts, tokens (all rollouts run to the last one; nothing is
stopped), rows in a forward pass, group advantages, float32 weights for AdamW. Each is a process of
its own; they take turns, and who is first changes. TRL takes one optimizer step on a batch and asks
the actor once: `*-group` is this project with ppo.epochs=1 ppo.minibatches=1, so like for like;
`*-default` its default of two minibatches, with a forward pass for the old logprobs; `*-ppo` trains
a critic besides, which TRL has not. A step of ours is rollouts from a vLLM server through the
gateway, the update and the sync of the weights; TRL's is its own, with transformers' generation.
Peak memory is that of the process that trains; the vLLM server's comes on top of ours.

    python scripts/bench_trainer.py --json result.json
    python scripts/bench_trainer.py --only 135m-group --model HuggingFaceTB/SmolLM2-135M-Instruct
    python scripts/bench_trainer.py --quick
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer_benchmark.cases import CASES, GROUP, SHAPES, make_checkpoint
from trainer_benchmark.turns import Side, SideError

from benchmark.arguments import count
from espo_rl.record.json_files import write_json
from espo_rl.record.output import OutputError, check_own
from espo_rl.record.progress import progress_bar

#: what --rollouts is a multiple of: whole groups, in two minibatches
MULTIPLE = 2 * GROUP
#: the numbers of a side; medians over the turns, but of memory the most
NUMBERS = ("update_s", "step_s", "peak_memory_mb", "update_processor_s", "rollout_s", "sync_s")


def main() -> None:
    arguments = parse()
    peer = importlib.util.find_spec("trl") is not None
    if not peer:
        print("TRL is not installed (pip install trl): only this project is measured")
    try:
        if arguments.json:
            check_own(arguments.json, "--json", "report of this benchmark", json_of_cases)
        report = {name: measure(name, arguments, peer=peer) for name in arguments.names}
    except (OutputError, SideError) as error:
        sys.exit(f"bench_trainer: {error}")
    if arguments.json:
        write_json(arguments.json, report, indent=1)


def json_of_cases(file: Path) -> bool:
    """Whether it is a report of this benchmark."""
    content = json.loads(file.read_bytes())
    return isinstance(content, dict) and bool(content) and content.keys() <= CASES.keys()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name in CASES if not name.startswith("quick")]
    parser.add_argument("--only", metavar="A,B", help="of " + ", ".join(names))
    parser.add_argument("--turns", type=count, default=5, help="of each side (default: 5)")
    parser.add_argument(
        "--rollouts", type=count, help=f"in a batch, a multiple of {MULTIPLE}: a quicker look"
    )
    parser.add_argument("--model", help="of the 135m cases, in place of a random one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    parser.add_argument("--no-servers", action="store_true", help="ours: the update alone")
    parser.add_argument("--quick", action="store_true", help="a smaller model, without servers")
    arguments = parser.parse_args()
    arguments.names = arguments.only.split(",") if arguments.only else names
    if unknown := [name for name in arguments.names if name not in CASES]:
        parser.error(f"--only: there is no {unknown[0]!r}, only {', '.join(names)}")
    if arguments.rollouts and arguments.rollouts % MULTIPLE:
        parser.error(f"--rollouts must be a multiple of {MULTIPLE}, not {arguments.rollouts}")
    if arguments.quick:
        arguments.names = [name for name in CASES if name.startswith("quick")]
        arguments.turns, arguments.no_servers = 2, True
    return arguments


def measure(name: str, arguments: argparse.Namespace, *, peer: bool) -> dict[str, Any]:
    """One case, shown as soon as it is known."""
    case = CASES[name]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        model = arguments.model if case.shape == "135m" else None
        model = model or str(make_checkpoint(SHAPES[case.shape], folder / "model"))
        serve = "alone" if arguments.no_servers else "serve"
        batch = str(arguments.rollouts or SHAPES[case.shape].rollouts)
        sides = {
            "ours": stack.enter_context(Side("ours", [name, model, batch, serve], folder / "ours"))
        }
        if peer:
            sides["trl"] = stack.enter_context(Side("peer", [name, model, batch], folder / "trl"))
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        bar = stack.enter_context(progress_bar())
        task = bar.add_task(name, total=(arguments.turns + 1) * len(sides))
        # The first turn of each is a warm-up and not counted.
        for turn in range(-1, arguments.turns):
            order = list(sides) if turn % 2 else list(reversed(sides))
            for side in order:
                answer = sides[side].turn()
                bar.advance(task)
                if turn >= 0:
                    found[side].append(answer)
    report = {side: summary(turns) for side, turns in found.items()}
    show(name, report)
    return report


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one side: medians, each turn's numbers, and by phase where they are known."""
    report: dict[str, Any] = {"tokens": turns[-1]["tokens"]}
    for key in NUMBERS:
        values = [turn[key] for turn in turns if turn.get(key) is not None]
        middle = max if key == "peak_memory_mb" else statistics.median
        report[key] = round(middle(values), 3) if values else None
    report["turns"] = [{key: turn.get(key) for key in NUMBERS} for turn in turns]
    if "phases" in turns[0]:
        report["phases"] = {
            phase: {
                key: round(statistics.median(turn["phases"][phase][key] for turn in turns), 3)
                for key in numbers
            }
            for phase, numbers in turns[0]["phases"].items()
        }
    return report


def show(name: str, report: dict[str, dict[str, Any]]) -> None:
    case, shape = CASES[name], SHAPES[CASES[name].shape]
    table = Table(
        title=f"{name}: {shape.rollouts} × {shape.tokens} tokens, {shape.dtype}; {case.what}"
    )
    table.add_column("")
    for column in ("ours", "TRL", "ratio", "ratio by turn"):
        table.add_column(column, justify="right")
    ours, trl = report["ours"], report.get("trl", {})
    for key in NUMBERS:
        mine, theirs = ours.get(key), trl.get(key)
        ratios = [
            a[key] / b[key]
            for a, b in zip(ours["turns"], trl.get("turns", []), strict=False)
            if a[key] and b[key]
        ]
        table.add_row(
            key,
            "" if mine is None else f"{mine:,.2f}",
            "" if theirs is None else f"{theirs:,.2f}",
            f"{statistics.median(ratios):.2f}" if ratios else "",
            f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "",
        )
    table.add_section()
    for phase, numbers in ours["phases"].items():
        table.add_row(
            phase,
            f"{numbers['s']:,.2f} s",
            f"{numbers['processor_s']:,.2f} s cpu",
            "",
            f"{numbers['peak_mb']:,.0f} MB",
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
