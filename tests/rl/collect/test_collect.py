"""The collector: full rollouts with outcomes, in a run's format, once each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from espo_gateway.testing import FakeServer, Script, Token
from espo_rl.collect.__main__ import DEFAULTS, probing
from espo_rl.collect.command import CollectCommand
from espo_rl.config import TaskSection
from espo_rl.evaluate.arguments import parse
from espo_rl.evaluate.results import EvaluationError
from espo_rl.record.rollout_files import read_rollouts
from espo_rl.tasks.gym import GymTask
from tests.helpers.evaluation import probe_answer
from tests.helpers.models import random_checkpoint


def saying(body: dict[str, Any]) -> Script:
    index, number = divmod(body["seed"], 65_536)
    return Script([Token(c, id=1) for c in f"2+#1#{index + number}"])


async def test_rollouts_are_graded_and_asked_once(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "model", 0)
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{i}", "answer": f"{i}"}) + "\n" for i in "01"))

    async def collect(server: FakeServer) -> bool:
        arguments = ["--model", str(model), "--data", str(data), "--url", server.url, "--plain"]
        arguments += ["--grader", "exact", "--k", "2", "--out", str(tmp_path / "out")]
        options = parse(arguments, defaults=DEFAULTS, more=probing)
        return await CollectCommand(options).run()

    async with FakeServer(saying) as server:
        assert await collect(server)
        asked = sum(body["max_tokens"] > 1 for body in server.bodies)
        files = sorted((tmp_path / "out" / "rollouts").iterdir())
        assert [file.name for file in files] == ["sums-00000000.parquet", "sums-00000001.parquet"]
        for file in files:
            rollouts, _ = read_rollouts(file)
            assert [rollout.correct for rollout in rollouts] == [True, False]
            assert len(rollouts[0].logprobs) == len(rollouts[0].token_ids) == 6
        files[1].unlink()
        assert await collect(server)
        assert sum(body["max_tokens"] > 1 for body in server.bodies) == asked + 2
        assert files[1].exists()
        files[0].write_bytes(files[0].read_bytes()[:100])
        with pytest.raises(EvaluationError, match=r"00\.parquet .*damaged.*; remove it"):
            await collect(server)


async def test_problems_of_reasoning_gym_graded_by_its_own_scorer(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "model", 0)
    arguments = ["--model", str(model), "--data", "reasoning-gym:chain_sum", "--limit", "3"]
    arguments += ["--grader", "task", "--k", "2", "--plain", "--out", str(tmp_path / "out")]

    problems = GymTask(TaskSection(kind="reasoning-gym", name="chain_sum")).held_out(3)

    def answer(body: dict[str, Any]) -> Script:
        index, number = divmod(body["seed"], 65_536)
        return Script([Token(c, id=1) for c in str(int(problems[index].answer) + number)])

    async with FakeServer(answer) as server:
        for _ in range(2):  # the second asks nothing again: the problems are the same ones
            options = parse([*arguments, "--url", server.url], defaults=DEFAULTS, more=probing)
            assert await CollectCommand(options).run()
        assert sum(body["max_tokens"] > 1 for body in server.bodies) == 6
    files = sorted((tmp_path / "out" / "rollouts").iterdir())
    assert [file.name for file in files] == [f"chain_sum-0000000{n}.parquet" for n in range(3)]
    for file in files:
        rollouts, _ = read_rollouts(file)
        assert [rollout.correct for rollout in rollouts] == [True, False]


async def test_probes_are_asked_along_and_kept(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "model", 0)
    data = tmp_path / "sums.jsonl"
    data.write_text(json.dumps({"problem": "0", "answer": "0"}) + "\n")

    def script(body: dict[str, Any]) -> Script:
        return probe_answer(body) if "logprob_token_ids" in body else saying(body)

    async with FakeServer(script) as server:
        arguments = ["--model", str(model), "--data", str(data), "--url", server.url, "--plain"]
        arguments += ["--grader", "exact", "--k", "1", "--out", str(tmp_path / "out")]
        options = parse([*arguments, "--probe-every", "2"], defaults=DEFAULTS, more=probing)
        assert await CollectCommand(options).run()
    [rollout], _ = read_rollouts(tmp_path / "out" / "rollouts" / "sums-00000000.parquet")
    assert rollout.probes == [[2, -0.5, -0.5, -0.1], [4, -0.5, -0.5, -0.1]]


def test_full_rollouts_have_no_gate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], prog="espo_rl.collect", defaults=DEFAULTS, more=probing)
    said = capsys.readouterr().out
    assert "(default: runs/collect-MODEL)" in said
    assert not {"--gate", "--audit"} & {*said.split()}


def test_a_refused_command_leaves_no_folder(tmp_path: Path) -> None:
    arguments = ["--model", "m", "--data", "d", "--out", str(tmp_path / "out")]
    options = parse([*arguments, "--probe-every", "-1"], defaults=DEFAULTS, more=probing)
    with pytest.raises(EvaluationError, match="--probe-every"):
        CollectCommand(options)
    assert not (tmp_path / "out").exists()
