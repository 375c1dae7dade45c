"""Checkpoints: whole or not there, rotating, and plain about what went wrong."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from espo_rl.checkpoints import FORMAT, CheckpointError, CheckpointStore
from espo_rl.config import Stopping


def writer(text: str) -> Callable[[Path], None]:
    """Stands for the trainer's `save`: a file for each engine."""

    def save_models(folder: Path) -> None:
        (folder / "actor").mkdir()
        (folder / "actor" / "state").write_text(text)

    return save_models


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def nothing(folder: Path) -> None:
    pass


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert store.newest() is None
    path = store.save(3, {"step": 3, "list": [1.5, None]}, writer("three"))
    assert path == store.newest() == tmp_path / "run" / "checkpoints" / "step-00000003"
    seen = []
    state = store.load(path, lambda folder: seen.append((folder / "actor/state").read_text()))
    assert (state, seen) == ({"step": 3, "list": [1.5, None]}, ["three"])


def test_only_the_newest_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (8, 9, 10, 11):  # not in the order of their names without the zeros
        store.save(step, step, writer(str(step)))
    assert names(tmp_path) == ["step-00000010", "step-00000011"]
    assert (newest := store.newest()) is not None
    assert store.load(newest, nothing) == 11


def test_the_newest_stays_when_the_next_fails(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    first = store.save(1, "first", writer("first"))

    def half(folder: Path) -> None:
        (folder / "actor").write_text("half of it")
        raise ZeroDivisionError("a fault of the program, not of the disk")

    with pytest.raises(ZeroDivisionError):
        store.save(2, "second", half)
    assert store.newest() == first
    assert store.load(first, nothing) == "first"
    # Nor does the failure stand in the way of the next try.
    assert store.load(store.save(2, "second", writer("2")), nothing) == "second"
    assert names(tmp_path) == ["step-00000002"]


def test_a_state_that_cannot_be_pickled_leaves_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    first = store.save(1, "first", writer("first"))
    with pytest.raises(Exception, match="lambda"):
        store.save(2, lambda: None, writer("second"))
    assert store.newest() == first


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, "old", writer("old"))
    path = store.save(1, "new", writer("new"))
    assert store.load(path, nothing) == "new"
    assert (path / "actor/state").read_text() == "new"
    assert names(tmp_path) == ["step-00000001"]


def test_an_abandoned_future_is_no_longer_the_newest(tmp_path: Path) -> None:
    """After going back to step 2, or starting anew in the same folder, steps 3 and 4 are stale."""
    store = CheckpointStore(tmp_path, keep=2)
    for step in (3, 4):
        store.save(step, "stale", writer("stale"))
    path = store.save(2, "fresh", writer("fresh"))
    assert store.newest() == path
    assert store.load(path, nothing) == "fresh"
    # Nor is it before the next one is saved, should the run be killed first.
    for step in (3, 4):
        store.save(step, "stale", writer("stale"))
    store.drop_after(3)
    assert names(tmp_path) == ["step-00000003"]


KILLED = """
import os, signal, sys
from pathlib import Path
from espo_rl.checkpoints import FORMAT, CheckpointStore

def save_models(folder):
    (folder / "actor").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

CheckpointStore(Path(sys.argv[1])).save(2, "second", save_models)
"""


def test_a_kill_while_writing_leaves_the_last_whole_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    first = store.save(1, "first", writer("first"))
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == ["step-00000001", "step-00000002.tmp"]
    assert store.newest() == first
    # What the kill left is not mixed into the next try, and goes with it.
    path = store.save(2, "second", nothing)
    assert names(path) == ["loop.pkl"]
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_what_kills_left_of_any_step_goes(tmp_path: Path) -> None:
    """Of a step that no later run saves again it would stay for good."""
    store = CheckpointStore(tmp_path)
    store.save(2, "second", nothing)
    for left in ("step-00000001.tmp", "step-00000003.tmp"):
        (tmp_path / left / "actor").mkdir(parents=True)
    store.drop_after(2)
    assert names(tmp_path) == ["step-00000002"]
    assert store.has(2)
    assert not store.has(3)


def test_a_checkpoint_counts_for_nothing_before_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    first = store.save(1, "first", nothing)
    store.save(2, "second", nothing)
    store.save(3, "third", nothing)
    assert names(tmp_path) == ["step-00000003"]

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("espo_rl.checkpoints.shutil.rmtree", refuse)
    with pytest.raises(CheckpointError, match="step-00000003: Permission denied; remove it"):
        store.drop_after(2)
    assert names(tmp_path) == ["step-00000003.tmp"]  # as a kill would leave it
    assert store.newest() is None
    assert not first.exists()


# -- errors that a person can act on ---------------------------------------------------------------


@contextlib.contextmanager
def file_limit(limit: int) -> Iterator[None]:
    """Writes beyond `limit` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_with_torch(folder: Path) -> None:
    torch.save({"weights": torch.zeros(50_000)}, folder / "state.pt")


def save_plain(folder: Path) -> None:
    (folder / "state").write_bytes(bytes(200_000))


@pytest.mark.parametrize("save_models", [save_plain, save_with_torch])
def test_a_full_disk_is_named_with_the_fix(
    tmp_path: Path, save_models: Callable[[Path], None]
) -> None:
    store = CheckpointStore(tmp_path)
    first = store.save(1, "first", save_models)
    with file_limit(65_536), pytest.raises(CheckpointError) as error:
        store.save(2, "second", save_models)
    assert "step-00000002" in str(error.value)
    assert "free space or change run.output" in str(error.value)
    # The space it took is free again, and the last whole one is still there.
    assert names(tmp_path) == ["step-00000001"]
    assert store.load(first, nothing) == "first"


def test_a_full_disk_under_the_loops_state(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with file_limit(65_536), pytest.raises(CheckpointError, match="free space"):
        store.save(1, bytes(200_000), nothing)
    assert store.newest() is None


def test_a_folder_that_cannot_be_made_is_named_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = CheckpointStore(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"run\.output") as error:
        store.save(1, "state", writer("x"))
    assert str(tmp_path / "file") in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named_with_the_fix(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied.*run\.output"):
            CheckpointStore(tmp_path / "checkpoints").save(1, "state", writer("x"))
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"no pickle at all",
        lambda whole: b"garbage" + whole,
        lambda whole: b"\x80\x04\x8c\x08no_such_\x8c\x01x\x93.",  # a class that is gone
        lambda whole: json.dumps({"step": 1}).encode(),
    ],
    ids=["empty", "half", "text", "garbage", "unknown class", "json"],
)
def test_a_damaged_state_is_named_with_the_fix(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(1, {"step": 1, "values": list(range(100))}, writer("x"))
    (path / "loop.pkl").write_bytes(damage((path / "loop.pkl").read_bytes()))
    loaded: list[Path] = []
    with pytest.raises(CheckpointError) as error:
        store.load(path, loaded.append)
    assert str(path) in str(error.value)
    assert "another checkpoint" in str(error.value)
    assert loaded == []  # the models are left alone


@pytest.mark.parametrize(
    "older",
    [
        pickle.dumps({"step": 1}),  # as the first format was, without a number
        pickle.dumps(1) + pickle.dumps({"step": 1}),
        # A class that stands elsewhere by now: espo_rl.batches.Batch, collections.Batch
        b"\x80\x04\x8c\x0fespo_rl.batches\x8c\x05Batch\x93.",
        b"\x80\x04\x8c\x0bcollections\x8c\x05Batch\x93.",
    ],
)
def test_a_checkpoint_of_an_older_version_says_so(tmp_path: Path, older: bytes) -> None:
    path = CheckpointStore(tmp_path).save(1, "state", writer("x"))
    (path / "loop.pkl").write_bytes(older)
    loaded: list[Path] = []
    with pytest.raises(
        CheckpointError, match=rf"another version of espo.* format {FORMAT}"
    ) as error:
        CheckpointStore.load(path, loaded.append)
    assert str(path) in str(error.value)
    assert "the version that wrote it" in str(error.value)
    assert loaded == []


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step-00000009"):
        CheckpointStore.load(tmp_path / "step-00000009", nothing)


@pytest.mark.parametrize("kind", [RuntimeError, FileNotFoundError])
def test_models_that_cannot_be_read_are_named(tmp_path: Path, kind: type[Exception]) -> None:
    path = CheckpointStore(tmp_path).save(1, "state", nothing)

    def load_models(folder: Path) -> None:
        raise kind("PytorchStreamReader failed reading zip archive")

    with pytest.raises(CheckpointError, match="another checkpoint") as error:
        CheckpointStore.load(path, load_models)
    assert str(path) in str(error.value)
    assert "PytorchStreamReader" in str(error.value)


def test_a_checkpoint_of_before_names_sections_where_they_stood() -> None:
    assert pickle.loads(b"cespo_rl.config.sections\nStopping\n.") is Stopping
