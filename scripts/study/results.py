"""What the runs of a study came to: each run, each method, each method against the baseline.

All intervals are 95 %, Student's t over seeds; comparisons are paired by seed: equal seeds mean
equal problems in equal order, but where dynamic sampling draws more of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from espo_rl.record.intervals import Share
from espo_rl.record.run_folder import number, read_run
from study.design import Run, Study
from study.runner import jobs_of, summary_of

#: Steps at the end of a run whose mean is "at the end".
LAST = 5
#: Of a run, as the Markdown table and the comparison need them.
MEASURES = (
    "accuracy",
    "accuracy_greedy",
    "tokens",
    "length",
    "length_full",
    "stop_share",
    "entropy",
    "believed_errors",
    "critic_explained_variance",
    "gate_explained_variance",
    "auc_within_prompts",
    "questions",
    "rollout_seconds",
    "update_seconds",
    "step_seconds",
    "longest",
)
#: Compared as ratios; the others as differences.
RATIOS = ("tokens", "length", "rollout_seconds", "update_seconds", "step_seconds", "longest")


class Spread(NamedTuple):
    """A mean over `n` seeds with its interval; NaN where it is not known."""

    mean: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and 95 % interval by Student's t; without NaNs."""
    known = [value for value in values if math.isfinite(value)]
    if len(known) < 2:
        return Spread(known[0] if known else math.nan, math.nan, math.nan, len(known))
    mean, error = float(np.mean(known)), float(np.std(known, ddof=1)) / math.sqrt(len(known))
    half = float(stdtrit(len(known) - 1, 0.975)) * error
    return Spread(mean, mean - half, mean + half, len(known))


def curves_of(folder: Path) -> dict[str, list[float]]:
    """A run's numbers by step; shape [steps] each, NaN where unknown. Evaluations apart."""
    run = read_run(folder)
    curves = {
        name: run.column(key)
        for name, key in {
            "step": "step",
            "tokens": "rollout/tokens",
            "tokens_full": "rollout/tokens_total_without_stopping",  # of the run so far
            "length": "rollout/length",
            "length_full": "rollout/length_without_stopping",
            "longest": "rollout/length_max",
            "stop_share": "rollout/stop_share",
            "audited": "rollout/audited",
            "audited_correct": "rollout/audited_correct",
            "believed_errors": "rollout/believed_errors",
            "entropy": "ppo/entropy",
            "critic_explained_variance": "ppo/critic_explained_variance",
            "gate_explained_variance": "stopping/explained_variance",
            "auc_within_prompts": "stopping/auc_within_prompts",
            "questions": "rollout/questions",
            "rollout_seconds": "seconds/rollout",
            "update_seconds": "seconds/update",
            "step_seconds": "seconds/step",
        }.items()
    }
    cumulative = np.cumsum(curves["tokens"])
    at = {0: 0.0} | dict(zip(curves["step"], cumulative.tolist(), strict=True))
    # A resumed run may have evaluated a step twice; the later one counts.
    evaluated = {
        row["step"]: row[key]["value"]
        for row in run.evaluations
        for key in row
        if key.startswith("evaluation/avg@")
    }
    curves["evaluated_step"] = [float(step) for step in evaluated]
    curves["evaluated_tokens"] = [at.get(step, math.nan) for step in evaluated]
    curves["evaluated_accuracy"] = list(evaluated.values())
    # Of training: what evaluations and checkpoints take is not in it.
    seconds = {0: 0.0} | dict(
        zip(curves["step"], np.cumsum(curves["step_seconds"]).tolist(), strict=True)
    )
    curves["evaluated_seconds"] = [seconds.get(step, math.nan) for step in evaluated]
    return curves


def result_of(run: Run) -> dict[str, Any] | None:
    """A finished run's measures; None for one that is not done."""
    summary = summary_of(run)
    if summary is None:
        return None
    curves = curves_of(run.folder)

    def mean(name: str, last: int = 0) -> float:
        values = [value for value in curves[name][-last:] if math.isfinite(value)]
        return float(np.mean(values)) if values else math.nan

    return {
        "method": run.name,
        "seed": run.seed,
        "folder": str(run.folder),
        "accuracy": summary["accuracy_after"],
        "accuracy_before": summary["accuracy_before"],
        "accuracy_greedy": number(summary.get("accuracy_greedy_after")),
        "tokens": float(np.sum(curves["tokens"])),
        "tokens_full": number(summary["tokens_without_stopping"]),
        "length": mean("length"),
        "length_full": mean("length_full"),
        "stop_share": mean("stop_share"),
        "audited": int(np.nansum(curves["audited"])),
        "audited_correct": int(np.nansum(curves["audited_correct"])),
        "right_lost_trials": number(summary.get("right_lost_trials")),
        "entropy": mean("entropy", LAST),
        "believed_errors": mean("believed_errors", LAST),
        "critic_explained_variance": mean("critic_explained_variance", 4 * LAST),
        "gate_explained_variance": mean("gate_explained_variance", 4 * LAST),
        "auc_within_prompts": mean("auc_within_prompts", 4 * LAST),
        "questions": mean("questions"),
        "rollout_seconds": mean("rollout_seconds"),
        "update_seconds": mean("update_seconds"),
        "step_seconds": mean("step_seconds"),
        "longest": mean("longest"),
        "staleness": number(summary.get("staleness")),
        "seconds_to_target": seconds_to(curves, run.study.target),
        "restarts": summary["restarts"],
        "errors": summary["errors"],
        "jobs": jobs_of(run),
        "machine": summary.get("machine", {}),
        "versions": summary.get("versions", {}),
    }


def seconds_to(curves: dict[str, list[float]], target: float | None) -> float:
    """Seconds of training until the held-out accuracy passes the target, between two evaluations
    by a straight line; NaN where it never does."""
    points = list(zip(curves["evaluated_seconds"], curves["evaluated_accuracy"], strict=True))
    if target is None or not points:
        return math.nan
    if points[0][1] >= target:
        return points[0][0]
    for (before, low), (after, high) in pairwise(points):
        if high >= target:
            return before + (after - before) * (target - low) / (high - low)
    return math.nan


def saved(runs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Of runs and the same without stopping: shares of tokens and seconds that were saved, how much
    of the one became the other, and the accuracy gained."""
    names = ("tokens", "rollout_seconds", "step_seconds")
    shares: dict[str, list[float]] = {
        name: [1 - one[name] / other[name] if other[name] else math.nan for one, other in runs]
        for name in names
    }
    for name in names[1:]:
        shares[f"{name}_per_token"] = [
            time / tokens if tokens > 0 else math.nan
            for time, tokens in zip(shares[name], shares["tokens"], strict=True)
        ]
    shares["accuracy"] = [one["accuracy"] - other["accuracy"] for one, other in runs]
    return {name: spread(values)._asdict() for name, values in shares.items()}


def results_of(study: Study) -> dict[str, Any]:
    """What results.json holds, NaN where a number is unknown."""
    runs = [result for run in study.runs() if (result := result_of(run)) is not None]
    methods: dict[str, Any] = {}
    for name, method in study.methods.items():
        own = {run["seed"]: run for run in runs if run["method"] == name}
        base = {run["seed"]: run for run in runs if run["method"] == study.baseline}
        paired = [(own[seed], base[seed]) for seed in own if seed in base]
        right = [run["audited_correct"] for run in own.values()]
        false = Share(sum(right), sum(run["audited"] for run in own.values()))
        lost = Share(sum(right), sum(run["right_lost_trials"] for run in own.values()))
        methods[name] = {
            "title": method.title,
            "seeds": sorted(own),
            **{m: spread([run[m] for run in own.values()])._asdict() for m in MEASURES},
            "false_positives": _share(false) | {"audited": false.trials},
            "right_lost": _share(lost) | {"trials": lost.trials},
            "against_baseline": {
                m: spread([_compared(m, one[m], other[m]) for one, other in paired])._asdict()
                for m in MEASURES
            },
            "seconds_to_target": spread(
                [run["seconds_to_target"] for run in own.values()]
            )._asdict(),
            "reached_target": sum(math.isfinite(run["seconds_to_target"]) for run in own.values()),
            "without": method.without,
            "saved": saved(
                [
                    (own[run["seed"]], run)
                    for run in runs
                    if run["method"] == method.without and run["seed"] in own
                ]
            ),
            "paper": method.paper and method.paper.model_dump(),
        }
    return {
        "recipe": study.recipe,
        "baseline": study.baseline,
        "target": study.target,
        "settings": study.settings,
        "methods": methods,
        "runs": runs,
        "missing": [str(run.folder) for run in study.runs() if summary_of(run) is None],
    }


def _share(share: Share) -> dict[str, float]:
    low, high = share.interval
    return {"value": share.value, "low": low, "high": high}


def _compared(measure: str, one: float, other: float) -> float:
    if measure in RATIOS:
        return one / other if other else math.nan
    return one - other
