"""Where a command may write: nothing that is there is lost unless the command line says so."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

#: by these a folder is known to be a run's
MARKS = ("recipe.json", "metrics.jsonl")
#: all that a run, and a report of it, writes there; the marks last, so that what is left of a
#: folder whose removal was killed is still known as a run's
OF_A_RUN = (
    *("summary.json", "rollouts", "checkpoints", "logs", "tensorboard", "wandb", "wandb_run"),
    *("actor", "critic", "actor.tmp", "critic.tmp", "critic-config", "report.html"),
    *MARKS,
)

#: whose lock is had by the process that trains in a folder; nothing stands in it
LOCK = "run.lock"


class OutputError(ValueError):
    """What is there would be lost; the message names the setting and what to do."""


def entries(folder: Path, setting: str) -> list[str]:
    """The names in a folder but for a run's lock; none where there is no folder yet.

    Raises:
        OutputError: it is a file, or cannot be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(
            f"{setting}: cannot use {folder} ({error.strerror}); choose another folder"
        ) from error


def check_empty(
    folder: Path, setting: str, fix: str = "choose another folder", *, whole: bool = False
) -> None:
    """Raise OutputError where a folder holds anything, or nothing can be written there.

    Args:
        setting: that names it.
        whole: it is written beside, and takes the name at the end.
    """
    if there := entries(folder, setting):
        raise OutputError(f"{setting}: {folder} is not empty (it holds {listed(there)}): {fix}")
    if whole:
        check_beside(folder, setting)
    else:
        _check_within(folder, setting)


def check_beside(path: Path, setting: str) -> None:
    """Raise OutputError where no file or folder can be written whole (`files.written_whole`)."""
    if not path.name:
        raise OutputError(f"{setting}: {path} has no name of its own; choose another one")
    _check_within(path.absolute().parent, setting)


def _check_within(folder: Path, setting: str) -> None:
    """Raise OutputError where nothing can be written into a folder, there or still to be made."""
    there = folder.absolute()
    try:
        while not there.exists():
            there = there.parent
        writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError as error:
        raise OutputError(
            f"{setting}: cannot use {folder} ({error.strerror}); choose another folder"
        ) from error
    if not writable:
        raise OutputError(f"{setting}: cannot write into {there}; choose another folder")


def check_own(file: Path, setting: str, kind: str, own: Callable[[Path], bool]) -> None:
    """Raise OutputError where a file would be replaced that is not of the kind that takes its
    place. own: whether a file is; what it raises of ValueError means no."""
    check_beside(file, setting)
    try:
        if not file.exists() or (file.is_file() and not file.stat().st_size):
            return
        if file.is_file() and own(file):
            return
    except (OSError, ValueError):
        pass
    raise OutputError(
        f"{setting}: {file} is there and no {kind}; choose another name, or remove it"
    )


def json_with(*names: str) -> Callable[[Path], bool]:
    """Whether a file is a JSON object with these names, for `check_own`."""

    def own(file: Path) -> bool:
        content = json.loads(file.read_bytes())
        return isinstance(content, dict) and content.keys() >= set(names)

    return own


def is_run(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in MARKS)


def lock_run(folder: Path) -> None:
    """Keep others from training in a folder until this process has ended. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Never closed here: however this process ends, the lock ends with it.
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise OutputError(
            f"run.output: another process trains in {folder}: wait until it has ended, or choose "
            "another run.output"
        ) from error
    except OSError as error:
        raise OutputError(
            f"run.output: cannot use {folder} ({error.strerror}); choose another folder"
        ) from error


def remove_run(folder: Path) -> None:
    """Delete what a run wrote into its folder, and nothing else. Raises OutputError."""
    for name in OF_A_RUN:
        path = folder / name
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"--overwrite: cannot remove {path}: {error.strerror}") from error


def listed(names: Collection[str], most: int = 4) -> str:
    """The first few of them, and that there are more."""
    shown = sorted(names)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
