r"""Would early stopping help? Every stop rule over recorded full rollouts, without training.

    python -m espo_rl.replay runs/demo --output replay

Takes rollouts with outcomes: a run's folder or Parquet dumps of it, or the gateway's traces (JSON
lines, with --outcomes). Collect some with `python -m espo_rl.collect`. Writes replay.json,
curves.csv and replay.png. Estimators judge only prompts that they were not fitted on.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from espo_gateway.stop.gate_json import gate_to_dict
from espo_gateway.stop.rules import HAZARD, threshold_of
from espo_gateway.stop.threshold_control import Bound, Outcomes
from espo_gateway.stop.told import SourceName
from espo_gateway.traces.cross_fit import CalibrationError, CrossFit
from espo_gateway.traces.detection import (
    RIGHT_LOST,
    Curve,
    Estimate,
    Judged,
    area,
    area_within,
    curve,
    difficulty,
)
from espo_gateway.traces.judge import (
    LOOKS,
    Judgement,
    Replayed,
    Survey,
    fitted,
    fitted_elsewhere,
    replayed,
)
from espo_gateway.traces.reader import (
    Known,
    TraceError,
    read_outcomes,
)
from espo_gateway.traces.recommend import add_bound, bound_of, bounded_level, by_session
from espo_rl.record.json_files import write_json
from espo_rl.record.output import OutputError, check_own, entries, json_with
from espo_rl.replay.plot import draw
from espo_rl.replay.source import Source, worth_of

#: Right and wrong rollouts below which nothing is said of a token.
_FEW = 10

_FIELDS = tuple(field.name for field in dataclasses.fields(Curve) if field.name != "saved_at")


def report(done: Replayed, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Curve]]:
    """All that is said of the rules, and their curves."""
    judged, rules, curves = done.judged, {}, {}
    bins = difficulty(judged)
    for name, judgement in done.rules.items():
        cost = None if judgement.asked is None else options.price * judgement.asked
        curves[name] = curve(judged, judgement.cuts, cost, draws=options.bootstrap)
        chosen = recommend(judged, judgement, curves[name], options)
        rules[name] = {
            "auc": _plain(area(judged, judgement.levels, draws=options.bootstrap)),
            "auc_within_prompts": _plain(
                area_within(judged, judgement.levels, draws=options.bootstrap)
            ),
            "auc_at": _areas_at(judged, judgement, options.bootstrap),
            "saved_at_right_lost": {
                lost: _plain(saved) for lost, saved in curves[name].saved_at.items()
            },
            "recommended": chosen,
            "by_difficulty": [
                _of_bin(label, judged, judgement, cost, rows, chosen, options.bootstrap)
                for label, rows in bins
            ],
        }
    weight = judged.weights.sum()
    content = {
        "rollouts": int(judged.correct.size),
        "prompts": int(judged.prompts.max()) + 1,
        "tokens": int(judged.lengths.sum()),
        "success": float(judged.weights @ judged.correct / weight),
        "left_out": done.left_out,
        "running_at": {
            str(token): int(running.sum())
            for token in LOOKS
            if (running := judged.lengths >= token).any()
        },
        "bound": dataclasses.asdict(bound_of(options)),
        "price": options.price,
        "right_needed": {f"{lost:.2f}": needed for lost, needed in RIGHT_LOST.items()},
        "rules": rules,
    }
    return content, curves


def recommend(
    judged: Judged, judgement: Judgement, found: Curve, options: argparse.Namespace
) -> dict[str, Any]:
    """Of the thresholds that the wished bound allows the one that saves most, and what it does."""
    gate, threshold = judgement.gate, threshold_of(judgement.gate.rule)
    if threshold is HAZARD:
        return {"threshold": None, "reason": "chance is here to compare with"}
    weights = judged.weights.astype(np.float32)
    sessions = np.zeros(0, np.uint32) if judged.sessions is None else judged.sessions
    outcomes, rehearsal = (
        by_session(
            Outcomes(
                levels.astype(np.float32),
                judged.correct,
                weights,
                1.0 / float(weights.max()),
                judged.prompts,
            ),
            sessions,
        )
        for levels in (judgement.levels, judgement.rehearsed)
    )
    try:
        level, reason = bounded_level(
            outcomes,
            rehearsal,
            gate,
            bound_of(options),
        )
    except CalibrationError as error:
        return {"threshold": None, "reason": str(error)}
    grid, asked = threshold.grid, judgement.asked
    stricter = threshold.level(grid) <= level
    if not stricter.any():
        return {"threshold": None, "reason": f"only thresholds beyond {grid[0]:g} keep the bound"}
    # Where sources are asked, a looser one may pay for more questions than it saves tokens. Of the
    # stopped ones a stricter one may find more right.
    saved = found.saved[: int(stricter.sum()), 0].copy()
    if bound_of(options).of == "false-positives":
        saved[:-1] = -np.inf
    place = len(saved) - 1 - int(saved[::-1].argmax())
    if saved[place] <= 0.0:
        return {"threshold": None, "reason": "no threshold that keeps the bound saves anything"}
    chosen = threshold.set(gate, float(grid[place]))
    return {
        "questions": None if asked is None else float(asked[:, place].mean()),
        "threshold": float(grid[place]),
        "field": threshold.name,
        "reason": reason,
        "grid_place": place,
        "gate": gate_to_dict(chosen),
        **{name: _triple(getattr(found, name)[place]) for name in _FIELDS},
    }


def _areas_at(judged: Judged, judgement: Judgement, draws: int) -> dict[str, list[float | None]]:
    """AUC of the score at one token, among the rollouts that have one there."""
    found = {}
    for token, levels in zip(LOOKS, judgement.looked_at.T, strict=True):
        rows = ~np.isnan(levels)
        part = judged.where(rows)
        if min(part.correct.sum(), (~part.correct).sum()) >= _FEW:
            found[str(token)] = _plain(area(part, levels[rows], draws=draws))
    return found


def _of_bin(
    label: str,
    judged: Judged,
    judgement: Judgement,
    cost: NDArray[np.float64] | None,
    rows: Any,
    chosen: Mapping[str, Any],
    draws: int,
) -> dict[str, Any]:
    part = judged.where(rows)
    said: dict[str, Any] = {
        "bin": label,
        "rollouts": int(rows.sum()),
        "success": float(np.average(part.correct, weights=part.weights)),
        "auc": _plain(area(part, judgement.levels[rows], draws=draws)),
    }
    if chosen["threshold"] is not None:
        place = slice(chosen["grid_place"], chosen["grid_place"] + 1)
        paid = None if cost is None else cost[rows, place]
        found = curve(part, judgement.cuts[rows, place], paid, draws=draws)
        said |= {name: _triple(getattr(found, name)[0]) for name in ("saved", "false", "recall")}
    return said


def check_output(folder: Path) -> None:
    """Raise OutputError where `write` would replace what no replay wrote."""
    entries(folder, "--output")
    ours = folder / "replay.json"
    check_own(ours, "--output", "result of a replay", json_with("rules", "bound"))
    for name in ("curves.csv", "replay.png"):
        check_own(folder / name, "--output", "result of a replay", lambda _: ours.exists())


def write(
    folder: Path, content: Mapping[str, Any], curves: Mapping[str, Curve], done: Replayed
) -> None:
    """replay.json, curves.csv and replay.png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "replay.json", content)
    with open(folder / "curves.csv", "w", newline="") as file:
        rows = csv.writer(file)
        tails = ("", "_low", "_high")
        rows.writerow(["rule", "threshold", *(name + tail for name in _FIELDS for tail in tails)])
        for rule, found in curves.items():
            for place, limit in enumerate(threshold_of(done.rules[rule].gate.rule).grid):
                numbers = [n for name in _FIELDS for n in getattr(found, name)[place]]
                rows.writerow([rule, limit, *numbers])
    draw(
        curves,
        {name: rule["auc_at"] for name, rule in content["rules"].items()},
        folder / "replay.png",
    )


def table(content: Mapping[str, Any]) -> Table:
    """A row for each rule, the best detector first; intervals below the numbers."""
    shown = Table(
        title=f"stop rules, at a threshold that keeps {Bound(**content['bound'])}", show_lines=True
    )
    heads = (
        *("AUC", "within prompts", "threshold", "saved", "right lost", "false", "recall"),
        *("cut at", "tokens before end"),
    )
    shown.add_column("rule")
    for head in heads:
        shown.add_column(head, justify="right")
    ranked = sorted(content["rules"].items(), key=lambda item: -(item[1]["auc"][0] or 0.0))
    for name, rule in ranked:
        chosen = rule["recommended"]
        cells = [_cell(rule[name], "{:.3f}") for name in ("auc", "auc_within_prompts")]
        if chosen["threshold"] is None:
            cells += ["none", *["—"] * 6]
        else:
            symbol = threshold_of(chosen["gate"]["rule"]).symbol
            cells.append(f"{symbol} = {chosen['threshold']:.4g}")
            shares = ("saved", "false_positive_rate", "false", "recall", "position")
            cells += [_cell(chosen[field], "{:.1%}") for field in shares]
            cells.append(_cell(chosen["before_end"], "{:,.0f}"))
        shown.add_row(name, *cells)
    return shown


def _cell(numbers: Sequence[float | None], form: str) -> str:
    value, low, high = (None if n is None else form.format(n) for n in numbers)
    if value is None:
        return "unknown"
    return value if low is None or high is None else f"{value}\n{low} to {high}"


def _plain(estimate: Estimate) -> list[float | None]:
    return _triple((estimate.value, estimate.low, estimate.high))


def _triple(numbers: Any) -> list[float | None]:
    return [float(n) if math.isfinite(n) else None for n in numbers]


def learnt_from(
    options: argparse.Namespace,
    source: Source,
    other: Source | None,
    sources: tuple[SourceName, ...] = (),
) -> CrossFit:
    """The estimators: by folds of prompts or, if there is one, of another run."""
    if other is None:
        learnt = fitted(source.read, options.folds, sources, options.ask_every)
    else:
        learnt = fitted_elsewhere(other.read, sources, options.ask_every)
    wrong, right = options.critic_worth
    return dataclasses.replace(
        learnt, gate=dataclasses.replace(learnt.gate, critic_wrong=wrong, critic_right=right)
    )


def apart_from(
    here: Survey, options: argparse.Namespace, known: Known | None
) -> tuple[Source, list[str]]:
    """The other run without the prompts that are judged, which its fit would know; and a warning
    where there are such.

    Raises:
        CalibrationError: it has no others.
    """
    there = Source(options.fit_on, options.outcome, known).survey()
    shared = np.intersect1d(here.keys, there.keys)
    left_out = int(np.isin(there.keys, shared).sum())
    if left_out and left_out == there.keys.size:
        raise CalibrationError(
            "--fit-on: all of its prompts are among those to be judged, so its estimators would "
            "know them; give rollouts of other prompts, or leave it out"
        )
    other = Source(options.fit_on, options.outcome, known, without=shared)
    if not left_out:
        return other, []
    return other, [
        f"--fit-on: {left_out:,} of its {there.keys.size:,} rollouts are left out, as their "
        f"{shared.size:,} prompts are among those to be judged"
    ]


def unknowns(done: Replayed, content: Mapping[str, Any]) -> list[str]:
    """What the numbers leave open."""
    said = []
    if done.judged.prompts.max() == 0:
        said.append("all rollouts are of one prompt, so that nothing has an interval")
    right = int(done.judged.correct.sum())
    said += [
        f"what is saved at {float(lost):.0%} of the right rollouts lost is unknown: {right} are "
        f"right, {needed - right} more are needed"
        for lost, needed in content["right_needed"].items()
        if right < needed
    ]
    if any(judgement.gate.needs_critic for judgement in done.rules.values()):
        said.append(
            "the rules with a critic's values save before its cost: --price is of an answer probe"
        )
    return said


def run(options: argparse.Namespace) -> None:
    """The command."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    check_output(options.output)
    known = read_outcomes(options.outcomes, options.outcome) if options.outcomes else None
    source = Source(options.rollouts, options.outcome, known)
    carried = source.survey()
    other, warnings = None, [*source.warnings(), *carried.warnings()]
    if options.fit_on is not None:
        other, shared = apart_from(carried, options, known)
        warnings += shared
    files = source.files if other is None else [*source.files, *other.files]
    options.critic_worth = options.critic_worth or worth_of(files)
    learnt, told = learnt_from(options, source, other), []
    for sources in carried.combinations:
        try:
            told.append(learnt_from(options, source, other, sources))
        except CalibrationError as error:
            beside = " and ".join(sources)
            warnings.append(f"the rules with {beside} are left out: {error}")
    done = replayed(source.read, learnt, told)
    content, curves = report(done, options)
    content["warnings"] = warnings + unknowns(done, content)
    for warning in content["warnings"]:
        console.print(f"warning: {warning}")
    console.print(
        f"{content['rollouts']:,} full rollouts of {content['prompts']:,} prompts, "
        f"{content['tokens']:,} tokens, {content['success']:.1%} right; {content['left_out']:,} "
        "left out (cut, or of unknown outcome)"
    )
    wide = Console(highlight=False, width=None if console.is_terminal else 140)
    wide.print(table(content))
    for name, rule in content["rules"].items():
        if rule["recommended"]["threshold"] is None:
            console.print(f"{name}: {rule['recommended']['reason']}")
    write(options.output, content, curves, done)
    console.print(f"written to {options.output}: replay.json, curves.csv, replay.png")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with a message, code 2, when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m espo_rl.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("rollouts", nargs="+", type=Path, help="a run's folder, Parquet files, or JSON lines")
    add("--output", type=Path, default=Path("replay"), help="folder (default: %(default)s)")
    add("--outcomes", type=Path, metavar="FILE", help="of gateway traces, as for calibrate")
    add("--outcome", default="correct", metavar="COLUMN", help="(default: %(default)s)")
    add(
        "--fit-on",
        type=Path,
        nargs="+",
        metavar="OTHER",
        help="take regret statistics and success estimator of another run: tells how they travel",
    )
    add(
        "--critic-worth",
        type=float,
        nargs=2,
        metavar=("WRONG", "RIGHT"),
        help="rewards that recorded values of a critic are of (default: the files', or -1 1)",
    )
    add(
        "--ask-every",
        type=int,
        default=96,
        metavar="TOKENS",
        help="between two questions to an answer probe or a critic at least (default: %(default)s)",
    )
    add(
        "--price",
        type=float,
        default=22.0,
        metavar="TOKENS",
        help="what a question to an answer probe costs, in sampled tokens, taken off what is saved "
        "(default: %(default)s, of a 0.5B model on two CPU cores)",
    )
    add_bound(parser)
    add("--folds", type=int, help="of the cross-fitting (default: 5)")
    add("--bootstrap", type=int, default=400, help="resamplings (default: %(default)s)")
    options = parser.parse_args(arguments)
    wrong, right = options.critic_worth or (-1.0, 1.0)
    if not (wrong < right and math.isfinite(right - wrong)):
        parser.error("--critic-worth must be two finite numbers, the lesser first")
    if options.fit_on is not None and options.folds is not None:
        parser.error("--folds has no effect with --fit-on: nothing is fitted here; leave it out")
    options.folds = 5 if options.folds is None else options.folds
    for name, least in (("ask_every", 1), ("price", 0), ("folds", 2), ("bootstrap", 1)):
        if not least <= getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a number of at least {least}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0 on success, 1 on rollouts that carry no answer or cannot be read, 130 on Ctrl-C."""
    options = parse(arguments)
    try:
        run(options)
    except (
        *(CalibrationError, OutputError, TraceError),
        *(ImportError, OSError, BrokenExecutor),
    ) as error:
        print(f"espo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("espo: interrupted", file=sys.stderr)
        return 130
    return 0
