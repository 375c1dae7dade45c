"""What `scripts/demo.sh` runs: the commands, by a Python that only writes them down."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def demo(tmp_path: Path, *arguments: str, fails: str = "nothing") -> tuple[int, list[str]]:
    """Its exit status, and the commands. fails: a word of the one that does."""
    said, python = tmp_path / "said", tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$*" >> {said}\ncase "$*" in *{fails}*) exit 3;; esac\n')
    python.chmod(0o755)
    wanted = b"".join(
        (ROOT / name).read_bytes() for name in ("requirements-cpu.lock", "pyproject.toml")
    )
    stamp = hashlib.sha256(wanted).hexdigest()
    (python.parents[1] / "installed-from").write_text(f"{stamp}  -\n")
    done = subprocess.run(
        [ROOT / "scripts" / "demo.sh", *arguments],
        env=os.environ | {"VENV": str(python.parents[1])},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    return done.returncode, said.read_text().splitlines()


def test_the_quick_start(tmp_path: Path) -> None:
    status, commands = demo(tmp_path, "run.seed=1", "--overwrite")
    assert status == 0
    assert commands == [
        "-m espo_rl.base_model --out runs/base",
        "-m espo_rl.run arithmetic run.seed=1 --overwrite",
    ]


@pytest.mark.parametrize("given", ["", HUB, "folder"])
def test_a_real_model_by_its_name_or_its_folder(tmp_path: Path, given: str) -> None:
    (tmp_path / "folder").mkdir()
    words = [given] if given else []
    status, commands = demo(tmp_path, "--real", *words, "run.steps=2", "--overwrite")
    assert status == 0
    sft, run, report = commands
    model = str(tmp_path / "folder") if given == "folder" else HUB
    assert f"--model {model} " in sft
    # A base for each model: that of another one is not trained on, though its name ends alike.
    base = f"runs/demo-base-{model.replace('/', '--')}"
    assert f"--out {base} " in sft
    assert run.startswith(f"-m espo_rl.run smollm2-135m model.path={base} ")
    assert run.endswith(" run.steps=2 --overwrite")
    assert report == "-m espo_rl.report runs/demo-real"


def test_the_report_is_of_the_run_and_a_plan_has_none(tmp_path: Path) -> None:
    _, commands = demo(tmp_path, "--real", "run.output=runs/mine")
    assert commands[-1] == "-m espo_rl.report runs/mine"
    status, commands = demo(tmp_path / "planned", "--real", "--dry-run")
    assert (status, len(commands)) == (0, 2)


def test_what_fails_ends_it(tmp_path: Path) -> None:
    status, commands = demo(tmp_path, "--real", fails="smollm2-135m")
    assert status == 3
    assert len(commands) == 2
