"""What a study is: methods, each a few settings over one recipe, and their seeds.

study = load_study(Path("scripts/studies/arithmetic.toml"))
for run in study.runs(): ...
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Count = Annotated[int, Field(ge=1, strict=True)]


class StudyError(ValueError):
    """The study cannot be run as it is given; the message says what to change."""


class Table(BaseModel):
    """A table of the TOML file; unknown keys fail."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Paper(Table):
    """What the paper reports of a method: 7B model, AIME24 accuracy in %, mean tokens a response,
    tokens generated in millions."""

    accuracy: float
    length: float
    tokens: float | None = None


class Method(Table):
    """One line of the comparison.

    settings: `section.key=value` over the study's. seeds: how many, None for the study's number.
    rate_of: a method whose share of stopped rollouts, of the same seed, becomes this one's
    `stopping.target_share`. without: a method that is this one without stopping: how much of the
    tokens saved is time saved is told against it.
    """

    title: str
    settings: list[str] = []
    seeds: Count | None = None
    rate_of: str | None = None
    without: str | None = None
    paper: Paper | None = None


class Preparation(Table):
    """A command of this environment's Python, run once: when what it makes is not there.

    methods: that need it; none said: all.
    """

    makes: Path
    command: list[str]
    methods: list[str] = []


class Study(Table):
    """A TOML file of `scripts/studies`.

    baseline: the method that all others are compared with, seed by seed. target: a held-out
    accuracy; how long each method takes to it is told.
    """

    recipe: str
    output: Path
    baseline: str
    target: Annotated[float, Field(gt=0, lt=1)] | None = None
    seeds: Count = 3
    first_seed: Annotated[int, Field(ge=0, strict=True)] = 0
    settings: list[str] = []
    prepare: list[Preparation] = []
    methods: dict[str, Method]

    @model_validator(mode="after")
    def _names(self) -> Study:
        if self.baseline not in self.methods:
            raise ValueError(f"baseline = {self.baseline!r} is none of the methods")
        earlier: set[str] = set()
        for name, method in self.methods.items():
            if method.rate_of is not None and method.rate_of not in earlier:
                raise ValueError(
                    f"methods.{name}.rate_of = {method.rate_of!r} must be a method above it"
                )
            if method.without is not None and method.without not in self.methods:
                raise ValueError(
                    f"methods.{name}.without = {method.without!r} is none of the methods"
                )
            earlier.add(name)
        for number, preparation in enumerate(self.prepare):
            if unknown := [name for name in preparation.methods if name not in self.methods]:
                raise ValueError(
                    f"prepare.{number}.methods = {unknown[0]!r} is none of the methods"
                )
        return self

    def seeds_of(self, name: str) -> range:
        count = self.methods[name].seeds or self.seeds
        return range(self.first_seed, self.first_seed + count)

    def runs(self) -> Iterator[Run]:
        """All runs, methods in turn for each seed: what changes on the machine meets all alike."""
        last = max(self.seeds_of(name).stop for name in self.methods)
        for seed in range(self.first_seed, last):
            for name in self.methods:
                if seed in self.seeds_of(name):
                    yield Run(self, name, seed)

    def only(self, names: list[str]) -> Study:
        """With these methods, what they are compared with or have their rate of, and the baseline
        alone. Raises StudyError."""
        if unknown := [name for name in names if name not in self.methods]:
            raise StudyError(f"there is no method {unknown[0]!r}, only {', '.join(self.methods)}")
        wanted: set[str | None] = {*names, self.baseline}
        for name in names:
            wanted |= {self.methods[name].without, self.methods[name].rate_of}
        kept = {name: method for name, method in self.methods.items() if name in wanted}
        needed = [
            one.model_copy(update={"methods": [name for name in one.methods if name in kept]})
            for one in self.prepare
            if not one.methods or kept.keys() & one.methods
        ]
        return self._changed(methods=kept, prepare=needed)

    def with_seeds(self, seeds: int) -> Study:
        """With so many seeds of each method. Raises StudyError."""
        methods = {n: m.model_copy(update={"seeds": None}) for n, m in self.methods.items()}
        return self._changed(methods=methods, seeds=seeds)

    def _changed(self, **changes: object) -> Study:
        return _checked({**dict(self), **changes})


@dataclass(frozen=True)
class Run:
    """A method with a seed, in a folder of its own."""

    study: Study
    name: str
    seed: int

    @property
    def method(self) -> Method:
        return self.study.methods[self.name]

    @property
    def folder(self) -> Path:
        return self.study.output / self.name / f"seed-{self.seed}"

    @property
    def rate_from(self) -> Run | None:
        """The run whose share of stopped rollouts this one needs."""
        name = self.method.rate_of
        return None if name is None else Run(self.study, name, self.seed)

    @property
    def settings(self) -> list[str]:
        """All overrides of the recipe but the share of `rate_from`."""
        own = [f"run.seed={self.seed}", f"run.output={self.folder}"]
        return [*self.study.settings, *self.method.settings, *own]


def load_study(path: Path, **changes: object) -> Study:
    """Read a study; `changes` replace its keys. Raises StudyError."""
    try:
        with path.open("rb") as file:
            read = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise StudyError(f"{path}: {error}") from error
    return _checked(read | {name: value for name, value in changes.items() if value is not None})


def _checked(values: dict[str, object]) -> Study:
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        told = ("{}: {}".format(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors())
        raise StudyError("\n".join(line.removeprefix(": ") for line in told)) from error
