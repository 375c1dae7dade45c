"""Tasks: where problems come from, and in what order. Grading is in `rewards.py`.

Whatever the kind, no problem kept for evaluation is ever trained on: tasks compare what is asked,
not where it came from.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Protocol

from espo_rl.config import TaskSection
from espo_rl.types import Problem

log = logging.getLogger(__name__)


class TaskError(ValueError):
    """The problems cannot be had; the message names the recipe's key at fault and what there is."""


class Task(Protocol):
    """A source of problems. The held-out ones never appear among the training ones."""

    def training(self, seed: int) -> Iterator[Problem]:
        """An endless stream of training problems, the same for the same seed."""

    def held_out(self, count: int) -> Sequence[Problem]:
        """The first `count` problems kept for evaluation, always the same ones."""


@dataclass(frozen=True)
class Arithmetic:
    """Additive sequences modulo 10, every step written out: few steps are easy, many are hopeless.

    `358c`: start from 3, 5, 8; in each of the steps c, b, a add the last number and the third last;
    give the three that stand last. The answer is written `c3+8=1b5+1=6a8+6=4#164`. A step can be
    undone, so a wrong digit never leads back to the right three: a trajectory fails at a definite
    token, which is what early stopping is to find.
    """

    min_steps: int = 2
    max_steps: int = 24
    template: str = "{problem}"
    steps: Sequence[int] | None = None

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem; the number of steps is one of `steps`, or uniform in
        [min_steps, max_steps]."""
        steps = rng.choice(self.steps or range(self.min_steps, self.max_steps + 1))
        text = f"{rng.randrange(1000):03d}{ascii_lowercase[steps - 1]}"
        answer = self.solution(text).rpartition("#")[2]
        return Problem(id=text, prompt=_prompt(self.template, text), answer=answer)

    def solution(
        self,
        text: str,
        slip: Callable[[int, int], int] | None = None,
        swap: Callable[[], bool] | None = None,
    ) -> str:
        """The written-out solution.

        Args:
            swap: whether a sum's digits change places, which changes nothing.
            slip: by how much the sum of two digits is missed, 0 for not at all. A wrong result is
                carried on, as a model would: what follows is consistent with it.
        """
        numbers, steps = [int(digit) for digit in text[:3]], []
        for label in reversed(ascii_lowercase[: ascii_lowercase.index(text[3]) + 1]):
            oldest, newest = numbers[-3], numbers[-1]
            result = (oldest + newest) % 10
            if slip is not None:
                result = (result + slip(oldest, newest)) % 10
            sum_of = (newest, oldest) if swap is not None and swap() else (oldest, newest)
            steps.append(f"{label}{sum_of[0]}+{sum_of[1]}={result}")
            numbers.append(result)
        return "".join(steps) + "#" + "".join(map(str, numbers[-3:]))

    def training(self, seed: int) -> Iterator[Problem]:
        rng = random.Random(seed)
        held_out = {problem.id for problem in self.held_out(1024)}
        while True:
            problem = self.problem(rng)
            if problem.id not in held_out:
                yield problem

    def held_out(self, count: int) -> Sequence[Problem]:
        rng = random.Random("held-out")
        return [self.problem(rng) for _ in range(count)]


class DatasetTask:
    """Problems of a Hugging Face data set: a local file, a folder, or a name on the hub.

    All is read and every row checked when the task is made. A problem that repeats counts once,
    with its first answer. Without an evaluation set a tenth of the problems, drawn once and for
    all, is held out; with one, training leaves out the problems that stand in it as well. Training
    shuffles anew every epoch.

    Raises:
        TaskError: no such file, data set, subset, split or column; a row without problem or answer.
    """

    def __init__(self, config: TaskSection) -> None:
        self._train = self._eval = Split.load(config, "train")
        train, fixed = self._train.distinct(), random.Random("held-out")
        if config.eval is None:
            held_out = dict(fixed.sample(list(train.items()), len(train) // 10))
        else:
            self._eval = Split.load(config, "eval")
            held_out = self._eval.distinct()
            if shared := len(train.keys() & held_out.keys()):
                log.warning(
                    f"{shared} of {len(train)} training problems are in the evaluation set too: "
                    "they are not trained on"
                )
        self._held_out = fixed.sample(list(held_out.values()), len(held_out))
        self._training = [row for text, row in train.items() if text not in held_out]
        if not self._training:
            raise TaskError("task.eval holds every problem of task.train: none is left to train on")

    def training(self, seed: int) -> Iterator[Problem]:
        rng = random.Random(seed)
        while True:
            yield from map(self._train.problem, rng.sample(self._training, len(self._training)))

    def held_out(self, count: int) -> Sequence[Problem]:
        return [self._eval.problem(row) for row in self._held_out[:count]]


@dataclass(frozen=True)
class Split:
    """Rows with a problem and an answer; memory-mapped, so problems are made when asked for."""

    name: str
    rows: Any  # a datasets.Dataset
    columns: Mapping[str, str]  # by the key that names them: the problem's, then the answer's
    pattern: tuple[str, str | None]  # that finds the answer in its column, after its key
    template: str

    @classmethod
    def load(cls, config: TaskSection, part: str) -> Split:
        """The recipe's `train` or `eval`."""
        source, split = getattr(config, part), getattr(config, f"{part}_split")
        keys, subset = ["problem_column", "answer_column", "answer_pattern"], config.subset
        if part == "eval":
            keys = [f"eval_{key}" if getattr(config, f"eval_{key}") else key for key in keys]
            subset = config.eval_subset or (subset if source == config.train else None)
        *columns, pattern = ((key, getattr(config, key)) for key in keys)
        rows = _load(part, source, split, subset, dict(columns))
        name = f"{Path(source).name}/{split}"
        return cls(name, rows, dict(columns), pattern, config.template)

    def distinct(self) -> dict[str, int]:
        """The number of each problem's first row, by its text with white space made even."""
        there = self.rows.column_names
        tops = [c if c in there else c.partition(".")[0] for c in self.columns.values()]
        # Only what is needed: the other columns may hold much.
        needed = [column for column in there if column in tops] or there
        rows: dict[str, int] = {}
        for number, row in enumerate(self.rows.select_columns(needed)):
            rows.setdefault(" ".join(self._read(row, number)[0].split()), number)
        return rows

    def problem(self, number: int) -> Problem:
        """The problem of a row, which it keeps as its `extra`."""
        row = self.rows[number]
        text, answer = self._read(row, number)
        return Problem(f"{self.name}:{number}", _prompt(self.template, text), answer, extra=row)

    def _read(self, row: Mapping[str, Any], number: int) -> tuple[str, str]:
        """Text and answer of a row."""
        text, answer = (self._cell(row, number, key) for key in self.columns)
        key, pattern = self.pattern
        if pattern is not None:
            matches = list(re.finditer(pattern, answer))
            if not matches or not (found := (matches[-1].group(1) or "").strip()):
                raise TaskError(
                    f"task.{key} = {pattern!r} finds nothing in row {number + 1} of {self.name}: "
                    f"{answer[-80:]!r}"
                )
            answer = found
        return text, answer

    def _cell(self, row: Mapping[str, Any], number: int, key: str) -> str:
        column = self.columns[key]
        value: Any = row
        # A name with dots may also be just a name.
        for name in [column] if column in row else column.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, list):  # a chat
            said = [turn for turn in value if isinstance(turn, Mapping)]
            value = next(
                (t.get("content") for t in reversed(said) if t.get("role") == "user"), None
            )
        if not isinstance(value, str | int | float) or not (text := str(value).strip()):
            there = ", ".join(self.rows.features.flatten())
            raise TaskError(
                f"task.{key} = {column!r}: no text or number there in row {number + 1} of "
                f"{self.name}; its columns are {there}{_meant(column, there.split(', '))}"
            )
        return text


_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def _load(
    part: str, source: str, split: str, subset: str | None, columns: Mapping[str, str]
) -> Any:
    """A split as a `datasets.Dataset`; files and folders without asking any network."""
    import datasets  # takes a second

    datasets.disable_progress_bars()
    path = Path(source).expanduser()
    builder = next((_FORMATS[end] for end in reversed(path.suffixes) if end in _FORMATS), None)
    name, options = source, dict[str, Any](name=subset)
    if path.is_dir():
        name = str(path.resolve())
    elif path.is_file() and builder is not None:
        # A lone file is the split that is asked for, or of which a slice is: "train[:90%]".
        name = builder
        options = {"data_files": {re.split(r"[\[+]", split)[0]: str(path)}}
        if builder == "csv":  # as written: no 7.0 for 007, no null for "NA"
            options["converters"] = dict.fromkeys(columns.values(), str)
            options["keep_default_na"] = False
    elif path.is_file():
        raise TaskError(f"task.{part}: {path} is none of: {', '.join(_FORMATS)}")
    elif builder is not None or path.is_absolute() or source.count("/") > 1 or source[0] in ".~":
        raise TaskError(f"task.{part}: No such file or folder: {path}")
    try:
        return datasets.load_dataset(name, split=split, **options)
    except Exception as error:  # of any library below; each names what is wrong
        key = part
        if "Unknown split" in str(error):
            key = f"{part}_split"
        elif "BuilderConfig" in str(error):
            key = "subset" if part == "train" else "eval_subset"
        reason = str(error.__cause__ or error) or "it holds nothing"
        hint = ""
        if name == source and key == part:
            hint = (
                " (neither a file nor a folder here, so it was asked for on the Hugging Face hub)"
            )
        raise TaskError(
            f"task.{key}: cannot load {source}, split {split!r}: {reason}{hint}"
        ) from error


class GymTask:
    """Problems that reasoning-gym makes: endless, graded by its own scorer with `grader = "task"`.

    A question is held out if its hash says so, whatever seed it comes from: reasoning-gym seeds
    item i with seed + i, so streams of different seeds may well meet.

    Raises:
        TaskError: reasoning-gym is not installed, has no such data set, or refuses its options.
    """

    CHUNK = 1000
    PATIENCE = 1000  # draws without anything new

    def __init__(self, config: TaskSection) -> None:
        self._config = config
        gym_dataset(config)
        self._kept: dict[str, Problem] = {}
        self._keeping = self._stream("held-out", held_out=True)

    def training(self, seed: int) -> Iterator[Problem]:
        yield from self._stream(f"training {seed}", held_out=False)
        raise TaskError(
            f"task.name = {self._config.name!r}: hardly a question that is not held out"
        )

    def held_out(self, count: int) -> Sequence[Problem]:
        seen = 0
        while len(self._kept) < count and seen < self.PATIENCE:
            problem = next(self._keeping, None)
            if problem is None:
                break
            seen = seen + 1 if problem.id in self._kept else 0
            self._kept.setdefault(problem.id, problem)
        return list(self._kept.values())[:count]

    def _stream(self, seed: str, *, held_out: bool) -> Iterator[Problem]:
        """Questions of one side; ends when none has come for long."""
        rng, missed = random.Random(seed), 0
        while True:
            data = gym_dataset(self._config, seed=rng.getrandbits(31), size=self.CHUNK)
            for row in map(data.__getitem__, range(self.CHUNK)):
                digest = hashlib.sha256(row["question"].encode()).digest()
                if (digest[0] % 4 == 0) is not held_out:
                    missed += 1
                    if missed == self.PATIENCE:
                        return
                    continue
                missed = 0
                yield Problem(
                    id=f"{self._config.name}:{digest.hex()[:16]}",
                    prompt=_prompt(self._config.template, row["question"]),
                    answer=str(row["answer"] or ""),  # some only have a scorer
                    extra=row,
                )


def gym_dataset(config: TaskSection, *, seed: int = 0, size: int = 1) -> Any:
    """A reasoning-gym data set with the recipe's name and options; raises TaskError."""
    try:
        from reasoning_gym import composite, factory
    except ImportError as error:
        raise TaskError("task.kind = 'reasoning-gym' needs: pip install 'espo[gym]'") from error
    name, options = config.name or "", dict(config.options)
    if name not in factory.DATASETS:
        names = sorted(factory.DATASETS)
        raise TaskError(
            f"task.name = {name!r}: no such data set{_meant(name, names)}; there are "
            + ", ".join(names)
        )
    known = {field.name for field in fields(factory.DATASETS[name][1])} - {"seed", "size"}
    if wrong := options.keys() - known:
        raise TaskError(
            f"task.options: {name} has no {', '.join(sorted(wrong))}"
            f"{_meant(min(wrong), known)}; it has {', '.join(sorted(known))}"
        )
    try:
        if name == "composite":  # a mixture: [{name = ..., weight = ..., config = {...}}, ...]
            options["datasets"] = [composite.DatasetSpec(**spec) for spec in options["datasets"]]
        return factory.create_dataset(name, seed=seed, size=size, **options)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise TaskError(f"task.options: {name} refuses them: {error}") from error


def _prompt(template: str, text: str) -> str:
    # Not str.format: problems are full of braces.
    return template.replace("{problem}", text)


def _meant(wrong: str, names: Collection[str]) -> str:
    close = [] if wrong in names else difflib.get_close_matches(wrong, names, n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def make_task(config: TaskSection) -> Task:
    """The task a recipe names. Raises TaskError when its problems cannot be had."""
    if config.kind == "arithmetic":
        return Arithmetic(config.min_steps, config.max_steps, config.template, config.steps)
    return DatasetTask(config) if config.kind == "dataset" else GymTask(config)
