"""The page of a report: its parts put into one file, with all that it shows.

Modules here import each other as modules do, so that it stands in the file what a part needs. In
the report they are one script: a page opened from a disk may not load others.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

#: In the order of their imports.
_SCRIPTS = ("format.js", "plots.js", "curves.js", "trace.js", "table.js", "page.js")
_IMPORT = re.compile(r"^import [^;]*;\n", re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)


def page(data: dict[str, Any]) -> str:
    """The HTML of a report; `data` is what `command.make_report` puts together."""
    own, gateway = files(__name__), files("espo_gateway.admin.page")

    def text(name: str) -> str:
        shared = name == "format.js"  # numbers look as they do on the gateway's page
        return ((gateway if shared else own) / name).read_text("utf-8")

    # The gateway's look, and what only a report has.
    styles = [(gateway / "page.css").read_text("utf-8"), text("uPlot.min.css"), text("report.css")]
    modules = [_EXPORT.sub("", _IMPORT.sub("", text(name))) for name in _SCRIPTS]
    # "<" would let a text end the element that it stands in.
    plain = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "style": "\n".join(styles),
        "licence": text("uPlot.LICENSE"),
        "uplot": text("uPlot.iife.min.js"),
        "script": "\n".join(modules),
        "data": plain,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text("page.html"))
