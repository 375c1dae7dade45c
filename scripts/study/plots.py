"""The paper's plots, of a study: a line a method; bands: 95 % intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.design import Study
from study.results import curves_of, spread
from study.runner import summary_of

#: Okabe and Ito's colours, told apart also by the colour-blind; the dashes tell the rest.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
#: Bands of more methods than this hide each other; the table has the intervals.
_BANDS = 5
#: Steps that a noisy curve is averaged over.
_WINDOW = 5

Curves = dict[str, list[float]]
Draw = Callable[[Axes, list[Curves], dict[str, Any]], None]


def draw_all(study: Study, folder: Path) -> list[Path]:
    """Write every plot as PNG; their paths."""
    curves: dict[str, list[Curves]] = {}
    for run in study.runs():
        if summary_of(run) is not None:
            curves.setdefault(run.name, []).append(curves_of(run.folder))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        for name, (title, y, panels) in PLOTS.items():
            figure = Figure(figsize=(2.5 + 4 * len(panels), 4.8), layout="constrained")
            figure.suptitle(title)
            every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
            for axes, (x, draw) in zip(every, panels.items(), strict=True):
                axes.set(xlabel=x)
                axes.grid(alpha=0.25)
                for (method, runs), style in zip(curves.items(), styles(), strict=False):
                    told = {"label": study.methods[method].title, "band": len(curves) <= _BANDS}
                    draw(axes, runs, style | told)
            every[0].set(ylabel=y)
            if name in SHARES:  # an interval by Student's t may leave what can be
                low, high = every[0].get_ylim()
                every[0].set_ylim(max(low, 0.0), min(high, 1.0))
            if (named := every[0].get_legend_handles_labels())[1]:
                columns = 1 + (len(named[1]) > 4)
                figure.legend(
                    *named,
                    loc="outside lower center",
                    frameon=False,
                    fontsize=9,
                    ncols=columns,
                    handlelength=4,  # the marker hides a shorter line's dashes
                )
            paths.append(folder / f"{name}.png")
            # Long names make a legend that is wider than the plot.
            figure.savefig(paths[-1], dpi=130, bbox_inches="tight")
    return paths


def styles() -> Iterator[dict[str, Any]]:
    for number, colour in enumerate(cycle(_COLOURS)):
        dash = _DASHES[number % len(_DASHES)]
        yield {"color": colour, "linestyle": dash, "linewidth": 1.8}


def _line(axes: Axes, x: np.ndarray, runs: list[np.ndarray], style: dict[str, Any]) -> None:
    """Mean, and its band where the style says so; x: shape [points], runs: [points] each."""
    points = [spread(values) for values in zip(*runs, strict=True)]
    mean, low, high = (
        np.array([getattr(p, name) for p in points]) for name in ("mean", "low", "high")
    )
    if not np.isfinite(mean).any():
        return
    axes.plot(x, mean, **_line_alone(style))
    if style["band"]:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _line_alone(style: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in style.items() if name != "band"}


def _by_step(name: str, smooth: int = 1) -> Draw:
    def draw(axes: Axes, runs: list[Curves], style: dict[str, Any]) -> None:
        steps = min(len(run["step"]) for run in runs)
        values = [_smoothed(run[name][:steps], smooth) for run in runs]
        _line(axes, np.array(runs[0]["step"][:steps]), values, style)

    return draw


def _smoothed(values: list[float], window: int) -> np.ndarray:
    """Trailing mean over what is known of the last `window` steps."""
    found = []
    for end in range(1, len(values) + 1):
        known = [v for v in values[max(0, end - window) : end] if np.isfinite(v)]
        found.append(float(np.mean(known)) if known else np.nan)
    return np.array(found)


def _accuracy(by: str) -> Draw:
    def draw(axes: Axes, runs: list[Curves], style: dict[str, Any]) -> None:
        points = min(len(run["evaluated_step"]) for run in runs)
        x = np.mean([run[by][:points] for run in runs], axis=0)
        values = [np.array(run["evaluated_accuracy"][:points]) for run in runs]
        _line(axes, x / (1e3 if by == "evaluated_tokens" else 1), values, style | {"marker": "o"})

    return draw


def _saved(axes: Axes, runs: list[Curves], style: dict[str, Any]) -> None:
    steps = min(len(run["step"]) for run in runs)
    saved = [
        (np.array(run["tokens_full"][:steps]) - np.cumsum(run["tokens"][:steps])) / 1e3
        for run in runs
    ]
    _line(axes, np.array(runs[0]["step"][:steps]), saved, style)


def _lengths(axes: Axes, runs: list[Curves], style: dict[str, Any]) -> None:
    _by_step("length", _WINDOW)(axes, runs, style)
    steps = min(len(run["step"]) for run in runs)
    values = np.mean([_smoothed(run["length_full"][:steps], _WINDOW) for run in runs], axis=0)
    stopped = any(share > 0 for run in runs for share in run["stop_share"])
    if stopped:
        thin = _line_alone(style) | {"linewidth": 0.7, "label": None}
        axes.plot(runs[0]["step"][:steps], values, **thin)


def _false_positives(axes: Axes, runs: list[Curves], style: dict[str, Any]) -> None:
    steps = min(len(run["step"]) for run in runs)
    right = np.sum([np.cumsum(run["audited_correct"][:steps]) for run in runs], axis=0)
    audited = np.sum([np.cumsum(run["audited"][:steps]) for run in runs], axis=0)
    if audited[-1] == 0:
        return
    share = np.divide(right, audited, out=np.full(steps, np.nan), where=audited >= 10)
    axes.plot(runs[0]["step"][:steps], share, **_line_alone(style))


#: plots whose y is between 0 and 1
SHARES = {
    *("accuracy-by-step", "accuracy-by-tokens", "accuracy-by-cost"),
    *("false-positives", "auc-within-prompts"),
}
_TOKENS = {"thousand tokens generated": _accuracy("evaluated_tokens")}
_SECONDS = {"seconds of training": _accuracy("evaluated_seconds")}
#: name: title, y, and of each panel x and what draws a method's line
PLOTS: dict[str, tuple[str, str, dict[str, Draw]]] = {
    "accuracy-by-step": (
        "Accuracy on held-out problems",
        "accuracy, sampled",
        {"step": _accuracy("evaluated_step")},
    ),
    "accuracy-by-tokens": (
        "Accuracy against tokens generated",
        "accuracy, sampled",
        _TOKENS,
    ),
    "accuracy-by-cost": (
        "Accuracy against tokens generated and seconds of training",
        "accuracy, sampled",
        _TOKENS | _SECONDS,
    ),
    "tokens-saved": (
        "Tokens saved, cumulative (estimated from audits)",
        "thousand tokens",
        {"step": _saved},
    ),
    "length": (
        "Response length; thin: what it would have been",
        "tokens",
        {"step": _lengths},
    ),
    "entropy": ("Entropy of the policy", "nats a token", {"step": _by_step("entropy", _WINDOW)}),
    "false-positives": (
        "False positives of all audits so far",
        "share of stopped rollouts",
        {"step": _false_positives},
    ),
    "auc-within-prompts": (
        "How well the gate tells right from wrong rollouts of a prompt",
        "area under the ROC curve",
        {"step": _by_step("auc_within_prompts", _WINDOW)},
    ),
    "explained-variance": (
        "Variance of the outcome that the critic explains",
        "explained variance",
        {"step": _by_step("critic_explained_variance", _WINDOW)},
    ),
}
