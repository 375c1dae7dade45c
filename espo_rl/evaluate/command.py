r"""Accuracy of a model on data sets: avg@k, pass@k and maj@k, with 95 % intervals over problems.

    python -m espo_rl.evaluate --model MODEL --data aime24.jsonl amc23.jsonl --k 32

Starts a vLLM server for the model, and the gateway in front of it. Every problem is written to the
output folder once all its samples are graded; the same command goes on where an earlier one
stopped, and asks again what failed. What follows `--` goes to vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer

from espo_gateway.errors import InvalidRequest
from espo_gateway.stop.gate_json import gate_from_json, gate_to_json
from espo_gateway.stop.rules import Gate
from espo_gateway.supervisor import ServerStartError
from espo_rl.config import Model, Recipe, RecipeError, RolloutSection, Servers, TaskSection
from espo_rl.evaluate.evaluator import evaluate
from espo_rl.evaluate.results import EvaluationError, Report, Sampling
from espo_rl.evaluate.results_folder import ResultsFolder
from espo_rl.evaluate.table import as_dict, table
from espo_rl.record.files import write_json
from espo_rl.record.progress import progress_bar
from espo_rl.record.provenance import machine, versions
from espo_rl.rollouts.collector import Collector, Prompter
from espo_rl.servers.fleet import open_fleet
from espo_rl.servers.server import ServerError
from espo_rl.tasks.dataset import Split
from espo_rl.tasks.grader_pool import GraderPool
from espo_rl.tasks.graders import make_answer_reader
from espo_rl.tasks.task import TaskError
from espo_rl.types import Problem

#: fields of the task that the results depend on; where the data lies is none of them
TASK_FIELDS = ("chat", "system", "template", "grader", "pattern", "answer_pattern")


class Command:
    """One command. What can be found wrong without a server is, when it is made.

    Raises:
        EvaluationError: naming the argument and the fix.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.gate = read_gate(options.gate)
        check_model(options.model)
        try:
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
            tokenizer = AutoTokenizer.from_pretrained(options.model)
        except ValidationError as error:
            raise EvaluationError("\n".join(map(explain, error.errors()))) from error
        except (OSError, ValueError) as error:
            raise EvaluationError(str(error)) from error
        if options.chat and tokenizer.chat_template is None:
            raise EvaluationError(
                f"--chat: the tokenizer of {options.model} has no chat template; give --plain"
            )
        self.prompter = Prompter(tokenizer, options.chat, options.system)
        try:
            self.grader = GraderPool(self.recipe.task)
        except RecipeError as error:
            raise EvaluationError(in_arguments(str(error))) from error
        self.problems = read_problems(self.recipe.task, options.data, options.limit)
        self.folder = ResultsFolder(options.out, self.settings())

    def settings(self) -> dict[str, Any]:
        """All that the results depend on, beside the problems, which stand in the results."""
        names = ["k", "temperature", "top_p", "max_tokens", "seed", "vllm_args"]
        gate = None if self.gate is None else json.loads(gate_to_json(self.gate))
        return {
            "model": self.options.model,
            "model_files": model_files(Path(self.options.model)),
            "dtype": self.recipe.model.dtype,
            **{name: getattr(self.options, name) for name in names},
            **{name: getattr(self.recipe.task, name) for name in TASK_FIELDS},
            "gate": gate,
            "audit": self.options.audit if gate else None,
        }

    async def run(self) -> bool:
        """Ask, grade, write, show; whether every sample could be graded."""
        recipe = self.recipe
        if self.options.url is None:
            self.say(f"starting the policy server with {recipe.model.path}, and the gateway")
        started = time.monotonic()
        async with (
            open_fleet(recipe, recipe.model.path, self.folder.path / "logs") as fleet,
            Collector(fleet.gateway_url, fleet.model, self.prompter, recipe.rollout) as asker,
            self.grader as grader,
        ):
            if self.gate is not None:
                await fleet.push_gate(self.gate)
            reports = {
                name: await self.evaluate(name, problems, asker, grader)
                for name, problems in self.problems.items()
            }
        return self.finish(reports, time.monotonic() - started)

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
                make_answer_reader(self.recipe.task),
                done=results.done,
                on_sample=lambda _: bar.advance(line),
                on_problem=results.append,
            )

    def finish(self, reports: dict[str, Report], seconds: float) -> bool:
        """Write results.json and show the table; whether nothing failed."""
        path = self.folder.path / "results.json"
        content = {
            "results": {name: as_dict(report) for name, report in reports.items()},
            "settings": self.folder.settings,
            "seconds": round(seconds, 1),  # of this command alone, when it resumed an earlier one
            "versions": versions(),
            "machine": machine(),
        }
        write_json(path, content)
        # Where the output is no terminal, rich would press the table into 80 columns.
        wide = Console(highlight=False, width=None if self.console.is_terminal else 200)
        wide.print(table(self.options.model, reports))
        self.say(f"results: {path}")
        errors = [error for report in reports.values() for error in report.errors]
        if errors:
            self.say(
                f"{len(errors)} samples failed and are counted nowhere; the same command asks them "
                f"again. The first: {errors[0]}"
            )
        return not errors

    def say(self, text: str) -> None:
        self.console.print(text)


def read_gate(path: Path | None) -> Gate | None:
    """Raises EvaluationError."""
    if path is None:
        return None
    try:
        return gate_from_json(path.read_bytes(), has_critic=False)
    except (OSError, InvalidRequest) as error:
        raise EvaluationError(f"--gate {path}: {error}") from error


def check_model(model: str) -> None:
    """Refuse what is meant as a folder and is none: offline the hub is asked for a minute."""
    path = Path(model)
    local = path.is_absolute() or len(path.parts) != 2 or path.parent.is_dir()
    if local and not path.is_dir():
        raise EvaluationError(
            f"--model: no folder {path}; give a Hugging Face checkpoint's folder or its name on "
            "the hub"
        )


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


def make_recipe(options: argparse.Namespace) -> Recipe:
    """The parts of a recipe that servers, collector and graders read."""
    dtype = options.dtype
    if dtype is None:
        trained_in = AutoConfig.from_pretrained(options.model).dtype
        dtype = "float32" if trained_in in (None, torch.float32) else "bfloat16"
    return Recipe(
        model=Model(path=options.model, dtype=dtype),
        task=TaskSection(
            kind="dataset",
            train=options.data[0],
            subset=options.subset,
            train_split=options.split,
            eval_split=options.split,
            problem_column=options.problem_column,
            answer_column=options.answer_column,
            **{name: getattr(options, name) for name in TASK_FIELDS},
        ),
        rollout=RolloutSection(max_tokens=options.max_tokens, concurrency=options.concurrency),
        servers=Servers(
            policy_urls=[options.url] if options.url else [],
            vllm_args=options.vllm_args,
        ),
    )


def explain(error: Any) -> str:
    where = "--" + str(error["loc"][-1]).replace("_", "-") + ": " if error["loc"] else ""
    return f"{where}{error['msg'].removeprefix('Value error, ')}"


def read_problems(
    task: TaskSection, data: Sequence[str], limit: int | None
) -> dict[str, list[Problem]]:
    """The problems of each data set in its order, under the name that its results have.

    Raises:
        EvaluationError: it cannot be read, lacks a column, or has the name of another.
    """
    problems: dict[str, list[Problem]] = {}
    for source in data:
        name = Path(source).stem
        if name in problems:
            raise EvaluationError(f"--data: two data sets are called {name}; evaluate one by one")
        try:
            split = Split.load(task.model_copy(update={"train": source, "eval": source}), "eval")
            problems[name] = [split.problem(row) for row in list(split.distinct().values())[:limit]]
        except TaskError as error:
            raise EvaluationError(in_arguments(str(error))) from error
    return problems


def in_arguments(message: str) -> str:
    """A message about a recipe's task in terms of this command."""

    def argument(key: re.Match[str]) -> str:
        name = key.group(1).removeprefix("eval_")
        return "--" + ("data" if name == "eval" else name.replace("_", "-"))

    return re.sub(r"task\.(\w+)", argument, message)


def parse(
    arguments: Sequence[str] | None = None,
    *,
    prog: str = "python -m espo_rl.evaluate",
    about: str | None = __doc__,
    defaults: Mapping[str, Any] | None = None,
) -> argparse.Namespace:
    """The command line. Exits with a message, code 2, when it makes no sense.

    prog, about, defaults: of a command that asks as this one does.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    task = TaskSection()
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint's folder or its name on the hub")
    add(
        "--data",
        required=True,
        nargs="+",
        help="JSONL, JSON, Parquet or CSV files, folders, or names on the hub",
    )
    add("--out", type=Path, metavar="FOLDER", help="(default: runs/evaluate-MODEL)")
    add("--k", type=int, default=32, help="samples of each problem (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N problems of each data set")
    asking = parser.add_argument_group(
        "sampling",
        "The defaults are what reasoning models are usually evaluated with (DeepSeek-R1, arXiv "
        "2501.12948); tokens as in ESPO's own training.",
    )
    add = asking.add_argument
    add("--temperature", type=float, default=0.6, help="(default: %(default)s)")
    add("--top-p", type=float, default=0.95, help="(default: %(default)s)")
    add("--max-tokens", type=int, default=8192, help="of one answer (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--concurrency", type=int, default=64, help="samples at a time (default: %(default)s)")
    problems = parser.add_argument_group("problems and answers")
    add = problems.add_argument
    add("--chat", action="store_true", default=True, help="ask by the chat template (default)")
    add("--plain", action="store_false", dest="chat", help="ask by the plain text")
    add("--system", help="system message")
    add(
        "--template",
        default=task.template,
        help="what is asked; usual is '{problem}\\n\\nPlease reason step by step, and put your "
        "final answer within \\boxed{}.' (default: the problem alone)",
    )
    add("--grader", default="math", help="math, exact, regex or package.module:function")
    add("--pattern", help="regex: group 1 of its last match is the answer given")
    add("--problem-column", default=task.problem_column, help="(default: %(default)s)")
    add("--answer-column", default=task.answer_column, help="(default: %(default)s)")
    add("--answer-pattern", help="group 1 of its last match in there: '#### (.*)' for GSM8K's own")
    add("--subset", help="of a data set on the hub")
    add("--split", default=task.eval_split, help="of it (default: %(default)s)")
    stopping = parser.add_argument_group("early stopping")
    add = stopping.add_argument
    add(
        "--gate",
        type=Path,
        metavar="FILE",
        help="stop samples by this gate, given as JSON; a stopped one counts as wrong",
    )
    add(
        "--audit",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of the samples are generated to their end although stopped, to know what stopping "
        "saves and costs; 1 for exact numbers (default: %(default)s)",
    )
    server = parser.add_argument_group("server")
    add = server.add_argument
    add("--url", help="a running vLLM server of the model, http://host:port, instead of a new one")
    add("--dtype", choices=("float32", "bfloat16"), help="(default: float32 if the model is)")
    add("vllm_args", nargs="*", metavar="-- VLLM ARGUMENTS", help="for the server that is started")
    parser.set_defaults(**(defaults or {}))
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error("--limit must be at least 1")
    if options.vllm_args and (options.url or not options.vllm_args[0].startswith("-")):
        parser.error(f"unexpected arguments: {' '.join(options.vllm_args)}")
    options.model = options.model.rstrip("/")
    options.out = (
        options.out or Path("runs") / f"{prog.rpartition('.')[2]}-{Path(options.model).name}"
    )
    return options


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


def main() -> int:
    """The command line; its exit code is that of `run_command`."""
    return run_command(lambda: Command(parse()))
