"""`python -m espo_gateway calibrate`: a gate from recorded traces."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from espo_gateway.errors import InvalidRequest
from espo_gateway.stop.gate_json import gate_from_json, gate_to_json
from espo_gateway.stop.rules import HAZARD, RULES, Gate, threshold_of, value_source
from espo_gateway.traces.cross_fit import UNFITTED, CalibrationError, CrossFit, learn
from espo_gateway.traces.reader import (
    Known,
    TraceError,
    Traces,
    itself,
    read_outcomes,
    read_traces,
    unnamed,
)
from espo_gateway.traces.recommend import (
    JudgedTraces,
    Row,
    add_bound,
    bound_of,
    judge,
    level_for_bound,
    level_for_share,
    rows_at,
    share,
)

T = TypeVar("T")

_DESCRIPTION = """\
Replays recorded traces and recommends a gate. Record them with `--record FILE` and no stops (no
gate, or "espo": {"mode": "shadow"} in the requests), then ask for a share of stops:

  python -m espo_gateway calibrate traces.jsonl --stop-share 0.1 --output gate.json

Where it is known which answers were right, ask for a bound on the right ones that are stopped:

  python -m espo_gateway calibrate traces.jsonl --outcomes outcomes.jsonl --right-lost 0.05

outcomes.jsonl has a line for each answer, {"id": "cmpl-...", "correct": true}, with the answer's id
or, as "request", its X-Request-Id. Rollouts that the trainer dumped (Parquet) have theirs already.
"""
#: Shares that the table shows.
_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
_RULES = tuple(name for name, rule in RULES.items() if rule.threshold not in (None, HAZARD))


def main(arguments: Sequence[str]) -> None:
    """The command. Exits with 1 and a message when the traces carry no recommendation."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (CalibrationError, TraceError, InvalidRequest, ImportError, OSError) as error:
        sys.exit(f"espo_gateway calibrate: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espo_gateway calibrate",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("traces", nargs="+", type=Path, metavar="TRACES", help="JSON lines, or *.parquet")
    add(
        "--rule",
        choices=_RULES,
        help="default: success-probability with outcomes, else the gate's, or regret-only",
    )
    add("--stop-share", type=share, metavar="SHARE", help="stop about this share")
    add_bound(parser)
    add(
        "--outcome",
        default="correct",
        metavar="COLUMN",
        help="field that says whether an answer was right (default: correct)",
    )
    add("--outcomes", type=Path, metavar="FILE", help="outcomes from a file of their own")
    add("--gate", type=Path, metavar="FILE", help="a gate whose other constants are to hold")
    add("--folds", type=_folds, default=5, metavar="N", help="of the cross-fitting (default: 5)")
    add("--output", type=Path, metavar="FILE", help="where to write the gate, for --gate")
    return parser


def _folds(text: str) -> int:
    folds = int(text)
    if folds < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, not {text}")
    return folds


def _check_output(path: Path) -> None:
    """Raise CalibrationError where a file would be replaced that is no gate."""
    try:
        if path.exists() and path.stat().st_size:
            gate_from_json(path.read_bytes(), has_critic=True)
    except (OSError, InvalidRequest) as error:
        raise CalibrationError(
            f"--output: {path} is there and no gate ({error}); choose another name, or remove it"
        ) from error


def _run(options: argparse.Namespace) -> None:
    if options.output is not None:
        _check_output(options.output)
    known = read_outcomes(options.outcomes, options.outcome) if options.outcomes else None
    reader = _Reader(options.traces, options.outcome, known)
    for chunk in reader.read(itself):
        reader.count(chunk)
    print(reader.summary())
    if reader.known:
        for warning in unnamed(reader.unnamed):
            print(f"warning: {warning}")
    gate = _base(options, has_outcomes=reader.known > 0)
    if options.stop_share is None and not reader.known:
        raise CalibrationError(
            "no outcome is known: give --stop-share, or outcomes (--outcome, --outcomes)"
        )
    learnt = learn(reader.read, gate, folds=options.folds)
    judged = judge(reader.read, learnt)
    level, reason = _level(options, learnt, judged)
    levels = sorted({level, *(level_for_share(judged, learnt.gate, s) for s in _SHARES)})
    rows = rows_at(reader.read, learnt, judged, levels)
    _print(learnt, judged, rows, levels.index(level), reason)
    threshold = threshold_of(gate.rule)
    chosen = threshold.set(learnt.gate, threshold.at(level))
    if options.output is not None:
        options.output.write_bytes(msgspec.json.format(gate_to_json(chosen), indent=2) + b"\n")
        print(f"\nwritten to {options.output}: python -m espo_gateway --gate {options.output}")


class _Reader:
    """The traces, read as often as needed; tells on a terminal how far it is."""

    def __init__(self, paths: list[Path], outcome: str, known: Known | None) -> None:
        self._paths, self._outcome, self._outcomes = paths, outcome, known
        self.traces = self.tokens = self.cut = self.unnamed = 0
        self._outcomes_of: dict[int, bool] = {}

    def read(self, work: Callable[[Traces], T]) -> Iterator[T]:
        done = 0
        for traces in read_traces(self._paths, outcome=self._outcome, known=self._outcomes):
            yield work(traces)
            done += len(traces)
            if sys.stderr.isatty():
                print(f"\r{done:,} traces", end="", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def count(self, traces: Traces) -> None:
        self.traces += len(traces)
        self.tokens += int(traces.lengths.sum())
        self.cut += int(traces.cut.sum())
        self.unnamed += int((~traces.by_prompt).sum())
        known = np.flatnonzero(~np.isnan(traces.correct))
        # That of a session counts once; others by a number that no session has.
        for row in known.tolist():
            unit = int(traces.sessions[row]) or -1 - len(self._outcomes_of)
            self._outcomes_of[unit] = bool(traces.correct[row])

    @property
    def known(self) -> int:
        """Outcomes, that of a session counted once."""
        return len(self._outcomes_of)

    def summary(self) -> str:
        text = f"{self.traces:,} traces, {self.tokens:,} tokens"
        if self.known:
            right = sum(self._outcomes_of.values())
            text += f"; {self.known:,} outcomes known, {right / self.known:.1%} right"
        if self.cut:
            text += f"; {self.cut:,} were cut, and count only where a threshold cuts them by then"
        return text


def _base(options: argparse.Namespace, *, has_outcomes: bool) -> Gate:
    gate = Gate()
    if options.gate is not None:
        gate = gate_from_json(options.gate.read_bytes(), has_critic=True)
    fitted = options.stop_share is None and has_outcomes
    given = gate.rule if gate.rule != "none" else None
    rule = options.rule or given or ("success-probability" if fitted else "regret-only")
    if rule not in _RULES:
        fitting = ", ".join(_RULES)
        raise CalibrationError(f"rule {rule!r} cannot be calibrated; use one of {fitting}")
    estimator = UNFITTED if value_source(rule, gate.value) == "stream" else None
    gate = dataclasses.replace(gate, rule=rule, estimator=estimator)
    if gate.needs_critic or (rule == "value-only" and gate.source == "constant"):
        raise CalibrationError(
            f"rule {rule!r} with value {gate.value!r} cannot be replayed: the values were not "
            'recorded; use value "stream", or another rule'
        )
    if gate.source == "stream" and not has_outcomes:
        raise CalibrationError(
            f"rule {rule!r} needs outcomes to fit its estimator to (--outcome, --outcomes)"
        )
    return gate


def _level(
    options: argparse.Namespace, learnt: CrossFit, judged: JudgedTraces
) -> tuple[float, str]:
    if options.stop_share is not None:
        level = level_for_share(judged, learnt.gate, options.stop_share)
        return level, f"nearest to {options.stop_share:.1%} stopped"
    return level_for_bound(judged, learnt.gate, bound_of(options))


def _print(
    learnt: CrossFit, judged: JudgedTraces, rows: Iterable[Row], chosen: int, reason: str
) -> None:
    gate = learnt.gate
    print(f"rule {gate.rule}; regret mean {gate.statistics.mean:.4g}", end="")
    print(f", variance {gate.statistics.variance:.4g}")
    if (explained := judged.explained_variance) is not None:
        print(f"explained variance of the estimator, out of sample: {explained:.2f}")
    symbol = threshold_of(gate.rule).symbol
    print(f"\n{symbol:>12} {'stopped':>9} {'saved':>9} {'lost':>9} {'false':>9} {'undecided':>10}")
    for number, row in enumerate(rows):
        lost, false = (
            "unknown" if known is None else f"{known:.1%}" for known in (row.lost, row.false)
        )
        print(
            f"{row.threshold:12.4g} {row.stopped:9.1%} {row.saved:9.1%} {lost:>9} {false:>9} "
            f"{row.undecided:10,}{'  <- recommended' if number == chosen else ''}"
        )
        if number == chosen:
            best = row
    print(f"\nrecommended: {symbol} = {best.threshold:.4g}, {reason};", end=" ")
    print(f"saves {best.saved:.1%} of the tokens of these traces")
