"""The runs of a study, one after another; what is done is not done again.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from espo_gateway.supervisor import die_with_guard
from espo_rl.config import RecipeError, load_recipe
from espo_rl.record.run_folder import read_run
from study.design import Run, Study, StudyError

#: Seconds between two looks at a run's metrics.
POLL = 0.5
#: of a share of stopped rollouts that another run is to have
SHARE_DIGITS = 4
#: A run that ends in a fault is resumed so many times.
ATTEMPTS = 2


class Stopped(Exception):
    """A signal ended the study; what is done is kept."""


def run_study(study: Study) -> list[Run]:
    """Do all that is left; returns the runs that failed. Raises StudyError and Stopped."""
    check(study)
    for preparation in study.prepare:
        if preparation.makes.exists():
            continue
        prepare(preparation.command)
        check(study)  # runs of before may be of other weights
        if not preparation.makes.exists():
            raise StudyError(f"{' '.join(preparation.command)} did not make {preparation.makes}")
    runs, failed = list(study.runs()), []
    with progress_bar() as progress:
        total = sum(steps_of(run) for run in runs)
        bar = progress.add_task("", total=total)
        for run in runs:
            label = f"{run.name}, seed {run.seed}"
            done = sum(steps_done(each) for each in runs) - steps_done(run)
            progress.update(bar, description=label, completed=done + steps_done(run))
            if summary_of(run) is not None:
                continue

            def look(run: Run = run, done: int = done) -> None:
                progress.update(bar, completed=done + steps_done(run))

            try:
                began = time.monotonic()
                train(run, look)
                progress.console.print(f"{label}: done in {time.monotonic() - began:.0f} s")
            except StudyError as error:
                progress.console.print(f"[red]{label}: {error}")
                failed.append(run)
    return failed


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
            known, now = json.loads(told.read_text()), about(run)
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
    steps = read_run(run.folder)
    gated = np.flatnonzero(np.array(steps.column("stopping/on")) == 1.0)
    if not gated.size:
        raise StudyError(
            f"{run.folder} stopped nothing, so there is no share to match: see its log"
        )
    share = float(np.mean(steps.column("rollout/stop_share")[gated[0] :]))
    if not 0.0 < round(share, SHARE_DIGITS) < 1.0:
        raise StudyError(f"{run.folder} stopped {share:.3%} of its rollouts: no share to match")
    return share


def prepare(command: list[str]) -> None:
    """Run this Python with a command's arguments, in sight."""
    Console(stderr=True).print("preparing: python " + " ".join(command), style="bold")
    if code := follow(subprocess.Popen([sys.executable, *command], **_CHILD), lambda: None):
        raise StudyError(f"python {' '.join(command)} ended with exit code {code}")


def train(run: Run, look: Callable[[], None]) -> None:
    """One run to its end. Raises StudyError when it fails, Stopped after a signal."""
    settings = run.settings
    if (other := run.rate_from) is not None:
        settings = [*settings, f"stopping.target_share={stop_share(other):.{SHARE_DIGITS}f}"]
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "settings.json").write_text(json.dumps(about(run)))
    command = [sys.executable, "-m", "espo_rl.run", run.study.recipe, *settings, "--resume", "auto"]
    log = run.folder / "output.log"
    for _ in range(ATTEMPTS):
        with log.open("ab") as file:
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **_CHILD)
        if follow(child, look) == 0:
            return
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise StudyError(f"it failed {ATTEMPTS} times; see {log}\n{tail}")


#: Signals come from here alone, and it ends when this process does, however that ends.
_CHILD: dict[str, Any] = {"start_new_session": True, "preexec_fn": die_with_guard}


def follow(child: subprocess.Popen[bytes], look: Callable[[], None]) -> int:
    """Wait for a child; its exit code. Raises Stopped when it ended by a signal to this process."""
    received: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        received.append(number)
        child.send_signal(signal.SIGINT)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while child.poll() is None:
            look()
            time.sleep(POLL)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    look()
    if received:
        raise Stopped
    return child.returncode


def summary_of(run: Run) -> dict[str, Any] | None:
    """summary.json of a run that is done."""
    path = run.folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


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
