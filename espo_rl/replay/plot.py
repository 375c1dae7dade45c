"""The picture of a replay: tokens saved against what it costs, a line for each rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espo_gateway.traces.detection import Curve

#: Okabe and Ito's colours, told apart by colour-blind people; dash and marker say it again.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vP*Xh"
#: A threshold that stops fewer than this share says little of the stopped.
_LEAST = 0.01


def draw(
    curves: Mapping[str, Curve],
    areas: Mapping[str, Mapping[str, Sequence[float | None]]],
    path: Path,
) -> None:
    """Write the plot; its suffix is the format, such as .png or .svg.

    areas: of each rule, AUC and its interval by the number of tokens at which it was looked at.
    """
    # Here, as the processes that share a replay's work would wait for it too.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 5.5), layout="constrained")
    axes = figure.subplots(1, 3)
    _panel(axes[0], curves, "false_positive_rate", "right rollouts lost to stopping (%)")
    _panel(axes[1], curves, "false", "false positives: stopped rollouts that would be right (%)")
    axes[1].sharey(axes[0])
    axes[0].set_ylabel("tokens saved (%)")
    _by_position(axes[2], areas)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130)


def _style(number: int) -> dict[str, Any]:
    """The look of a rule's lines, the same in all panels."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 6,
        "linewidth": 1.8,
    }


def _by_position(axes: Any, areas: Mapping[str, Mapping[str, Sequence[float | None]]]) -> None:
    for number, (rule, found) in enumerate(areas.items()):
        tokens = [int(token) for token in found]
        values = [math.nan if area[0] is None else area[0] for area in found.values()]
        axes.plot(tokens, values, label=rule, **_style(number))
    axes.axhline(0.5, color="black", linewidth=0.8, alpha=0.5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("token, of the rollouts that run on to it")
    axes.set_ylabel("AUC of the score at that token")
    axes.grid(alpha=0.25)


def _panel(axes: Any, curves: Mapping[str, Curve], name: str, label: str) -> None:
    for number, (rule, curve) in enumerate(curves.items()):
        there = curve.stopped[:, 0] >= _LEAST
        x, y = 100 * getattr(curve, name)[there, 0], 100 * curve.saved[there, 0]
        axes.plot(x, y, markevery=(number, 9), label=rule, **_style(number))
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)
    # Where a rule is worth using all is below a few per cent; past that a glance will do.
    axes.set_xscale("symlog", linthresh=1, linscale=0.6)
    axes.set_xticks(ticks := [0, 0.5, 1, 2, 5, 10, 20, 50, 100], map(str, ticks))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
