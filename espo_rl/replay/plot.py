"""The picture of a replay: tokens saved against what it costs, a line for each rule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from espo_gateway.traces.detection import Curve

#: Okabe and Ito's colours, told apart by colour-blind people; dash and marker say it again.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vP*Xh"
#: A threshold that stops fewer than this share says little of the stopped.
_LEAST = 0.01


def draw(curves: Mapping[str, Curve], path: Path) -> None:
    """Write the plot; its suffix is the format, such as .png or .svg."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.5), sharey=True, layout="constrained")
    _panel(axes[0], curves, "false", "false positives: stopped rollouts that would be right (%)")
    _panel(axes[1], curves, "false_positive_rate", "right rollouts that are stopped (%)")
    axes[0].set_ylabel("tokens saved (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    try:
        figure.savefig(path, dpi=130)
    finally:
        plt.close(figure)


def _panel(axes: Axes, curves: Mapping[str, Curve], name: str, label: str) -> None:
    for number, (rule, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        there = curve.stopped[:, 0] >= _LEAST
        x, y = 100 * getattr(curve, name)[there, 0], 100 * curve.saved[there, 0]
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=_DASHES[number % len(_DASHES)],
            marker=_MARKERS[number % len(_MARKERS)],
            markevery=(number, 9),
            markersize=6,
            linewidth=1.8,
            label=rule,
        )
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)
    # Where a rule is worth using all is below a few per cent; past that a glance will do.
    axes.set_xscale("symlog", linthresh=1, linscale=0.6)
    axes.set_xticks(ticks := [0, 0.5, 1, 2, 5, 10, 20, 50, 100], map(str, ticks))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
