"""The results of an evaluation as a person reads them, a table, and as a program does, JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from espo_rl.evaluate.results import Report
from espo_rl.record.intervals import ProblemMean


def as_dict(report: Report) -> dict[str, Any]:
    """A report for results.json; unknown numbers are null."""
    scores = report.scores
    content = {
        "problems": report.problems,
        "samples": report.samples,
        "errors": len(report.errors),
        f"avg@{scores.k}": _estimate(scores.average),
        f"maj@{scores.k}": _estimate(scores.majority),
        **{f"pass@{draws}": _estimate(mean) for draws, mean in scores.passes.items()},
        "mean_tokens": report.tokens,
        "truncated": _estimate(report.truncated),
    }
    if report.gated:
        saved, half_width = report.saved
        content |= {
            "stopped": _estimate(report.stopped),
            "audited": report.totals.audited,
            "false_positives": _estimate(report.false_positives),
            "overshoot_tokens": report.totals.overshoot,
            "tokens_saved": saved if math.isfinite(saved) else None,
            "tokens_saved_half_width": half_width if math.isfinite(half_width) else None,
        }
    return content


def _estimate(share: ProblemMean | None) -> dict[str, Any] | None:
    if share is None or math.isnan(share.value):
        return None
    return {"value": share.value, "interval": list(share.interval)}


def table(title: str, reports: Mapping[str, Report]) -> Table:
    """A row for each data set: percentages, their intervals below."""
    rows = {name: _row(report) for name, report in reports.items()}
    over = "problems"
    if any(report.gated for report in reports.values()):
        over += ", of saved tokens over samples"
    shown = Table(title=f"{title} (%, 95 % interval over {over})", title_justify="left")
    shown.add_column("data")
    for heading in next(iter(rows.values())):
        shown.add_column(heading, justify="right")
    for name, row in rows.items():
        shown.add_row(name, *row.values(), end_section=True)
    return shown


def _row(report: Report) -> dict[str, str]:
    scores = report.scores
    row = {
        "problems": str(report.problems),
        f"avg@{scores.k}": _cell(scores.average),
        f"maj@{scores.k}": "—" if scores.majority is None else _cell(scores.majority),
        **{f"pass@{draws}": _cell(mean) for draws, mean in scores.passes.items() if draws > 1},
        "tokens": f"{report.tokens:,.0f}",
        "cut off": _cell(report.truncated),
        "errors": str(len(report.errors)),
    }
    if report.gated:
        saved, half_width = report.saved
        spread = f"± {100 * half_width:.1f}" if math.isfinite(half_width) else "± unknown"
        row |= {
            "stopped": _cell(report.stopped),
            "false stops": _cell(report.false_positives),
            "saved tokens": f"{100 * saved:.1f}\n{spread}" if math.isfinite(saved) else "unknown",
        }
    return row


def _cell(share: ProblemMean) -> str:
    if math.isnan(share.value):
        return "unknown"
    low, high = share.interval
    return f"{100 * share.value:.1f}\n{100 * low:.1f}–{100 * high:.1f}"
