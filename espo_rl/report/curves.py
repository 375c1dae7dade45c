"""The curves of a report: which numbers are drawn together, and what follows from several steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from espo_gateway.stop.threshold_control import Bound
from espo_rl.gate.audits import Audits
from espo_rl.record.intervals import Share
from espo_rl.record.json_files import nulls
from espo_rl.record.metrics import METRICS
from espo_rl.record.run_folder import Row, RunFolder, number

Unit = Literal["share", "count", "number", "seconds"]
Numbers = Sequence[float]


@dataclass(frozen=True)
class Line:
    """A line of a panel: y at x, NaN where unknown, with an interval where there is one."""

    label: str
    x: Numbers
    y: Numbers
    low: Numbers = ()
    high: Numbers = ()
    points: bool = False  # few and far between, so each is marked

    def as_dict(self, run: int) -> Row:
        """For the page; NaN becomes null. run: which of the report's runs."""
        lists = {name: _rounded(getattr(self, name)) for name in ("x", "y", "low", "high")}
        return {"run": run, "label": self.label, "points": self.points, **lists}

    @property
    def known(self) -> bool:
        """Whether there is anything to draw."""
        return any(map(math.isfinite, self.y))


@dataclass
class Panel:
    """A plot: the lines of all runs."""

    id: str
    title: str
    unit: Unit
    note: str
    x: Literal["step", "tokens"] = "step"
    lines: list[Row] = field(default_factory=list)


#: Panels whose lines are metrics as they were logged: id, title, unit, and name -> label.
_LOGGED: tuple[tuple[str, str, Unit, dict[str, str]], ...] = (
    ("stops", "Stop share", "share", {"rollout/stop_share": "stopped"}),
    ("threshold", "Threshold", "number", {"stopping/threshold": "threshold"}),
    ("entropy", "Entropy", "number", {"ppo/entropy": "entropy"}),
    (
        "kl",
        "KL divergence",
        "number",
        {
            "ppo/kl": "old to new policy",
            "ppo/kl_reference": "policy to reference",
            "ppo/mismatch_k3": "server to trainer",
        },
    ),
    (
        "explained",
        "Explained variance",
        "number",
        {
            "stopping/explained_variance": "estimate that gates",
            "stopping/explained_variance_free": "without what is asked",
            "ppo/critic_explained_variance": "critic",
        },
    ),
    (
        "within",
        "Which rollout has failed",
        "number",
        {"stopping/auc_within_prompts": "AUC within prompts"},
    ),
    ("questions", "Questions to answer probes", "count", {"rollout/questions": "questions"}),
    ("policy-loss", "Policy loss", "number", {"ppo/policy_loss": "policy loss"}),
    ("critic-loss", "Critic loss", "number", {"ppo/critic_loss": "critic loss"}),
)


def panels(runs: Sequence[RunFolder]) -> list[Row]:
    """The panels of a report for the page; those of which nothing is known are left out."""
    found: dict[str, Panel] = {}
    for index, run in enumerate(runs):
        for panel, lines in _panels(run):
            known = [line.as_dict(index) for line in lines if line.known]
            if known:
                found.setdefault(panel.id, panel).lines += known
    order = [panel.id for panel, _ in _panels(runs[0])]
    return [vars(found[name]) for name in order if name in found]


def _panels(run: RunFolder) -> Iterator[tuple[Panel, list[Line]]]:
    steps = run.column("step")
    sampled = run.column("rollout/tokens")
    total = tokens_total(run)
    at = dict(zip(map(int, steps), total, strict=True))
    axes: tuple[tuple[Literal["step", "tokens"], Numbers], ...]
    axes = (("step", steps), ("tokens", total))
    for x, axis in axes:
        training = Line("training rollouts", axis, run.column("rollout/accuracy"))
        places = {step: step if x == "step" else count for step, count in at.items()}
        by = "by step" if x == "step" else "by tokens generated"
        note = METRICS["rollout/accuracy"] + ". Evaluations: held-out problems, 95 % interval."
        yield (
            Panel(f"accuracy-{x}", f"Accuracy {by}", "share", note, x),
            [training, *_evaluations(run.evaluations, places)],
        )
    without = run.column("rollout/tokens_without_stopping")
    yield (
        Panel("tokens", "Tokens per step", "count", METRICS["rollout/tokens_without_stopping"]),
        [Line("sampled", steps, sampled), Line("without stopping", steps, without)],
    )
    yield (
        Panel("tokens-total", "Tokens, cumulative", "count", _TOTAL_NOTE),
        [
            Line("sampled", steps, total),
            Line("without stopping", steps, run.column("rollout/tokens_total_without_stopping")),
        ],
    )
    yield (
        Panel("length", "Response length", "count", _LENGTH_NOTE),
        [
            Line("as cut", steps, run.column("rollout/length")),
            Line("in full", steps, run.column("rollout/length_without_stopping")),
        ],
    )
    logged = {panel.id: (panel, lines) for panel, lines in _logged(run, steps)}
    yield logged.pop("stops")
    yield cost(run, steps)
    yield from logged.values()
    phases = [name for name in run.steps[-1] if name.startswith("seconds/")]
    yield (
        Panel("seconds", "Seconds per phase", "seconds", METRICS["seconds/*"]),
        [Line(name.removeprefix("seconds/"), steps, run.column(name)) for name in phases],
    )


def _logged(run: RunFolder, steps: Numbers) -> Iterator[tuple[Panel, list[Line]]]:
    for name, title, unit, metrics in _LOGGED:
        note = ". ".join(f"{label.capitalize()}: {METRICS[key]}" for key, label in metrics.items())
        lines = [Line(label, steps, run.column(key)) for key, label in metrics.items()]
        yield Panel(name, title, unit, note + "."), lines


def _evaluations(rows: Sequence[Row], places: dict[int, float]) -> Iterator[Line]:
    """avg@k of each evaluation, at its step or at the tokens sampled by then."""
    names = dict.fromkeys(name for row in rows for name in row if "avg@" in name)
    for name in names:
        there = [row for row in rows if isinstance(row.get(name), dict)]
        intervals = [row[name].get("interval") or (None, None) for row in there]
        label = name.removeprefix("evaluation/")
        yield Line(
            f"evaluation {label}",
            [places.get(row["step"], 0.0) for row in there],
            [number(row[name].get("value")) for row in there],
            [number(low) for low, _ in intervals],
            [number(high) for _, high in intervals],
            points=True,
        )


_TOTAL_NOTE = "Without stopping: estimated from all audits so far."
_LENGTH_NOTE = (
    "Mean tokens of the training samples, and the estimate, from the audits, of the same in full."
)


def cost(run: RunFolder, steps: Numbers) -> tuple[Panel, list[Line]]:
    """What stopping cost over the last steps, and the bounds."""
    window = int(run.setting("stopping", "evidence") or 20)
    audited, bad, right = (
        np.nan_to_num(run.column(f"rollout/{name}"))
        for name in ("audited", "audited_correct", "right")
    )
    bound = bound_of(run)
    trials = audited
    if bound.of == "right-lost":
        # In right rollouts that an audit would have shown.
        share, n = run.setting("stopping", "audit_share"), run.setting("rollout", "n")
        shown = Audits.of(number(share), int(number(n))).share * right
        trials = np.where(np.array(run.column("stopping/on")) == 1.0, shown, bad)
    ends = range(1, len(bad) + 1)
    shares = [Share(bad[:end][-window:].sum(), trials[:end][-window:].sum()) for end in ends]
    # Before anything is stopped the bound is trivially 1 and would flatten all else.
    upper = [most if most < 1.0 else math.nan for most in run.column("stopping/bound_upper")]
    return (
        Panel(
            "cost",
            f"What stopping costs: {bound.cost}",
            "share",
            f"By the audits of the last {window} steps, with a 95 % interval. Bound: "
            f"{METRICS['stopping/bound_upper']}.",
        ),
        [
            Line(
                "audited",
                steps,
                [share.value for share in shares],
                [share.interval[0] for share in shares],
                [share.interval[1] for share in shares],
            ),
            Line("bound", steps, upper),
            Line(
                "wished (at most)",
                steps,
                [bound.limit if audited.any() and bounded(run) else math.nan] * len(steps),
            ),
        ],
    )


def tokens_total(run: RunFolder) -> Numbers:
    """Sampled since the run's start, by step; what was sampled before the folder's first step, by a
    run that this one went on from, is in it."""
    known = run.column("rollout/tokens_total")
    if not any(map(math.isfinite, known)):  # runs of before do not say
        return list(np.cumsum(np.nan_to_num(run.column("rollout/tokens"))))
    return known


def bounded(run: RunFolder) -> bool:
    """Whether the run was to keep a bound."""
    unbounded = run.setting("stopping", "rule") in ("none", "random")
    return not unbounded and run.setting("stopping", "threshold") in ("audit", None)


def bound_of(run: RunFolder) -> Bound:
    """What the run was to keep; runs of before bounded false positives alone."""
    lost, false, confidence = (
        number(run.setting("stopping", name))
        for name in ("right_lost", "false_positives", "confidence")
    )
    if math.isfinite(false) or not math.isfinite(lost):
        return Bound("false-positives", false, confidence)
    return Bound("right-lost", lost, confidence)


def tiles(run: RunFolder) -> Row:
    """What stands above the curves: the run in a few numbers; unknown ones are null."""
    last, summary = run.steps[-1], run.summary
    scores = [
        number(value["value"])
        for row in run.evaluations
        for name, value in row.items()
        if "avg@" in name and isinstance(value, dict)
    ]
    tokens = tokens_total(run)[-1]
    without = number(summary.get("tokens_without_stopping"))
    if math.isnan(without):
        without = run.column("rollout/tokens_total_without_stopping")[-1]
    stopped = run.column("rollout/stop_share")
    numbers: dict[str, Any] = {
        "steps": last["step"],
        "planned": run.setting("run", "steps"),
        "before": scores[0] if scores else math.nan,
        "after": scores[-1] if len(scores) > 1 else math.nan,
        "training": number(last.get("rollout/accuracy")),
        "tokens": tokens,
        "without": without,
        "half_width": number(summary.get("tokens_without_stopping_half_width")),
        "saved": 1.0 - tokens / without if without else math.nan,
        "ended": bool(summary),
        "stop_share": number(summary.get("stop_rate", stopped[-1])),
        "audited": int(np.nansum(run.column("rollout/audited"))),
        "audited_correct": int(np.nansum(run.column("rollout/audited_correct"))),
    }
    share = Share(numbers["audited_correct"], numbers["audited"])
    numbers["false_positives"] = share.value
    numbers["false_positives_low"], numbers["false_positives_high"] = share.interval
    numbers["right_lost"] = number(summary.get("right_lost"))
    numbers["wished"] = bound_of(run).limit
    return nulls(numbers) | {
        "rule": run.setting("stopping", "rule") or last.get("stopping/rule"),
        "seed": run.setting("run", "seed"),
        "model": run.setting("model", "path"),
    }


def _rounded(values: Numbers) -> list[float | None]:
    """For JSON: six digits, which is more than a plot shows."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
