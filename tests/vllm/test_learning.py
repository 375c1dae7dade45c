"""The whole thing learns: the arithmetic recipe, shortened, on a real vLLM.

The base model is right about half the time; 16 steps of training must lift it far beyond what two
samples of 512 answers differ by chance (a deviation of 3 points).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_training_with_early_stopping_learns_and_saves_tokens(tmp_path: Path) -> None:
    base = tmp_path / "base"
    command = [sys.executable, "-m", "espo_rl.base_model", "--out", str(base)]
    subprocess.run(command, check=True)
    output = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "espo_rl.run", "arithmetic"),
        *(f"model.path={base}", f"run.output={output}", "run.steps=16"),
        *("evaluation.problems=512", "checkpoints.every=0"),
    ]
    subprocess.run(command, check=True)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["accuracy_before"] < 0.6
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.12
    assert summary["tokens_generated"] < 0.9 * summary["tokens_without_stopping"]
    assert summary["errors"] == 0
