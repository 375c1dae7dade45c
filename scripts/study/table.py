"""results.json as Markdown: the comparison, what changed against the baseline, the paper's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Say = Callable[[float], str]

_PERCENT: Say = "{:.1%}".format
_COUNT: Say = "{:,.0f}".format
_DECIMAL: Say = "{:.2f}".format
_SMALL: Say = "{:.3f}".format


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


_COLUMNS: dict[str, tuple[str, Say]] = {
    "accuracy": ("accuracy, T = 1", _PERCENT),
    "accuracy_greedy": ("greedy", _PERCENT),
    "tokens": ("tokens generated", _COUNT),
    "length": ("mean length", "{:.1f}".format),
    "stop_share": ("stopped", _PERCENT),
    "entropy": ("entropy, end", _SMALL),
    "believed_errors": ("believed errors, end", _PERCENT),
    "critic_explained_variance": ("explained by critic", _DECIMAL),
    "auc_within_prompts": ("AUC within prompts", _DECIMAL),
    "questions": ("questions/step", "{:.0f}".format),
    "rollout_seconds": ("rollout s/step", _DECIMAL),
    "update_seconds": ("update s/step", _DECIMAL),
}
#: by the audits of all seeds
_SHARES = {"right_lost": "right rollouts lost", "false_positives": "false positives"}
_AGAINST: dict[str, tuple[str, Say]] = {
    "accuracy": ("accuracy, points", _points),
    "accuracy_greedy": ("greedy, points", _points),
    "tokens": ("tokens", lambda value: f"{value - 1:+.1%}"),
    "length": ("length", lambda value: f"{value - 1:+.1%}"),
    "longest": ("longest rollout", lambda value: f"{value - 1:+.1%}"),
    "rollout_seconds": ("rollout time", lambda value: f"{value - 1:+.1%}"),
    "step_seconds": ("step time", lambda value: f"{value - 1:+.1%}"),
}


def markdown(results: dict[str, Any]) -> str:
    """The tables, one after another."""
    methods, base = results["methods"], results["baseline"]
    rows = []
    for method in methods.values():
        cells = [_cell(method[name], say) for name, (_, say) in _COLUMNS.items()]
        shares = [
            _cell(method[name] | {"mean": method[name]["value"]}, _PERCENT) for name in _SHARES
        ]
        rows.append([method["title"], str(len(method["seeds"])), *cells, *shares])
    heads = ["method", "seeds", *(head for head, _ in _COLUMNS.values()), *_SHARES.values()]
    others = {name: method for name, method in methods.items() if name != base}
    against = [
        [m["title"], *(_cell(m["against_baseline"][n], say) for n, (_, say) in _AGAINST.items())]
        for m in others.values()
    ]
    paper = [
        [m["title"], f"{p['accuracy']:.1f}", f"{p['length']:.0f}", _million(p["tokens"])]
        for m in methods.values()
        if (p := m["paper"])
    ]
    return "\n\n".join(
        [
            f"Recipe `{results['recipe']}`; means over seeds with 95 % intervals (Student's t); "
            "right rollouts lost and false positives by the audits of all seeds, with Wilson's.",
            markdown_table(heads, rows),
            f"Against {methods[base]['title']}, paired by seed:",
            markdown_table(["method", *(head for head, _ in _AGAINST.values())], against),
            *_time(results),
            *_paper(paper),
            *_made_on(results["runs"]),
            *([f"Not done: {', '.join(results['missing'])}"] if results["missing"] else []),
        ]
    )


def _made_on(runs: list[dict[str, Any]]) -> list[str]:
    """Each machine once, with the most runs that it had at a time."""
    jobs: dict[str, int] = {}
    for run in runs:
        machine = run["machine"]
        versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items())
        on = [f"{machine.get('cpus', '?')} cores", machine.get("processor", "unknown")]
        told = f"{', '.join([*on, *machine.get('gpus', [])])}; {versions}."
        jobs[told] = max(run["jobs"], jobs.get(told, 1))
    several = " Up to {} runs at a time: their seconds are no measurement."
    return [told + (several.format(most) if most > 1 else "") for told, most in jobs.items()]


def _time(results: dict[str, Any]) -> list[str]:
    """How long to the target, and how much of the tokens saved is time saved."""
    methods, target, parts = results["methods"], results["target"], []
    if target is not None:
        rows = [
            [
                method["title"],
                f"{method['reached_target']} of {len(method['seeds'])}",
                _cell(method["seconds_to_target"], "{:.0f} s".format),
                _cell(method["step_seconds"], _DECIMAL),
            ]
            for method in methods.values()
        ]
        heads = ["method", "seeds that reach it", "seconds of training until then", "s/step"]
        parts += [f"Time to a held-out accuracy of {target:.0%}:", markdown_table(heads, rows)]
    if rows := [
        [
            method["title"],
            _cell(method["saved"]["accuracy"], _points),
            *(_cell(method["saved"][n], _PERCENT) for n in ("tokens", "rollout_seconds")),
            _cell(method["saved"]["rollout_seconds_per_token"], _DECIMAL),
            _cell(method["saved"]["step_seconds"], _PERCENT),
            _cell(method["saved"]["step_seconds_per_token"], _DECIMAL),
        ]
        for method in methods.values()
        if method["without"] in methods
    ]:
        heads = [
            "method",
            "accuracy, points",
            "tokens saved",
            "of the wait for rollouts",
            "ratio",
            "of a step",
            "ratio",
        ]
        parts += [
            "Against the same method without stopping, paired by seed; ratio: time saved to tokens "
            "saved:",
            markdown_table(heads, rows),
        ]
    return parts


def _paper(rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    heads = ["method", "accuracy", "mean length", "tokens generated"]
    return ["The paper's own, 7B (accuracy on AIME24, %):", markdown_table(heads, rows)]


def _million(tokens: float | None) -> str:
    return "–" if tokens is None else f"{tokens:.1f} M"


def _cell(known: dict[str, float], say: Say) -> str:
    if not math.isfinite(known["mean"]):
        return "–"
    text = say(known["mean"])
    if math.isfinite(known["low"]):
        text += f" [{say(known['low'])}, {say(known['high'])}]"
    return text


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    """Cells as a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
