"""What the scripts are told wrongly is said in a line, before anything runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import bench_probe
import bench_trainer
import pytest

import reproduce
import simulate_bound
import soak_gateway


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        (soak_gateway, ["--seconds", "0"], "--seconds must be at least 2"),
        (soak_gateway, ["--seconds", "nan"], "--seconds must be at least 2"),
        (soak_gateway, ["--streams", "0"], "--streams: must be at least 1, not 0"),
        (soak_gateway, ["--faults", "3"], "--faults: must lie between 0 and 1, not 3"),
        (bench_trainer, ["--rollouts", "7"], "--rollouts must be a multiple of 16, not 7"),
        (bench_trainer, ["--turns", "0"], "--turns: must be at least 1, not 0"),
        (simulate_bound, ["--steps", "3"], "unrecognized arguments: --steps 3"),
    ],
)
def test_a_wrong_argument(
    script: ModuleType,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_no_model_to_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--model", str(tmp_path / "nosuch"), "--data", str(tmp_path / "data.jsonl")]
    monkeypatch.setattr(sys, "argv", ["bench_probe", *given])
    with pytest.raises(SystemExit, match=r"bench_probe: --model: "):
        bench_probe.main()


def test_results_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["reproduce", "--results-only", "--output", str(tmp_path / "none")]
    )
    assert reproduce.main() == 2
    assert "no run of the study is done in" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
