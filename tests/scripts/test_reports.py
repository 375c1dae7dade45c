"""Scripts that write what they have measured: never over what is not a report of theirs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("bench_probe", ["--model", "m", "--data", "d.jsonl"]),
        ("bench_schedule", ["--model", "m"]),
        ("check_gpu", ["--model", "m"]),
    ],
)
def test_another_file_is_refused_before_anything_runs(
    script: str, arguments: list[str], tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments, "--json", str(other)]
    run = subprocess.run(command, cwd=SCRIPTS.parent, capture_output=True, text=True, timeout=120)
    assert run.returncode
    assert f"{script}: --json: {other} is there" in run.stderr
    assert other.read_text() == "{}"
