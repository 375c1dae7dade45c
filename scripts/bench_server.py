"""What monitored tokens cost a real vLLM: who decides, and how they are asked for, in one run.

Tokens a second, processor seconds of each process for 1,000 tokens, and the latency to the first
token, of random models made on the spot: a tiny one, whose engine has nothing to do but hand tokens
on (the worst case), and one of tens of millions of parameters. No request is stopped, so all cases
carry the same tokens; they take turns, in an order that changes from round to round.

  python scripts/bench_server.py --json result.json
  python scripts/bench_server.py --quick --only plain,engine --streams 64
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark import servers, throughput
from benchmark.arguments import count
from benchmark.load import BenchmarkError
from benchmark.report import machine
from espo_gateway import event_loop
from espo_gateway.stop.estimate import FEATURES
from espo_gateway.supervisor import ServerStartError
from espo_gateway.vllm_plugin.wire import told_by
from espo_rl.record.json_files import write_json
from espo_rl.record.output import OutputError, check_own, json_with


@dataclass(frozen=True)
class Case:
    """How a request is sent. server: to which one; streams: with logprobs, as the gateway asks.
    gate: that it carries, as JSON.
    """

    letter: str
    what: str
    server: str = "vllm"
    streams: bool = False
    gate: str | None = None


NEVER = json.dumps(servers.GATE)
SOON = json.dumps({"rule": "length", "beta": 20.0})
#: An estimate that never stops, of the stream's statistics and of V.
VALUED = json.dumps(
    {
        "rule": "success-probability",
        "p_star": 1e-9,
        "estimator": {"weights": [0.0] * (len(FEATURES) + 1), "bias": 0.0, "sources": ["critic"]},
        "schedule": {"every": 32},
    }
)

CASES = {
    "plain": Case("a", "plain, unstreamed, no logprobs"),
    "streamed": Case("b", "streamed with logprobs", streams=True),
    "gateway": Case("c", "through the gateway, which decides", "gateway"),
    "engine": Case("d", "the engine decides", gate=NEVER),
    "engine_gateway": Case("e", "the engine decides, through the gateway", "relaying"),
    "engine_recorded": Case("f", "the same, 5 % recorded", "recording"),
    "engine_valued": Case(
        "g", "the engine decides, by V of the policy's state", "headed", gate=VALUED
    ),
}
#: hidden size and layers
MODELS = {"tiny": (128, 2), "larger": (768, 8)}
#: Of the ratio to `plain` at the most streams, what is aimed at.
TARGETS = {"engine": 0.97, "engine_gateway": 0.93}


@dataclass
class Measured:
    """One case with so many streams, a number a round. Processor seconds by process."""

    tokens_per_s: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    cpu_s_per_1k_tokens: dict[str, list[float]] = field(default_factory=dict)


Found = dict[str, dict[int, Measured]]


def main() -> None:
    arguments = parse()
    try:
        if arguments.json:
            own = json_with("tokens_per_s", "cpu_s_per_1k_tokens")
            check_own(arguments.json, "--json", "report of this benchmark", own)
        report = event_loop.run(measure(arguments))
    except (BenchmarkError, OutputError, ServerStartError) as error:
        sys.exit(f"bench_server: {error}")
    if arguments.json:
        write_json(arguments.json, report, indent=1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--streams", type=count, nargs="+", default=[1, 16, 64], help="at once (default: 1 16 64)"
    )
    parser.add_argument("--tokens", type=count, default=128, help="of each stream (default: 128)")
    parser.add_argument("--rounds", type=count, default=5, help="of each case (default: 5)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 64 tokens")
    parser.add_argument("--only", metavar="A,B", help="of " + ", ".join(CASES))
    parser.add_argument("--models", metavar="A,B", help="of " + ", ".join(MODELS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.tokens = 2, 64
    for name, known in (("only", CASES), ("models", MODELS)):
        given = getattr(arguments, name)
        names = given.split(",") if given else list(known)
        if unknown := [one for one in names if one not in known]:
            parser.error(f"--{name}: there is no {unknown[0]!r}, only {', '.join(known)}")
        setattr(arguments, name, names)
    return arguments


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it, shown as it comes, and the report."""
    models, load = {}, os.getloadavg()
    for name in arguments.models:
        print(f"{name}: hidden size and layers {MODELS[name]}, vLLM starts", file=sys.stderr)
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            running = await start(stack, folder, arguments.only, *MODELS[name])
            found = await rounds(running, arguments)
            overshoot = await delivered_past_the_cut(running["vllm"].url)
        models[name] = {**told(found), "overshoot_delivered": overshoot}
        show(name, found, overshoot)
    # The worst case is the one to look at.
    return {
        **models[arguments.models[0]],
        "models": models,
        "cases": {name: f"({CASES[name].letter}) {CASES[name].what}" for name in arguments.only},
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "environment": machine(load),
    }


async def start(
    stack: AsyncExitStack, folder: Path, names: Sequence[str], hidden: int, layers: int
) -> dict[str, servers.Proxy]:
    """The servers that the cases need; stopped with the stack."""
    vllm = await throughput.serve_vllm(stack, folder, hidden, layers)
    running = {"vllm": vllm}
    if any(CASES[name].server == "headed" for name in names):
        place = folder / "headed"
        flags = "--value-head", str(head(place / "head", hidden, layers))
        running["headed"] = await throughput.serve_vllm(stack, place, hidden, layers, *flags)
    gateways = {
        "gateway": ("--decide", "gateway"),
        "relaying": ("--decide", "engine"),
        "recording": (
            *("--decide", "engine", "--record-share", "0.05"),
            *("--record", str(folder / "traces.jsonl")),
        ),
    }
    for server in {CASES[name].server for name in names} & gateways.keys():
        place = folder / server
        place.mkdir()
        running[server] = await servers.start_gateway(place, vllm.url, flags=gateways[server])
        stack.push_async_callback(running[server].process.stop)
    return running


def head(folder: Path, hidden: int, layers: int) -> Path:
    """Of V, on three quarters of the layers."""
    folder.mkdir(parents=True)
    config = {"num_hidden_layers": max(1, 3 * layers // 4)}
    (folder / "config.json").write_text(json.dumps(config))
    weights = np.random.default_rng(0).normal(size=(1, hidden)).astype(np.float32)
    save_file({"score.weight": weights}, folder / "model.safetensors")
    return folder


async def rounds(running: dict[str, servers.Proxy], arguments: argparse.Namespace) -> Found:
    """Every case in turn; the first round of each is a warm-up and not counted."""
    names = arguments.only
    found: Found = {name: {n: Measured() for n in arguments.streams} for name in names}
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        for number in range(-1, arguments.rounds):
            turn = number % len(names)
            for streams in arguments.streams:
                for name in [*names[turn:], *names[:turn]]:
                    seed = 1000 * (number + 1)
                    first = await first_tokens(session, running, CASES[name], streams, seed)
                    before = processor_seconds(running)
                    began = time.perf_counter()
                    await round_of(session, running, CASES[name], streams, arguments.tokens, seed)
                    taken = time.perf_counter() - began
                    after = processor_seconds(running)
                    if number < 0:
                        continue
                    into, tokens = found[name][streams], requests(streams) * arguments.tokens
                    into.tokens_per_s.append(tokens / taken)
                    into.first_token_ms.append(first)
                    for process, seconds in after.items():
                        spent = (seconds - before.get(process, 0.0)) / tokens * 1000.0
                        into.cpu_s_per_1k_tokens.setdefault(process, []).append(spent)
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    return found


async def first_tokens(
    session: aiohttp.ClientSession,
    running: dict[str, servers.Proxy],
    case: Case,
    streams: int,
    seed: int,
) -> float:
    """Median milliseconds until the first token is there: of answers that end with it."""
    return statistics.median(await round_of(session, running, case, streams, 1, seed + 500))


async def round_of(
    session: aiohttp.ClientSession,
    running: dict[str, servers.Proxy],
    case: Case,
    streams: int,
    tokens: int,
    seed: int,
) -> list[float]:
    """So many streams at once, of as many requests as it takes; milliseconds of each request."""
    url = running[case.server].url + "/v1/completions"

    async def request(index: int) -> float:
        body: dict[str, Any] = {
            **{"model": "policy", "prompt": f"What is {index} times {seed}?"},
            **{"max_tokens": tokens, "ignore_eos": True, "temperature": 1.0, "seed": seed + index},
        }
        if case.streams:
            body |= {"stream": True, "logprobs": 1, "stream_options": {"include_usage": True}}
            body["stream_options"]["continuous_usage_stats"] = True
        if case.gate:
            body["vllm_xargs"] = {"espo_gate": case.gate}
        began = time.perf_counter()
        async with session.post(url, json=body) as response:
            answer = await response.read()
            if response.status != 200 or (f'"completion_tokens":{tokens}').encode() not in answer:
                raise BenchmarkError(f"{case.what}: not {tokens} tokens: {answer[-400:]!r}")
        return (time.perf_counter() - began) * 1e3

    async def stream(first: int) -> list[float]:
        return [await request(index) for index in range(first, requests(streams), streams)]

    taken = await asyncio.gather(*map(stream, range(streams)))
    return [*itertools.chain.from_iterable(taken)]


def requests(streams: int) -> int:
    """Of a round: few streams have several each, or they would be over too soon to measure."""
    return streams * max(1, 4 // streams)


async def delivered_past_the_cut(url: str) -> int:
    """Tokens that clients get after the decision, of 64 requests that are all stopped."""

    async def request(session: aiohttp.ClientSession, index: int) -> int:
        order = {"espo_gate": SOON, "espo_record": 1}
        body = {
            **{"model": "policy", "prompt": "12+3=", "seed": index, "vllm_xargs": order},
            **{"max_tokens": 200, "ignore_eos": True, "return_token_ids": True},
        }
        async with session.post(url + "/v1/completions", json=body) as response:
            [choice] = (await response.json())["choices"]
        record = told_by(choice["stop_reason"])
        if record is None or record.cut is None:
            raise BenchmarkError(f"the engine has not stopped {choice!r:.300}")
        return len(choice["token_ids"]) - record.cut

    async with aiohttp.ClientSession() as session:
        return sum(await asyncio.gather(*(request(session, n) for n in range(64))))


def processor_seconds(running: dict[str, servers.Proxy]) -> dict[str, float]:
    """User and system time so far of every process, vLLM's engine with its workers apart from
    its server.
    """
    found: dict[str, float] = {}
    for name, proxy in running.items():
        for process in psutil.Process(proxy.process.pid).children(recursive=True):
            label = name
            if name in ("vllm", "headed"):
                engine = any(word in process.name() for word in ("EngineCor", "Worker"))
                label = "vllm engine" if engine else "vllm server"
            times = process.cpu_times()
            found[label] = found.get(label, 0.0) + times.user + times.system
    own = os.times()
    found["client"] = own.user + own.system
    return found


def told(found: Found) -> dict[str, Any]:
    """Medians, by case and streams; processor seconds by process beside their sum."""
    report: dict[str, Any] = {
        name: {} for name in ("tokens_per_s", "cpu_s_per_1k_tokens", "cpu_by_process")
    }
    report |= {"first_token_ms": {}, "of_plain": {}}
    for name, by_streams in found.items():
        for streams, measured in by_streams.items():
            cpu = {k: statistics.median(v) for k, v in measured.cpu_s_per_1k_tokens.items()}
            values = {
                "tokens_per_s": statistics.median(measured.tokens_per_s),
                # What the clients cost is no server's.
                "cpu_s_per_1k_tokens": sum(v for k, v in cpu.items() if k != "client"),
                "cpu_by_process": cpu,
                "first_token_ms": statistics.median(measured.first_token_ms),
                "of_plain": of_plain(found, name, streams),
            }
            for key, value in values.items():
                report[key].setdefault(name, {})[str(streams)] = value
    return report


def of_plain(found: Found, name: str, streams: int) -> float | None:
    """Tokens a second against `plain`'s of the same round, the median of the rounds."""
    if "plain" not in found:
        return None
    plain = found["plain"][streams].tokens_per_s
    mine = found[name][streams].tokens_per_s
    return statistics.median(a / b for a, b in zip(mine, plain, strict=True))


def show(model: str, found: Found, overshoot: int) -> None:
    """A table of one model."""
    hidden, layers = MODELS[model]
    what = "medians; processor seconds for 1,000 tokens by process"
    table = Table(title=f"{model} model ({hidden} × {layers}); {what}")
    for heading in ("case", "streams", "tokens/s", "of (a)", "first, ms"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    processes = ["vllm engine", "vllm server", "gateways", "client"]
    for process in processes:
        table.add_column(process.removeprefix("vllm "), justify="right")
    for name, by_streams in found.items():
        case = CASES[name]
        for streams, measured in by_streams.items():
            cpu = {k: statistics.median(v) for k, v in measured.cpu_s_per_1k_tokens.items()}
            cpu["gateways"] = sum(v for k, v in cpu.items() if k not in processes)
            ratio = of_plain(found, name, streams)
            table.add_row(
                f"({case.letter}) {name}",
                str(streams),
                f"{statistics.median(measured.tokens_per_s):,.0f}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{statistics.median(measured.first_token_ms):.1f}",
                *(f"{cpu.get(process, 0.0):.3f}" for process in processes),
            )
        table.add_section()
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    for name, target in TARGETS.items():
        if name in found and "plain" in found:
            most = max(found[name])
            ratio = of_plain(found, name, most)
            console.print(f"({CASES[name].letter}) at {most} streams: {ratio:.3f}, aim {target}")
    console.print(f"tokens delivered past the cut, of 64 stopped requests: {overshoot}")


if __name__ == "__main__":
    main()
