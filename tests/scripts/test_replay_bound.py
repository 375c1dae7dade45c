"""The trainer's bound, played over recorded rollouts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from espo_rl.config import Stopping
from replay_bound import cut, joined, play
from tests.helpers.simulated import LENGTH, simulate


def test_prompts_of_joined_runs_stay_apart_and_steps_are_those_of_all() -> None:
    runs = [[simulate(4, 10 * run + step) for step in range(3)] for run in range(2)]
    [first, *_] = together = joined(runs)
    assert [len(step) for step in together] == [8] * 3
    assert sorted(rollout.group for rollout in first) == list(range(8))
    assert [rollout.group for rollout in runs[1][0]] == list(range(4))


def test_training_does_not_see_how_a_stopped_rollout_would_have_ended() -> None:
    [rollout] = simulate(1, 0)
    seen, audited = (cut(rollout, 7, audited=told) for told in (False, True))
    assert (seen.correct, len(seen.token_ids), len(seen.max_logprobs)) == (None, 7, 7)
    assert (audited.correct, len(audited.token_ids)) == (rollout.correct, LENGTH)
    assert seen.stopped
    assert audited.stopped
    assert len(rollout.token_ids) == LENGTH


def test_more_rollouts_a_step_save_more_under_the_same_bound() -> None:
    runs = [[simulate(32, 100 * run + step) for step in range(12)] for run in range(6)]
    config = Stopping()
    few, many = play(runs[0], config, 1, 0), play(joined(runs), config, 1, 0)
    assert many[0] > few[0] + 0.05
    assert many[1] < 0.05
    # A slip costs all that follows, and a rollout that slips has failed.
    assert 0.2 < many[2] < 0.7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--joined", "2"], "--joined 2: 1 runs are given"),
        (["--draws", "0"], "--draws must be at least 1"),
        ([], "has no full rollouts: give runs of stopping.rule=none"),
    ],
)
def test_what_cannot_be_played_is_refused(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rollout/tokens": 9}\n')
    (tmp_path / "recipe.json").write_text(json.dumps({"stopping": {"rule": "regret-only"}}))
    script = Path(__file__).parents[2] / "scripts" / "replay_bound.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *arguments], capture_output=True, text=True
    )
    assert done.returncode
    assert said in done.stderr
    assert "Traceback" not in done.stderr
