"""The command line of an evaluation, and what it names: gate, model, recipe, problems.

Whatever is wrong with an argument is said here, before anything starts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from espo_gateway.errors import InvalidRequest
from espo_gateway.stop.gate_json import gate_from_json
from espo_gateway.stop.rules import Gate
from espo_rl.config import Model, Recipe, RolloutSection, Servers, TaskSection
from espo_rl.evaluate.results import EvaluationError
from espo_rl.tasks.dataset import Split
from espo_rl.tasks.gym import GymTask
from espo_rl.tasks.task import TaskError
from espo_rl.types import Problem

#: fields of the task that the results depend on; where the data lies is none of them
TASK_FIELDS = ("chat", "system", "template", "grader", "pattern", "answer_pattern")
#: more of them; told only where given, so that what was begun before there were any goes on
LATER_FIELDS = ("chat_template_kwargs", "thought_tags", "answer_tags")

SAMPLING = (
    "The defaults are what reasoning models are usually evaluated with (DeepSeek-R1, arXiv "
    "2501.12948); tokens as in ESPO's own training."
)


def parse(
    arguments: Sequence[str] | None = None,
    *,
    prog: str = "python -m espo_rl.evaluate",
    about: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    sampling: str = SAMPLING,
) -> argparse.Namespace:
    """The command line. Exits with a message, code 2, when it makes no sense.

    prog, about, defaults: of a command that asks as this one does; one whose defaults say what gate
        there is takes none. more: adds its own arguments. sampling: why its defaults are what they
        are.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    more(parser)
    task = TaskSection()
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint's folder or its name on the hub")
    add(
        "--data",
        required=True,
        nargs="+",
        help="JSONL, JSON, Parquet or CSV files, folders, names on the hub, or reasoning-gym:NAME, "
        "of which --limit says how many",
    )
    kind = prog.rpartition(".")[2]
    add("--out", type=Path, metavar="FOLDER", help=f"(default: runs/{kind}-MODEL)")
    usual_k = (defaults or {}).get("k", 32)
    add("--k", type=int, help=f"samples of each problem (default: {usual_k}; 1 if they are greedy)")
    add("--limit", type=int, metavar="N", help="only the first N problems of each data set")
    asking = parser.add_argument_group("sampling", sampling)
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
        "--chat-template-kwargs",
        type=_variables,
        default={},
        metavar="JSON",
        help="variables of the chat template: '{\"enable_thinking\": false}' for Qwen3's",
    )
    add(
        "--template",
        default=task.template,
        help="what is asked; usual is '{problem}\\n\\nPlease reason step by step, and put your "
        "final answer within \\boxed{}.' (default: the problem alone)",
    )
    add(
        "--grader",
        default="math",
        help="math, exact, regex, task (reasoning-gym's own, of one data set) or "
        "package.module:function (default: %(default)s)",
    )
    add("--pattern", help="regex: group 1 of its last match is the answer given")
    for name, what in (
        ("thought", "thoughts, which built-in graders do not read"),
        ("answer", "answers: of a text with such tags the last one alone is graded"),
    ):
        usual = getattr(task, f"{name}_tags")
        add(
            f"--{name}-tags",
            nargs="*",
            action=_Pairs,
            default=usual,
            metavar="TAG",
            help=f"OPEN CLOSE, or several such pairs, or none: the tags of {what} "
            f"(default: {' '.join(chain(*usual))})",
        )
    add("--problem-column", default=task.problem_column, help="(default: %(default)s)")
    add("--answer-column", default=task.answer_column, help="(default: %(default)s)")
    add("--answer-pattern", help="group 1 of its last match in there: '#### (.*)' for GSM8K's own")
    add("--subset", help="of a data set on the hub")
    add("--split", default=task.eval_split, help="of it (default: %(default)s)")
    if "gate" not in (defaults or {}):
        _stopping(parser)
    server = parser.add_argument_group("server")
    add = server.add_argument
    add("--url", help="a running vLLM server of the model, http://host:port, instead of a new one")
    add("--dtype", choices=("float32", "bfloat16"), help="(default: float32 if the model is)")
    add(
        "--timeout",
        type=float,
        default=3600.0,
        help="seconds that one answer may take, the wait for others included (default: 3600)",
    )
    add("vllm_args", nargs="*", metavar="-- VLLM ARGUMENTS", help="for the server that is started")
    parser.set_defaults(**{**(defaults or {}), "k": None})
    options = parser.parse_args(arguments)
    if options.k is None:
        options.k = usual_k if options.temperature else 1
    if options.limit is not None and options.limit < 1:
        parser.error("--limit must be at least 1")
    if options.vllm_args and (options.url or not options.vllm_args[0].startswith("-")):
        parser.error(f"unexpected arguments: {' '.join(options.vllm_args)}")
    gym = [gym_name(source) is not None for source in options.data]
    of_a_file = ("problem_column", "answer_column", "answer_pattern", "subset", "split")
    for given, what in (
        *(
            (
                all(gym) and getattr(options, name) != parser.get_default(name),
                f"--{name.replace('_', '-')} has no effect with reasoning-gym's problems",
            )
            for name in of_a_file
        ),
        (
            options.subset
            and all(
                of or Path(source).is_file() for of, source in zip(gym, options.data, strict=True)
            ),
            "--subset has no effect with a file",
        ),
        (options.system and not options.chat, "--system has no effect with --plain"),
        (
            options.k > 1 and not options.temperature,
            "--k above 1 asks for the same answers again at --temperature 0",
        ),
        (
            options.pattern and options.grader != "regex",
            f"--pattern has no effect with --grader {options.grader}",
        ),
        (
            options.answer_tags != task.answer_tags and ":" in options.grader,
            "--answer-tags has no effect with a grader of your own, which gets the whole text",
        ),
        (
            # One out of bounds is named with them.
            options.gate is None and options.audit is not None and 0.0 <= options.audit <= 1.0,
            "--audit has no effect without --gate",
        ),
        (
            options.dtype and options.url,
            "--dtype has no effect with --url: the server has its own",
        ),
    ):
        if given:
            parser.error(f"{what}; leave it out")
    options.audit = 0.1 if options.audit is None else options.audit
    options.model = options.model.rstrip("/")
    options.out = options.out or Path("runs") / f"{kind}-{Path(options.model).name}"
    return options


def _stopping(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("early stopping").add_argument
    add(
        "--gate",
        type=Path,
        metavar="FILE",
        help="stop samples by this gate, given as JSON; a stopped one counts as wrong",
    )
    add(
        "--audit",
        type=float,
        metavar="SHARE",
        help="of the samples are generated to their end although stopped, to know what stopping "
        "saves and costs; 1 for exact numbers (default: 0.1)",
    )


class _Pairs(argparse.Action):
    """Words as pairs, in the place of the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if len(values) % 2:
            raise argparse.ArgumentError(self, "must be OPEN CLOSE, or several such pairs")
        setattr(namespace, self.dest, list(zip(values[::2], values[1::2], strict=True)))


def _variables(text: str) -> dict[str, Any]:
    """Of a chat template."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no JSON object; write it like '{{\"enable_thinking\": false}}'"
        )
    return found


def read_gate(path: Path | None) -> Gate | None:
    """Raises EvaluationError."""
    if path is None:
        return None
    try:
        gate = gate_from_json(path.read_bytes(), has_critic=False)
    except (OSError, InvalidRequest) as error:
        raise EvaluationError(f"--gate {path}: {error}") from error
    if gate.needs_estimator and gate.estimator and "history" in gate.estimator.sources:
        raise EvaluationError(
            f"--gate {path}: its estimate reads how often a problem was solved in earlier steps "
            "(history), and here there are none; take one that does not"
        )
    return gate


def make_recipe(options: argparse.Namespace) -> Recipe:
    """The parts of a recipe that servers, collector and graders read."""
    dtype = options.dtype
    if dtype is None:
        import torch
        from transformers import AutoConfig

        try:
            trained_in = AutoConfig.from_pretrained(options.model).dtype
        except (OSError, ValueError) as error:
            raise cannot_load(options.model, error) from error
        dtype = "float32" if trained_in in (None, torch.float32) else "bfloat16"
    [source, *others] = options.data
    gym = None if others else gym_name(source)
    return Recipe(
        model=Model(path=options.model, dtype=dtype),
        task=TaskSection(
            kind="dataset" if gym is None else "reasoning-gym",
            name=gym,
            train=source,
            subset=options.subset,
            train_split=options.split,
            eval_split=options.split,
            problem_column=options.problem_column,
            answer_column=options.answer_column,
            **{name: getattr(options, name) for name in (*TASK_FIELDS, *LATER_FIELDS)},
        ),
        rollout=RolloutSection(
            max_tokens=options.max_tokens,
            concurrency=options.concurrency,
            timeout=options.timeout,
        ),
        servers=Servers(
            policy_urls=[options.url] if options.url else [],
            vllm_args=options.vllm_args,
        ),
    )


def asked_as(recipe: Recipe) -> list[str]:
    """The arguments by which the problems of a recipe's evaluation are asked as the recipe asks
    them; none where the command has no such problems."""
    task, usual = recipe.task, TaskSection()
    given: dict[str, Any] = {name: getattr(task, name) for name in ("system", "template")}
    if task.kind == "reasoning-gym" and not task.options:
        words = ["--data", f"reasoning-gym:{task.name}", "--limit", str(recipe.evaluation.problems)]
    elif task.kind == "dataset" and task.eval:  # else some of what it trains on is held out
        words = ["--data", task.eval]
        keys = ["problem_column", "answer_column", "answer_pattern"]
        if not Path(task.eval).is_file():
            keys += ["subset"] if task.eval == task.train or task.eval_subset else []
            given["split"] = task.eval_split
        for key in keys:
            given[key] = getattr(task, f"eval_{key}") or getattr(task, key)
    else:
        return []
    if task.grader == "regex":
        given["pattern"] = task.pattern
    defaults = usual.model_dump() | {"split": usual.eval_split}
    words += ["--grader", task.grader, "--max-tokens", str(recipe.rollout.max_tokens)]
    words += [f"{_flag(key)}={value}" for key, value in given.items() if value != defaults[key]]
    for key in ("thought_tags", "answer_tags"):
        if (tags := getattr(task, key)) != defaults[key]:
            words += [_flag(key), *chain(*tags)]
    if task.chat_template_kwargs:
        words.append(f"--chat-template-kwargs={json.dumps(task.chat_template_kwargs)}")
    return words if task.chat else [*words, "--plain"]


def explain(error: Any) -> str:
    key = next((str(part) for part in error["loc"] if not isinstance(part, int)), "")
    message = error["msg"].removeprefix("Value error, ")
    return f"{_flag(key)}: {message}" if key else in_arguments(message)


def cannot_load(model: str, error: Exception) -> EvaluationError:
    return EvaluationError(f"--model: {model} cannot be loaded: {error}")


def gym_name(source: str) -> str | None:
    """The data set of reasoning-gym that --data names; None: it is none of its."""
    kind, colon, name = source.partition(":")
    return name if colon and kind == "reasoning-gym" else None


def read_problems(
    task: TaskSection, data: Sequence[str], limit: int | None
) -> dict[str, list[Problem]]:
    """The problems of each data set in its order, under the name that its results have.

    Raises:
        EvaluationError: it cannot be read, lacks a column, has the name of another, or is endless.
    """
    problems: dict[str, list[Problem]] = {}
    for source in data:
        gym = gym_name(source)
        name = gym or Path(source).stem
        if name in problems:
            raise EvaluationError(f"--data: two data sets are called {name}; evaluate one by one")
        try:
            if gym is None:
                names = {"kind": "dataset", "train": source, "eval": source}
                split = Split.load(task.model_copy(update=names), "eval")
                rows = list(split.distinct().values())[:limit]
                problems[name] = [split.problem(row) for row in rows]
            elif limit is None:
                raise EvaluationError(f"--data {source} is endless: say how many with --limit")
            else:
                names = {"kind": "reasoning-gym", "name": gym}
                problems[name] = list(GymTask(task.model_copy(update=names)).held_out(limit))
        except TaskError as error:
            raise EvaluationError(in_arguments(str(error))) from error
    return problems


def in_arguments(message: str) -> str:
    """A message about a recipe's task, or one that begins with a setting, in terms of this
    command."""
    message = message.replace("set task.chat = false", "give --plain")
    message = re.sub(r"task\.(\w+)", lambda key: _flag(key[1]), message)
    return re.sub(r"^[a-z_]+(?= (=|must|needs) )", lambda key: _flag(key[0]), message)


def _flag(key: str) -> str:
    """The argument that a recipe's key is given by."""
    key = key.removeprefix("eval_")
    name = {"policy_urls": "url", "eval": "data", "name": "data"}.get(key, key)
    return "--" + name.replace("_", "-")
