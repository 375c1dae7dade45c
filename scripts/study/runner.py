"""The runs of a study, one after another or several at a time; what is done is not done again.

Each is a `python -m espo_rl.run` of its own, resumed from its checkpoint where it was broken off. A
signal reaches it once: it finishes its step, saves and ends, and the study with it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from espo_gateway.files import read_object
from espo_gateway.supervisor import die_with_guard
from espo_rl.config import RecipeError, load_recipe
from espo_rl.record.json_files import write_json
from espo_rl.record.run_folder import RunFolderError, read_run
from study.design import Run, Study, StudyError

#: Seconds between two looks at a run's metrics.
POLL = 0.5
#: of a share of stopped rollouts that another run is to have
SHARE_DIGITS = 4
#: A run that ends in a fault is resumed so many times.
ATTEMPTS = 2


class Stopped(Exception):
    """A signal ended the study; what is done is kept."""


def run_study(study: Study, jobs: int = 1) -> list[Run]:
    """Do all that is left, so many runs at a time; returns those that failed.

    Raises StudyError and Stopped.
    """
    check(study)
    for preparation in study.prepare:
        if preparation.makes.exists():
            continue
        prepare(preparation.command)
        check(study)  # runs of before may be of other weights
        if not preparation.makes.exists():
            raise StudyError(f"{' '.join(preparation.command)} did not make {preparation.makes}")
    runs, failed = list(study.runs()), list[Run]()
    left = [run for run in runs if summary_of(run) is None]
    going: list[Training] = []
    done = {run.folder: steps_done(run) for run in runs}

    def startable() -> Iterator[Run]:
        """What is left and waits for the rate of no other."""
        waited_for = [*left, *(training.run for training in going)]
        return (run for run in left if run.rate_from not in waited_for)

    with progress_bar() as progress, signals() as received:
        bar = progress.add_task("", total=sum(map(steps_of, runs)))

        def fail(run: Run, error: StudyError) -> None:
            progress.console.print(f"[red]{label(run)}: {escape(str(error))}")
            failed.append(run)

        while going or (left and not received):
            while len(going) < jobs and not received and (run := next(startable(), None)):
                left.remove(run)
                try:
                    going.append(Training(run, jobs))
                except StudyError as error:
                    fail(run, error)
            under_way = [training.run for training in going]
            for training in [*going]:
                try:
                    if not training.ended(received):
                        continue
                    if not received:
                        progress.console.print(f"{label(training.run)}: done in {training.told}")
                except StudyError as error:
                    fail(training.run, error)
                going.remove(training)
            done |= {run.folder: steps_done(run) for run in under_way}
            names = (
                ", ".join(label(t.run) for t in going) if len(going) < 3 else f"{len(going)} runs"
            )
            progress.update(bar, description=names, completed=sum(done.values()))
            if going:
                time.sleep(POLL)
    if received:
        raise Stopped
    return failed


def label(run: Run) -> str:
    return f"{run.name}, seed {run.seed}"


def check(study: Study) -> None:
    """Every run's settings, before the first one starts. Raises StudyError."""
    for run in study.runs():
        try:
            load_recipe(study.recipe, run.settings)
        except RecipeError as error:
            raise StudyError(f"methods.{run.name}: {error}") from error
        told = run.folder / "settings.json"
        if not told.exists():
            if (run.folder / "recipe.json").exists():
                raise StudyError(
                    f"{run.folder} holds a run that is none of this study's; delete it, or choose "
                    "another --output"
                )
        else:
            now = about(run)
            try:
                known = read_object(told)
            except ValueError as error:
                raise StudyError(
                    f"{told} is damaged ({error}); delete {run.folder}, or put back what it was"
                ) from error
            known.pop("jobs", None)
            weights, there = known.pop("weights", {}), now.pop("weights")
            changed = [path for path in weights if there.get(path, weights[path]) != weights[path]]
            if known != now or changed:
                other = f"weights in {changed[0]}" if changed else "settings"
                raise StudyError(
                    f"{run.folder} was made with other {other}; delete it, or choose another "
                    "--output"
                )


def about(run: Run) -> dict[str, Any]:
    """What must not change between two parts of a run."""
    model = load_recipe(run.study.recipe, run.settings).model
    return {
        "recipe": run.study.recipe,
        "settings": run.settings,
        "rate_of": run.method.rate_of,
        "weights": weights_of(*filter(None, (model.path, model.critic))),
    }


def weights_of(*models: str) -> dict[str, str]:
    """Digests of local checkpoints: one that is made anew starts other runs. Models of the hub,
    and those that are not made yet, have none."""
    files = {model: sorted(Path(model).glob("*.safetensors")) for model in models}
    return {
        model: " ".join(_digest(path, path.stat().st_mtime_ns) for path in found)
        for model, found in files.items()
        if found
    }


@functools.cache
def _digest(path: Path, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def stop_share(run: Run) -> float:
    """Of a finished run's rollouts, from the first step that was gated: a rule that is off for some
    steps after that stops none in them. Raises StudyError."""
    if summary_of(run) is None:
        raise StudyError(f"{run.folder} is not done, whose share of stopped rollouts it needs")
    try:
        steps = read_run(run.folder)
    except RunFolderError as error:
        raise StudyError(str(error)) from error
    gated = np.flatnonzero(np.array(steps.column("stopping/on")) == 1.0)
    if not gated.size:
        raise StudyError(
            f"{run.folder} stopped nothing, so there is no share to match: see its log"
        )
    share = float(np.mean(steps.column("rollout/stop_share")[gated[0] :]))
    if not 0.0 < round(share, SHARE_DIGITS) < 1.0:
        raise StudyError(f"{run.folder} stopped {share:.3%} of its rollouts: no share to match")
    return share


#: Signals come from here alone, and it ends when this process does, however that ends.
_CHILD: dict[str, Any] = {"start_new_session": True, "preexec_fn": die_with_guard}


class Child:
    """A process that gets the signals that come to this one, as SIGINT."""

    def __init__(self, command: list[str], **options: Any) -> None:
        self._process = subprocess.Popen(command, **_CHILD, **options)
        self._handed_on = 0

    def poll(self, received: list[int]) -> int | None:
        """Its exit code, once there is one. received: all signals so far."""
        for _ in received[self._handed_on :]:
            self._process.send_signal(signal.SIGINT)
        self._handed_on = len(received)
        return self._process.poll()


def prepare(command: list[str]) -> None:
    """Run this Python with a command's arguments, in sight. Raises StudyError and Stopped."""
    Console(stderr=True).print("preparing: python " + " ".join(command), style="bold")
    with signals() as received:
        child = Child([sys.executable, *command])
        while (code := child.poll(received)) is None:
            time.sleep(POLL)
    if received:
        raise Stopped
    if code:
        raise StudyError(f"python {' '.join(command)} ended with exit code {code}")


class Training:
    """A run under way: its process, begun again where it failed; jobs: how many are at a time.

    Raises StudyError: it needs the rate of a run that is not done, or stopped nothing.
    """

    def __init__(self, run: Run, jobs: int) -> None:
        settings = run.settings
        if (other := run.rate_from) is not None:
            settings = [*settings, f"stopping.target_share={stop_share(other):.{SHARE_DIGITS}f}"]
        run.folder.mkdir(parents=True, exist_ok=True)
        write_json(run.folder / "settings.json", about(run) | {"jobs": jobs})
        self.run = run
        self._command = [
            *(sys.executable, "-m", "espo_rl.run", run.study.recipe, *settings),
            *("--resume", "auto"),
        ]
        self._log = run.folder / "output.log"
        self._began, self._attempts = time.monotonic(), 0
        self._start()

    def _start(self) -> None:
        self._attempts += 1
        with self._log.open("ab") as file:
            self._child = Child(self._command, stdout=file, stderr=subprocess.STDOUT)

    @property
    def told(self) -> str:
        """How long it has taken."""
        return f"{time.monotonic() - self._began:.0f} s"

    def ended(self, received: list[int]) -> bool:
        """Whether it has; after a signal it is not begun again. Raises StudyError: it failed."""
        code = self._child.poll(received)
        if code is None:
            return False
        if code == 0 or received:
            return True
        if self._attempts < ATTEMPTS:
            self._start()
            return False
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])
        raise StudyError(f"it failed {ATTEMPTS} times; see {self._log}\n{tail}")


@contextmanager
def signals() -> Iterator[list[int]]:
    """The signals to this process that have come, to which it does nothing by itself."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary_of(run: Run) -> dict[str, Any] | None:
    """summary.json of a run that is done."""
    path = run.folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def jobs_of(run: Run) -> int:
    """How many runs were at a time when it began last."""
    told = run.folder / "settings.json"
    return int(json.loads(told.read_text()).get("jobs", 1)) if told.exists() else 1


def steps_of(run: Run) -> int:
    return load_recipe(run.study.recipe, run.settings).run.steps


def steps_done(run: Run) -> int:
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        return 0
    return sum(b'"rollout/tokens"' in line for line in path.read_bytes().split(b"\n"))


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        # Runs differ; the rate of the last half hour tells the time left.
        speed_estimate_period=1800.0,
    )
