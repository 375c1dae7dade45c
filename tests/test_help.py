"""Every command tells what it takes, and loads nothing for it that it does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "sklearn", "openai"}


@pytest.mark.parametrize(
    "command",
    [
        "espo_rl.run",
        "espo_rl.evaluate",
        "espo_rl.replay",
        "espo_rl.report",
        "espo_rl.collect",
        "espo_rl.probe",
        "espo_rl.pretrain_critic",
        "espo_rl.base_model",
        "espo_gateway",
        "espo_gateway calibrate",
    ],
)
def test_help_is_quick(command: str) -> None:
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *command.split(), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.startswith("usage: ")
    imported = {line.rpartition("|")[2].strip() for line in said.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & HEAVY
