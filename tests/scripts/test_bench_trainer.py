"""`scripts/bench_trainer.py`: both sides do the same work, and what comes of it can be read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_benchmark.cases import CASES, SHAPES

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_trainer.py"


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path) -> None:
    """Two child processes for each of two cases."""
    out = tmp_path / "report.json"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(out.read_text())
    assert set(report) == {name for name in CASES if name.startswith("quick")}
    for name, sides in report.items():
        assert set(sides) == {"ours", "trl"}
        shape = SHAPES[CASES[name].shape]
        for side in sides.values():
            assert side["tokens"] == shape.rollouts * shape.tokens
            assert side["update_s"] > 0
            assert side["peak_memory_mb"] > 0
            assert len(side["turns"]) == 2
        assert sides["ours"]["step_s"] is None  # without servers there is none
        assert sides["trl"]["step_s"] > sides["trl"]["update_s"]
        phases = set(sides["ours"]["phases"])
        assert {f"actor: {part}" for part in ("forward", "backward", "optimizer")} < phases
        assert ("critic: forward" in phases) == (name == "quick-lora")


@pytest.mark.slow
def test_what_is_no_case_and_no_report_of_its_own(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    for arguments, said in (
        (["--only", "tiny-grpo"], "there is no 'tiny-grpo', only tiny-group"),
        (["--json", str(other)], "--json"),
    ):
        run = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300
        )
        assert run.returncode
        assert said in run.stderr
    assert other.read_text() == "{}"
