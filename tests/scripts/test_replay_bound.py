"""The trainer's bound, played over recorded rollouts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from espo_gateway.stop.rules import Gate
from espo_rl.config import Stopping, load_recipe
from espo_rl.record.rollout_files import RolloutFiles
from espo_rl.types import Rollout
from replay_bound import Fidelity, cut, joined, play
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


def fidelity_of(step: list[Rollout], seen: list[Rollout]) -> list[float]:
    fidelity = Fidelity()
    fidelity.add(step, seen)
    return fidelity.told()


def test_how_near_the_advantages_come_to_those_of_full_rollouts() -> None:
    """Two prompts of four, of which one has two right rollouts and the other, all right, says
    nothing: a failure that is cut loses tokens, a right one that is stopped its label, too."""
    step = simulate(8, 0)
    for i, rollout in enumerate(step):
        rollout.group, rollout.correct = i // 4, i >= 2
    assert fidelity_of(step, step) == [1.0, 1.0, 1.0]
    quarter = LENGTH // 4
    failure = [cut(step[0], quarter, audited=False), *step[1:]]
    # Of four rollouts with advantages of 1 and -1 one has a quarter of its tokens left.
    short = (3.25 / 4) ** 0.5
    assert fidelity_of(step, failure) == pytest.approx([short, 1.0, short])
    # An audited failure is cut as well; an audited right one is not.
    audited = [cut(step[0], quarter, audited=True), *step[1:]]
    assert fidelity_of(step, audited)[2] == pytest.approx(short)
    spared = [*step[:2], cut(step[2], quarter, audited=True), *step[3:]]
    assert fidelity_of(step, spared) == [1.0, 1.0, 1.0]
    lost = [*step[:2], cut(step[2], quarter, audited=False), *step[3:]]
    both, labels, cuts = fidelity_of(step, lost)
    # One of four is right now: 3**0.5 for it and -1/3**0.5 for the others.
    assert labels == pytest.approx((2 + 3 - 1) / 3**0.5 / 4)
    assert cuts == pytest.approx(short)
    assert labels < both < 1.0  # fewer tokens have the wrong label
    # And of the prompt that said nothing a failure is made.
    assert fidelity_of(step, [*step[:7], cut(step[7], quarter, audited=False)])[1] < 1.0
    # With all right ones lost no lesson is left.
    none = [*step[:2], *(cut(one, quarter, audited=False) for one in step[2:])]
    assert fidelity_of(step, none)[:2] == [0.0, 0.0]


def test_a_run_without_a_lesson_has_none_to_lose_and_may_make_one_up() -> None:
    step = simulate(4, 0)
    for rollout in step:
        rollout.correct, rollout.group = True, 0
    assert np.isnan(fidelity_of(step, step)).all()
    both, labels, cuts = fidelity_of(step, [cut(step[0], 9, audited=False), *step[1:]])
    assert (both, labels) == (0.0, 0.0)
    assert np.isnan(cuts)


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
    # Each prompt has one rollout here, so there are no advantages.
    assert alone[6:9] == ["–"] * 3
    stopped = []
    for share in (0.1, 0.5):
        done = run_script(*runs, "--rule", "regret-only", "--share", share, "--draws", 1)
        assert not done.returncode, done.stderr
        stopped.append(float(done.stdout.splitlines()[-1].split("|")[5].split("%")[0]))
    assert stopped[0] + 10 < stopped[1]


def test_what_cannot_be_played_is_refused(tmp_path: Path) -> None:
    whole, short = make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1, steps=3)
    stopped = make_run(tmp_path / "c", 2, stopped=True)
    told = make_run(tmp_path / "e", 4, told=True)
    damaged = make_run(tmp_path / "d", 3)
    (damaged / "rollouts" / "step-00000002.parquet").write_text("x")
    for arguments, said in (
        ((whole, "--joined", 2), "--joined 2: 1 runs are given"),
        ((whole, "--draws", 0), "--draws must be at least 1"),
        ((whole, "--rule", "random"), "--rule random keeps no bound: give it a --share"),
        ((whole, "--share", 1.5), "--share must lie between 0 and 1, not 1.5"),
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
