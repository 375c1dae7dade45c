"""A lock that a killed build left behind ends no start; one that is held is waited for by torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from espo_rl.ppo import stale_locks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / "deepspeed_shm_comm" / "lock"
    file.parent.mkdir()
    return file


@pytest.mark.parametrize("age", [stale_locks.PATIENCE + 1, stale_locks.PATIENCE - 1])
def test_a_lock_that_nobody_holds_goes_once_it_is_old(lock: Path, age: float) -> None:
    lock.touch()
    then = lock.stat().st_mtime - age
    os.utime(lock, (then, then))
    stale_locks.remove_stale_locks()
    assert not lock.exists()


def test_one_that_is_held_stays(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stale_locks, "PATIENCE", 0.0)
    with lock.open("w"):
        stale_locks.remove_stale_locks()
        assert lock.exists()
    stale_locks.remove_stale_locks()
    assert not lock.exists()
    stale_locks.remove_stale_locks()
