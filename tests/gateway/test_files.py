"""Files and folders under their names: whole, the old one or the new one, and no scratch beside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from espo_gateway.files import is_folder, written_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("fsync", [False, True])
def test_a_file_is_replaced(tmp_path: Path, fsync: bool) -> None:
    path = tmp_path / "state.json"
    for text in ("old", "new"):
        with written_whole(path, fsync=fsync) as scratch:
            scratch.write_text(text)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["state.json"]


@pytest.mark.parametrize("fsync", [False, True])
def test_a_folder_is_replaced_and_nothing_of_the_old_one_stays(tmp_path: Path, fsync: bool) -> None:
    for name in ("old", "new"):
        with written_whole(tmp_path / "step", fsync=fsync) as scratch:
            (scratch / name).mkdir(parents=True)
            (scratch / name / "weights").write_text(name)
    assert names(tmp_path) == ["step"]
    assert names(tmp_path / "step") == ["new"]


def test_a_failure_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), written_whole(path) as scratch:
        scratch.write_text("half of it, \ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["state.json"]


KILLED = """
import os, signal, sys
from pathlib import Path
from espo_gateway.files import is_folder, written_whole

with written_whole(Path(sys.argv[1])) as scratch:
    scratch.write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with written_whole(path) as scratch:
        assert not scratch.exists()  # what the kill left is not mixed in
        scratch.write_text("new")
    assert names(tmp_path) == ["state.json"]


def test_a_folder_that_is_none_is_the_error() -> None:
    with pytest.raises(NotADirectoryError), written_whole(Path("/dev/full/x")) as scratch:
        scratch.write_text("no")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError), written_whole(tmp_path / "x") as scratch:
            scratch.write_text("no")
    finally:
        tmp_path.chmod(0o700)


# -- names of models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("org/model", False),
        ("org/model/", False),
        ("here/model", True),
        ("runs/base", True),
        ("runs/real/base", True),
        ("base", True),
        ("./base", True),
        ("~/base", True),
        ("/base", True),
    ],
)
def test_what_can_only_be_a_folder(
    name: str, folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_folder(name) is folder
