"""What a run shows in the terminal: bars, lines, and what changed."""

from __future__ import annotations

import builtins
import io
import math
import os
import pty
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from espo_rl.config import Recipe
from espo_rl.record import progress
from espo_rl.record.log import RunLog, step_line
from espo_rl.record.progress import progress_bar
from tests.helpers.run_log import recipe_for


def test_a_change_of_stopping_is_said_once(tmp_path: Path) -> None:
    said = io.StringIO()
    log = RunLog(recipe_for(tmp_path), Console(file=said, soft_wrap=True))
    with log:
        for on, reason in [
            (False, "warm-up: 1 of 2"),
            (True, "2 of 2 batches"),
            (True, "2 of 2 batches"),
            (False, "false positives above the bound"),
        ]:
            log.stopping(on, reason)
    assert said.getvalue().splitlines() == [
        "stopping is on: 2 of 2 batches",
        "stopping is off: false positives above the bound",
    ]


def test_the_line_of_a_step() -> None:
    row: dict[str, float | str | bool | None] = {
        "rollout/reward": 0.314,
        "rollout/stop_share": 0.4,
        "rollout/audited": 12,
        "rollout/audited_correct": 1,
        "stopping/bound_upper": 0.048,
        "rollout/tokens": 7012,
        "rollout/tokens_saved_share": math.nan,
        "stopping/on": True,
        "stopping/rule": "value-gated",
        "stopping/threshold": 2.34567,
    }
    line = step_line(3, 40, row)
    assert line.startswith(
        "step 3/40  reward 0.31  accuracy –  stopped 40% (right 1 of 12 audited, bound ≤ 4.8%)"
    )
    assert "tokens 7,012 (– saved)" in line
    assert line.endswith("[value-gated at 2.35]")
    off = step_line(1, 40, {"stopping/on": False, "stopping/reason": "warm-up: 1 of 2"})
    assert off.endswith("[off: warm-up: 1 of 2]")
    assert "nan" not in (line + off).lower()


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Progress]:
    """The bars of the logs made in a test."""
    made: list[Progress] = []

    def keep(**options: Any) -> Progress:
        made.append(progress_bar(**options))
        return made[-1]

    monkeypatch.setattr(progress, "progress_bar", keep)
    return made


def watch(console: Console, recipe: Recipe, bars: list[Progress]) -> None:
    """One step, as a run shows it."""
    with RunLog(recipe, console) as log, log.phase("rollouts", total=2) as advance:
        advance()
        log.step(1, rollout={"tokens": 5}, stopping={})
        bars[-1].refresh()  # not left to its thread's clock


@pytest.fixture
def terminal() -> Iterator[tuple[io.TextIOWrapper, int]]:
    """What a program writes to, and where that is read."""
    read, write = pty.openpty()
    with builtins.open(write, "w") as file:
        yield file, read
    os.close(read)


@pytest.mark.timeout(30)
def test_a_terminal_has_bars(
    tmp_path: Path,
    terminal: tuple[io.TextIOWrapper, int],
    monkeypatch: pytest.MonkeyPatch,
    bars: list[Progress],
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file, read = terminal
    watch(Console(file=file, width=200), recipe_for(tmp_path), bars)
    file.flush()
    # A terminal hands on what was written piece by piece: what is missing here never comes.
    seen = ""
    wanted = ("steps (rollouts)", "  rollouts", "1/4 ", "1/2 ", "step 1/4  reward")
    while not all(text in seen for text in wanted):
        seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(read, 1 << 16).decode())
    assert seen.count("step 1/4") == 1


def test_a_file_has_lines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bars: list[Progress]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CIs do
    said = io.StringIO()
    watch(Console(file=said, highlight=False, soft_wrap=True), recipe_for(tmp_path), bars)
    (line,) = said.getvalue().splitlines()
    assert line.startswith("step 1/4  reward")


def test_phases_within_phases(tmp_path: Path, bars: list[Progress]) -> None:
    log = RunLog(recipe_for(tmp_path), Console(file=io.StringIO()))

    def shown() -> list[str]:
        return [task.description for task in bars[-1].tasks]

    with log:
        with log.phase("evaluation"), log.phase("rollouts", total=2):
            assert shown() == ["steps (rollouts)", "  rollouts"]
        with log.phase("update"):
            assert shown() == ["steps (update)"]
        assert shown() == ["steps"]
