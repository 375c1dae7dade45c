"""What every test of the command evaluates: a model, data, the arguments for both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.evaluation import PROBLEMS
from tests.helpers.models import random_checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("evaluate") / "model", 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"problem": problem.prompt, "answer": problem.answer} for problem in PROBLEMS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def arguments(model: Path, data: Path, tmp_path: Path) -> list[str]:
    return [
        *("--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")),
        *("--k", "2", "--max-tokens", "20", "--grader", "exact"),
    ]
