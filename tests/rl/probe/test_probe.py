"""The command that probes recorded rollouts: each once, in order, whole files or none."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from espo_gateway.stop.rules import Gate
from espo_gateway.supervisor import free_port
from espo_gateway.testing import FakeServer, Script, Token
from espo_rl.probe.__main__ import main, parse
from espo_rl.probe.command import run
from espo_rl.record.rollout_files import read_rollouts, rollouts_table
from espo_rl.types import EndReason, Problem, Rollout
from tests.helpers.evaluation import probe_answer
from tests.helpers.models import random_checkpoint


def saying(body: dict[str, Any]) -> Script:
    """Log-likelihoods that tell how long the prefix was."""
    return probe_answer(body, -len(body["prompt"]) / 10)


def rollout(end: EndReason, tokens: int) -> Rollout:
    numbers = np.full(tokens, -0.5)
    return Rollout(
        Problem("p", "1+2", "3"),
        [1, 2],
        [5] * tokens,
        numbers,
        numbers,
        "",
        end,
        tokens,
        correct=True,
    )


def written(folder: Path, count: int = 2) -> Path:
    folder.mkdir()
    rollouts = [
        rollout(EndReason.COMPLETED, 8),
        rollout(EndReason.LENGTH, 8),
        dataclasses.replace(rollout(EndReason.ERROR, 0), error="gone"),
    ]
    for number in range(count):
        pq.write_table(rollouts_table(0, rollouts, Gate(), {}), folder / f"{number}.parquet")
    return folder


async def probe(server: FakeServer, folder: Path, model: Path, *more: str) -> int:
    arguments = [str(folder), "--url", server.url, "--model", str(model), "--every", "4"]
    arguments += ["--output", str(folder.with_name("probed")), "--phrase", "=", "--end", ";", *more]
    return await asyncio.to_thread(run, parse(arguments))


async def test_every_rollout_is_asked_about_once(tmp_path: Path) -> None:
    model, folder = random_checkpoint(tmp_path / "model", 0), written(tmp_path / "rollouts")
    async with FakeServer(saying) as server:
        assert await probe(server, folder, model) == 0
        asked = len(server.bodies)
        for name in ("0.parquet", "1.parquet"):
            rollouts, _ = read_rollouts(tmp_path / "probed" / name)
            # Two tokens of prompt, and one of phrase; at its last token a completed one is decided.
            assert [[token for token, *_ in one.probes] for one in rollouts] == [[4], [4, 8], []]
            assert rollouts[1].probes[1][1:] == pytest.approx([-1.1, -1.1, -0.1])
        (tmp_path / "probed" / "1.parquet").unlink()
        assert await probe(server, folder, model) == 0
    assert asked == 6
    assert len(server.bodies) == asked + 3


async def test_what_else_stands_in_the_files_stays(tmp_path: Path) -> None:
    model, folder = random_checkpoint(tmp_path / "model", 0), written(tmp_path / "rollouts", 1)
    table = pq.read_table(folder / "0.parquet")
    valued = table.append_column("values", pa.array([[0.5], [0.25], []], pa.list_(pa.float64())))
    about = {**table.schema.metadata, b"espo.recipe": b"mine"}
    pq.write_table(valued.replace_schema_metadata(about), folder / "0.parquet")
    async with FakeServer(saying) as server:
        assert await probe(server, folder, model) == 0
    probed = pq.read_table(tmp_path / "probed" / "0.parquet")
    assert probed["values"].to_pylist() == [[0.5], [0.25], []]
    assert probed.schema.metadata[b"espo.recipe"] == b"mine"


async def test_a_failed_probe_leaves_no_half_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = random_checkpoint(tmp_path / "model", 0), written(tmp_path / "rollouts", 1)
    async with FakeServer(Script([Token("a", id=0)])) as server:
        assert await probe(server, folder, model) == 1
    assert "logprob_token_ids" in capsys.readouterr().err
    assert list((tmp_path / "probed").glob("*.parquet*")) == []


@pytest.mark.parametrize(
    "changed", [["--every", "2"], ["--growth", "1"], ["--phrase", "so"], ["--end", "!"]]
)
async def test_a_folder_is_not_gone_on_with_by_other_questions(
    changed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = random_checkpoint(tmp_path / "model", 0), written(tmp_path / "rollouts", 1)
    async with FakeServer(saying) as server:
        assert await probe(server, folder, model) == 0
        asked = len(server.bodies)
        assert await probe(server, folder, model, *changed) == 2
    assert len(server.bodies) == asked
    assert f"{changed[0].removeprefix('--')}: " in capsys.readouterr().err


async def test_a_folder_is_not_gone_on_with_about_other_rollouts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_checkpoint(tmp_path / "model", 0)
    one, other = written(tmp_path / "rollouts", 1), written(tmp_path / "others", 1)
    async with FakeServer(saying) as server:
        assert await probe(server, one, model) == 0
        assert await probe(server, other, model) == 2
    assert "rollouts: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--output", "out"], "holds no rollouts"),
        (["rollouts", "--output", "rollouts"], "another folder"),
        (["rollouts", "other", "--output", "out"], "one name"),
        (["rollouts", "--output", "out"], "--model: no folder m"),
        (["rollouts", "--output", "out", "--url", "host:80"], "--url: 'host:80' must be written"),
        (["rollouts", "--output", "out", "--url", "http://host/v1"], "leave out /v1"),
    ],
)
def test_folders_that_cannot_work_are_refused(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written(tmp_path / "rollouts")
    written(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert main(["--url", "http://127.0.0.1:9", "--model", "m", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_server_that_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = random_checkpoint(tmp_path / "model", 0), written(tmp_path / "rollouts", 1)
    given = ["--url", f"http://127.0.0.1:{free_port()}", "--model", str(model)]
    assert main([str(folder), *given, "--output", str(tmp_path / "out")]) == 1
    assert "--url: nothing answers there" in capsys.readouterr().err


@pytest.mark.parametrize("growth", ["-1", "nan", "inf", "200"])
def test_a_growth_that_is_none(growth: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["r", "--url", "u", "--model", "m", "--output", "o", f"--growth={growth}"])
    assert "--growth must lie between 0 and 100" in capsys.readouterr().err
