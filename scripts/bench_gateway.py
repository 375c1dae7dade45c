"""What a streamed, monitored token costs, beside other proxies, in one run.

Processor time (user and system, of a proxy's whole process tree) for each token, and the latency it
adds, of: a bare aiohttp pass-through, this gateway, nginx and LiteLLM. All carry the same tokens at
the same rate from one fake vLLM, in turns, in an order that changes from repetition to repetition.

  python scripts/bench_gateway.py --json result.json
  python scripts/bench_gateway.py --litellm-python /path/to/its/venv/bin/python --serve-vllm
  python scripts/bench_gateway.py --quick --only passthrough,gateway_stream --profile gateway.prof
"""

from __future__ import annotations

import argparse
import os
import pstats
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark import servers, throughput
from benchmark.arguments import count, positive
from benchmark.load import BenchmarkError, chat_request, run_round
from benchmark.report import Case, report_of, show
from espo_gateway import event_loop
from espo_gateway.supervisor import ServerStartError
from espo_rl.record.json_files import write_json
from espo_rl.record.output import OutputError, check_own, json_with

#: What is measured: through which server, and whether the client streams and asks for logprobs.
#: All but the gateway need to be asked for what the gateway asks for by itself.
CASES = {
    "direct": ("upstream", True, True),
    "passthrough": ("passthrough", True, True),
    "gateway_stream": ("gateway", True, False),
    "gateway_stream_logprobs": ("gateway", True, True),
    "gateway_no_stream": ("gateway", False, False),
    "nginx": ("nginx", True, True),
    "litellm": ("litellm", True, True),
}


def main() -> None:
    arguments = parse()
    try:
        if arguments.json:
            own = json_with("us_per_token", "repetitions")
            check_own(arguments.json, "--json", "report of this benchmark", own)
        report = event_loop.run(measure(arguments))
    except (BenchmarkError, OSError, OutputError, ServerStartError) as error:
        sys.exit(f"bench_gateway: {error}")
    show(report)
    if arguments.profile:
        pstats.Stats(str(arguments.profile)).sort_stats("tottime").print_stats(40)
    if arguments.json:
        write_json(arguments.json, report, indent=1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=count, default=32, help="at once (default: 32)")
    parser.add_argument("--tokens", type=count, default=600, help="of each stream (default: 600)")
    parser.add_argument(
        "--step-ms", type=positive, default=8.0, help="the fake engine's step (default: 8)"
    )
    parser.add_argument("--repetitions", type=count, default=7, help="of each (default: 7)")
    parser.add_argument("--quick", action="store_true", help="3 repetitions of 250 tokens")
    parser.add_argument("--only", metavar="A,B", help="of " + ", ".join(CASES))
    parser.add_argument(
        "--gate", type=Path, metavar="FILE", help=f"another gate than {servers.GATE}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    parser.add_argument(
        "--litellm-python",
        metavar="PATH",
        help="the Python of an environment that has litellm[proxy]; it is measured too",
    )
    parser.add_argument("--vllm", metavar="URL", help="a running vLLM, for the throughput")
    parser.add_argument("--model", metavar="NAME", help="what it serves")
    parser.add_argument(
        "--serve-vllm", action="store_true", help="or start one with a random model"
    )
    parser.add_argument(
        "--vllm-shape",
        type=int,
        nargs=2,
        metavar=("HIDDEN", "LAYERS"),
        default=(128, 2),
        help="of that model (default: 128 2, a tiny one)",
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="run the gateway under cProfile (slower)"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repetitions, arguments.tokens = 3, 250
    names = arguments.only.split(",") if arguments.only else list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--only: there is no {unknown[0]!r}, only {', '.join(CASES)}")
    if not arguments.litellm_python and "litellm" in names:
        names.remove("litellm")
    if not servers.nginx_binary() and "nginx" in names:
        names.remove("nginx")
    if not names:
        parser.error("--only: nginx must be installed, and litellm needs --litellm-python")
    if arguments.vllm and not arguments.model:
        parser.error("--vllm needs --model NAME")
    arguments.names = names
    return arguments


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases, and the report."""
    cases = {name: Case() for name in arguments.names}
    gate = arguments.gate.read_bytes() if arguments.gate else None
    load = os.getloadavg()
    ratio: throughput.Ratio | None = None
    with progress_bar() as progress:
        rounds = progress.add_task("starting", total=len(cases) * (arguments.repetitions + 1))
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            running = await start(stack, folder, arguments, gate)
            # The first of each is a warm-up and not counted.
            for repetition in range(-1, arguments.repetitions):
                turn = repetition % len(cases)
                for name in [*arguments.names[turn:], *arguments.names[:turn]]:
                    progress.update(rounds, description=name, refresh=True)
                    server, stream, logprobs = CASES[name]
                    tokens = arguments.tokens if repetition >= 0 else 50
                    before = running[server].processor_seconds()
                    result = await run_round(
                        running[server].url,
                        chat_request(tokens, stream=stream, logprobs=logprobs),
                        streams=arguments.streams,
                        spread=0.2,
                        seed=repetition,
                    )
                    spent = running[server].processor_seconds() - before
                    if repetition >= 0:
                        cases[name].take(result, spent)
                    progress.advance(rounds)
        if arguments.vllm or arguments.serve_vllm:
            ratio = await throughput.measure(
                arguments.vllm,
                arguments.model,
                gate,
                shape=arguments.vllm_shape,
                quick=arguments.quick,
                progress=progress,
            )
    return report_of(arguments, cases, ratio, load)


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), auto_refresh=False
    )


async def start(
    stack: AsyncExitStack, folder: Path, arguments: argparse.Namespace, gate: bytes | None
) -> dict[str, servers.Proxy]:
    """The servers that the cases need; stopped with the stack."""
    needed = {CASES[name][0] for name in arguments.names}
    upstream = await servers.start_upstream(folder, arguments.step_ms)
    stack.push_async_callback(upstream.process.stop)
    running = {"upstream": upstream}
    starting = {
        "passthrough": lambda: servers.start_passthrough(folder, upstream.url),
        "gateway": lambda: servers.start_gateway(folder, upstream.url, gate, arguments.profile),
        "nginx": lambda: servers.start_nginx(folder, upstream.url, servers.nginx_binary() or ""),
        "litellm": lambda: servers.start_litellm(folder, upstream.url, arguments.litellm_python),
    }
    for name, starter in starting.items():
        if name in needed:
            running[name] = await starter()
            stack.push_async_callback(running[name].process.stop)
    return running


if __name__ == "__main__":
    main()
