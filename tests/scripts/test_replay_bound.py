"""The trainer's bound, played over recorded rollouts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from espo_gateway.stop.rules import Gate
from espo_rl.config import Stopping, load_recipe
from espo_rl.record.rollout_files import RolloutFiles
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


def test_a_recorded_v_is_read() -> None:
    """Where the stream tells nothing of a failure and V all of it."""
    steps = [simulate(32, step) for step in range(12)]
    for rollout in (one for step in steps for one in step):
        rollout.logprobs = rollout.max_logprobs = np.full(LENGTH, -0.1)
        rollout.values = np.where(np.arange(LENGTH) < 9, 0.0, 1.0 if rollout.correct else -1.0)
    blind = play(steps, Stopping(), 1, 0)
    told = play(
        steps, Stopping(sources=["critic"], value_head=Path("recorded"), value_every=4), 1, 0
    )
    assert told[0] > 0.2 > blind[0] + 0.1
    assert told[1] == 0.0


def make_run(
    folder: Path, seed: int, *, steps: int = 8, stopped: bool = False, told: bool = False
) -> Path:
    """The folder of a run without stopping, or with a rollout of each step stopped; told: V."""
    recipe = load_recipe("arithmetic", [f"run.output={folder}", "rollout.n=1"])
    files = RolloutFiles(recipe)
    for step in range(1, steps + 1):
        rollouts = simulate(16, 100 * seed + step)
        if stopped:
            rollouts[3] = cut(rollouts[3], 5, audited=True)
        for rollout in rollouts if told else ():
            rollout.values = np.zeros(len(rollout.token_ids))
        files.write(step, rollouts, Gate(rule="none"))
    (folder / "metrics.jsonl").write_text('{"step": 1, "rollout/tokens": 9}\n')
    (folder / "recipe.json").write_text(json.dumps({"rollout": {"n": 1}}))
    return folder


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[2] / "scripts" / "replay_bound.py"
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_table_is_of_runs_alone_and_joined(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), seed, told=True) for seed in range(3)]
    assert not run_script(*runs, "--head", "--draws", 1).returncode
    done = run_script(*runs, "--joined", 1, 3, "--draws", 2)
    assert not done.returncode, done.stderr
    alone, together = ([*map(str.strip, line.split("|"))] for line in done.stdout.splitlines()[2:])
    assert alone[1:3] == ["16", "6"]
    assert together[1:3] == ["48", "2"]


def test_what_cannot_be_played_is_refused(tmp_path: Path) -> None:
    whole, short = make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1, steps=3)
    stopped = make_run(tmp_path / "c", 2, stopped=True)
    told = make_run(tmp_path / "e", 4, told=True)
    damaged = make_run(tmp_path / "d", 3)
    (damaged / "rollouts" / "step-00000002.parquet").write_text("x")
    for arguments, said in (
        ((whole, "--joined", 2), "--joined 2: 1 runs are given"),
        ((whole, "--draws", 0), "--draws must be at least 1"),
        ((stopped,), "has no full rollouts: give runs of stopping.rule=none"),
        ((told, whole, "--head"), f"--head: {whole} recorded no V of one"),
        ((told, "--head", "--rule", "surprise"), "--head: --rule surprise reads no V"),
        ((whole, short), "give runs of one recipe, with all steps' rollouts there"),
        ((damaged,), "holds no rollouts, or is damaged"),
    ):
        done = run_script(*arguments)
        assert done.returncode
        assert said in done.stderr
        assert "Traceback" not in done.stderr
