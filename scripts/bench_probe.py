"""What a question to an answer probe costs, in sampled tokens: `espo_rl.replay --price`.

    python scripts/bench_probe.py --model MODEL --data problems.jsonl --every 96

Starts a vLLM server and the gateway and samples the same rollouts with questions and without, in
turns; a question costs the time that it adds, in tokens that are sampled in that time. Measure on a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import Schedule
from espo_gateway.supervisor import ServerStartError
from espo_rl.config import Model, Recipe, RolloutSection, Servers, Stopping, TaskSection
from espo_rl.evaluate.arguments import read_problems
from espo_rl.evaluate.results import EvaluationError
from espo_rl.record.json_files import write_json
from espo_rl.record.output import OutputError, check_own, json_with
from espo_rl.record.progress import progress_bar
from espo_rl.rollouts.collector import Collector, ProbePhrase, Prompter
from espo_rl.servers.fleet import open_fleet
from espo_rl.servers.server import ServerError
from espo_rl.types import EndReason, Request


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint's folder or its name on the hub")
    add("--data", required=True, help="problems with answers, as for espo_rl.collect")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--system", help="a system prompt, for models with a chat template")
    add("--every", type=int, default=96, metavar="TOKENS", help="between questions (%(default)s)")
    add("--rollouts", type=int, default=128, help="in a round (%(default)s)")
    add("--streams", type=int, default=64, help="at a time (%(default)s)")
    add("--max-tokens", type=int, default=400)
    add("--rounds", type=int, default=3, help="of each kind (%(default)s)")
    add("--vllm-args", nargs="*", default=[])
    add("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    options = parser.parse_args()
    for name in ("every", "rollouts", "streams", "max_tokens", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a round: its seconds, tokens and questions; the first two rounds are a warm-up."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"--model: {error}") from error
    recipe = Recipe(
        model=Model(path=options.model, dtype=options.dtype),
        task=TaskSection(
            kind="dataset",
            train=options.data,
            system=options.system,
            chat=tokenizer.chat_template is not None,
        ),
        rollout=RolloutSection(max_tokens=options.max_tokens, concurrency=options.streams),
        servers=Servers(vllm_args=options.vllm_args),
    )
    [problems] = read_problems(recipe.task, [options.data], None).values()
    requests = [
        Request(problems[number % len(problems)], seed=number) for number in range(options.rollouts)
    ]
    asking = Gate(schedule=Schedule(every=options.every, growth=0.0))
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-probe-") as folder, progress_bar() as bar:
        line = bar.add_task("starting", total=2 * (options.rounds + 1))
        async with (
            open_fleet(recipe, options.model, Path(folder), probes=True) as fleet,
            Collector(
                fleet.gateway_url,
                fleet.model,
                Prompter.of(tokenizer, recipe.task),
                recipe.rollout,
                probe=ProbePhrase.of(tokenizer, Stopping()),
            ) as collector,
        ):
            for turn in range(-1, options.rounds):
                for asks in (False, True)[:: -1 if turn % 2 else 1]:
                    bar.update(line, description="with questions" if asks else "without")
                    await fleet.push_gate(asking if asks else Gate())
                    began = time.monotonic()
                    rollouts = await collector.collect(requests, temperature=1.0)
                    seconds = time.monotonic() - began
                    bar.advance(line)
                    failed = [one for one in rollouts if one.end is EndReason.ERROR]
                    if failed:
                        raise SystemExit(f"{len(failed)} rollouts failed: {failed[0].error}")
                    if turn >= 0:
                        rows.append(
                            {
                                "asks": asks,
                                "seconds": seconds,
                                "tokens": sum(len(one.token_ids) for one in rollouts),
                                "questions": sum(len(one.probes) for one in rollouts),
                            }
                        )
    return rows


def prices(rows: list[dict[str, Any]]) -> list[float]:
    """Of each pair of rounds, in sampled tokens.

    Rollouts of one seed may differ, as batches round differently; so it is seconds a token.
    """
    found = []
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        plain, asking = (other, one) if one["asks"] else (one, other)
        token = plain["seconds"] / plain["tokens"]
        added = asking["seconds"] - token * asking["tokens"]
        found.append(added / max(asking["questions"], 1) / token)
    return found


def main() -> None:
    options = parse()
    if options.json:
        try:
            own = json_with("price", "rounds")
            check_own(options.json, "--json", "report of this benchmark", own)
        except OutputError as error:
            raise SystemExit(f"bench_probe: {error}") from error
    try:
        rows = asyncio.run(measure(options))
    except (EvaluationError, ServerError, ServerStartError) as error:
        raise SystemExit(f"bench_probe: {error}") from error
    found = prices(rows)
    table = Table("", "seconds", "tokens", "tokens/s", "questions")
    for row in rows:
        speed = row["tokens"] / row["seconds"]
        name = "with questions" if row["asks"] else "without"
        numbers = f"{row['seconds']:.1f}", f"{row['tokens']:,}", f"{speed:.1f}"
        table.add_row(name, *numbers, str(row["questions"]))
    console = Console()
    console.print(table)
    each = ", ".join(f"{price:.1f}" for price in found)
    console.print(f"a question costs {np.mean(found):.1f} sampled tokens (by round: {each})")
    if options.json:
        write_json(options.json, {"price": found, "rounds": rows}, indent=1)


if __name__ == "__main__":
    main()
