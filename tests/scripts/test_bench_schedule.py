"""`scripts/bench_schedule.py`: what its numbers say. The runs themselves need a vLLM."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench_schedule
import pytest
from bench_schedule import RULE, SETTINGS, summary, table

from espo_rl.config import load_recipe


def test_what_is_saved_is_told_of_each_schedule() -> None:
    found = {
        "plain, batch": [{"seconds": 4.0, "tokens": 1000.0}, {"seconds": 6.0, "tokens": 1000.0}],
        "stopping, batch": [{"seconds": 4.75, "tokens": 700.0}] * 2,
        "plain, refill": [{"seconds": 4.0, "tokens": 1000.0}] * 2,
        "stopping, refill": [{"seconds": 3.0, "tokens": 700.0}] * 2,
    }
    means = summary(found)
    assert means["plain, batch"]["seconds"] == 5.0
    assert means["stopping, batch"]["tokens_saved"] == pytest.approx(0.3)
    assert means["stopping, batch"]["ratio"] == pytest.approx(0.05 / 0.3)
    assert means["stopping, refill"]["ratio"] == pytest.approx(0.25 / 0.3)
    rows = table(means).splitlines()
    assert rows[0] == "|  | seconds | tokens | tokens_saved | time_saved | ratio |"
    assert rows[2] == "| plain, batch | 5 | 1e+03 | – | – | – |"


@pytest.mark.parametrize("schedule", ["batch", "refill"])
def test_its_settings_are_a_recipe(schedule: str) -> None:
    recipe = load_recipe("arithmetic", [*SETTINGS, *RULE, f"rollout.schedule={schedule}"])
    assert recipe.rollout.ahead == (schedule == "refill")


def test_steps_that_are_all_not_counted_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_schedule", "--model", "base", "--steps", "6"])
    with pytest.raises(SystemExit):
        bench_schedule.main()
    assert "--steps must be above 6" in capsys.readouterr().err


def test_what_is_measured_is_written_after_each_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour of runs is not lost with the last one."""
    seen: list[list[str]] = []

    def measured(recipe: str, settings: list[str]) -> dict[str, float]:
        seen.append(settings)
        if len(seen) == 7:
            raise KeyboardInterrupt
        return {"seconds": 2.0 - len(seen) / 10, "tokens": 100.0 - len(seen)}

    monkeypatch.setattr(bench_schedule, "measured", measured)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["bench_schedule", "--model", "base", "--json", str(out)])
    with pytest.raises(KeyboardInterrupt):
        bench_schedule.main()
    told = json.loads(out.read_text())
    assert [len(runs) for runs in told["runs"].values()] == [1] * 4
    assert told["stopping, refill"]["tokens"] == 96.0
    assert "1 of 3 seeds" in capsys.readouterr().out
