"""The work of `espo_rl.evaluate`: from its options to results in a folder."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoTokenizer

from espo_gateway.stop.gate_json import gate_to_dict
from espo_gateway.supervisor import ServerStartError
from espo_rl.config import RecipeError, Stopping, TaskSection, check_model_folder
from espo_rl.evaluate.arguments import (
    LATER_FIELDS,
    TASK_FIELDS,
    cannot_load,
    explain,
    in_arguments,
    make_recipe,
    read_gate,
    read_problems,
)
from espo_rl.evaluate.evaluator import evaluate
from espo_rl.evaluate.results import EvaluationError, Report, Sampling
from espo_rl.evaluate.results_folder import ResultsFolder
from espo_rl.evaluate.table import as_dict, table
from espo_rl.record.progress import progress_bar
from espo_rl.record.provenance import machine, versions
from espo_rl.rollouts.chat_template import check_chat_template
from espo_rl.rollouts.collector import Collector, ProbePhrase, Prompter
from espo_rl.servers.fleet import Fleet, open_fleet
from espo_rl.servers.server import ServerError, answers
from espo_rl.tasks.grader_pool import GraderPool
from espo_rl.types import Problem


class Command:
    """One command. What can be found wrong without a server is, when it is made.

    Raises:
        EvaluationError: naming the argument and the fix.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.gate = read_gate(options.gate)
        try:
            check_model_folder("--model", options.model)
            self.sampling = Sampling(
                k=options.k,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed,
                concurrency=options.concurrency,
                gated=self.gate is not None,
                audit=options.audit,
            )
            self.recipe = make_recipe(options)
        except ValidationError as error:
            raise EvaluationError("\n".join(map(explain, error.errors()))) from error
        except ValueError as error:
            raise EvaluationError(in_arguments(str(error))) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(options.model)
        except (OSError, ValueError) as error:
            raise cannot_load(options.model, error) from error
        self.prompter = Prompter.of(tokenizer, self.recipe.task)
        try:
            check_chat_template(tokenizer, self.recipe.task, options.model)
            self.grader = GraderPool(self.recipe.task)
        except RecipeError as error:
            raise EvaluationError(in_arguments(str(error))) from error
        self.problems = read_problems(self.recipe.task, options.data, options.limit)
        for name, problems in self.problems.items():
            for number, problem in enumerate(problems, 1):
                try:
                    self.prompter(problem)
                except Exception as error:  # a template's or a tokenizer's may be any
                    raise EvaluationError(
                        f"--data: no prompt can be made of problem {number} of {name} "
                        f"({type(error).__name__}: {error}); mend its text, or give another "
                        "--system, or --plain"
                    ) from error
        self.folder = ResultsFolder(options.out, self.settings())

    def settings(self) -> dict[str, Any]:
        """All that the results depend on, beside the problems, which stand in the results."""
        task, usual = self.recipe.task, TaskSection()
        later = {name: getattr(task, name) for name in LATER_FIELDS}
        names = ["k", "temperature", "top_p", "max_tokens", "seed", "vllm_args"]
        gate = None if self.gate is None else gate_to_dict(self.gate)
        return {
            "model": self.options.model,
            "model_files": model_files(Path(self.options.model)),
            "dtype": self.recipe.model.dtype,
            **{name: getattr(self.options, name) for name in names},
            **{name: getattr(task, name) for name in TASK_FIELDS},
            **{name: value for name, value in later.items() if value != getattr(usual, name)},
            "gate": gate,
            "audit": self.options.audit if gate else None,
        }

    async def run(self) -> bool:
        """Ask, grade, write, show; whether every sample could be graded."""
        recipe = self.recipe
        if url := self.options.url:
            if not await answers(f"{url.rstrip('/')}/health"):
                raise EvaluationError(
                    f"--url: nothing answers at {url}/health; start the server, or leave --url out"
                )
        else:
            self.say(f"starting the policy server with {recipe.model.path}, and the gateway")
        started = time.monotonic()
        async with (
            open_fleet(
                recipe, recipe.model.path, self.folder.path / "logs", probes=self.probes
            ) as fleet,
            self.collector(fleet) as asker,
            self.grader as grader,
        ):
            if self.gate is not None:
                await fleet.push_gate(self.gate)
            reports = {
                name: await fleet.watched(self.evaluate(name, problems, asker, grader))
                for name, problems in self.problems.items()
            }
        return self.finish(reports, time.monotonic() - started)

    def collector(self, fleet: Fleet) -> Collector:
        """What asks."""
        phrase = ProbePhrase.of(self.prompter.tokenizer, Stopping()) if self.probes else None
        rollout = self.recipe.rollout
        return Collector(fleet.gateway_url, fleet.model, self.prompter, rollout, probe=phrase)

    @property
    def probes(self) -> bool:
        """Whether the policy is asked along each sample how likely the answer is."""
        return self.gate is not None and "probe" in self.gate.asks

    async def evaluate(
        self, name: str, problems: Sequence[Problem], collector: Collector, grader: GraderPool
    ) -> Report:
        """One data set, with a progress bar over its samples."""
        with self.folder.results(name, problems) as results, progress_bar() as bar:
            total = len(problems) * self.sampling.k
            there = sum(
                not sample.error for result in results.done.values() for sample in result.samples
            )
            if there:
                self.say(f"{name}: {there} of {total} samples are there already")
            line = bar.add_task(name, total=total, completed=there)
            return await evaluate(
                collector,
                grader,
                problems,
                self.sampling,
                grader.read if grader.reads else None,
                done=results.done,
                on_sample=lambda _: bar.advance(line),
                on_problem=results.append,
            )

    def finish(self, reports: dict[str, Report], seconds: float) -> bool:
        """Write results.json and show the table; whether nothing failed."""
        about = {
            "seconds": round(seconds, 1),  # of this command alone, when it resumed an earlier one
            "versions": versions(),
            "machine": machine(),
        }
        results = {name: as_dict(report) for name, report in reports.items()}
        fewer = self.folder.write(results, about)
        # Where the output is no terminal, rich would press the table into 80 columns.
        wide = Console(highlight=False, width=None if self.console.is_terminal else 200)
        wide.print(table(self.options.model, reports))
        for line in (*fewer, f"results: {self.folder.path / 'results.json'}"):
            self.say(line)
        errors = [error for report in reports.values() for error in report.errors]
        if errors:
            self.say(
                f"{len(errors)} samples failed and are counted nowhere; the same command asks them "
                f"again. The first: {errors[0]}"
            )
        return not errors

    def say(self, text: str) -> None:
        self.console.print(text)


def model_files(path: Path) -> str | None:
    """A digest of a checkpoint's files, their sizes and times: another one when it is trained on.

    None for a model on the hub.
    """
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".bin", ".json"):
            state = file.stat()
            digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def run_command(make: Callable[[], Command]) -> int:
    """Make a command and run it; what its process exits with.

    0 on success, 2 on arguments that cannot work, 1 on a fault or when samples failed.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # As Ctrl-C: unwinds the stack, which stops the servers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            command = make()
        except EvaluationError as error:
            print(f"espo: {error}", file=sys.stderr)
            return 2
        return 0 if asyncio.run(command.run()) else 1
    except (EvaluationError, ServerError, ServerStartError, OSError) as error:
        print(f"espo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("espo: interrupted; the same command goes on", file=sys.stderr)
        return 130
