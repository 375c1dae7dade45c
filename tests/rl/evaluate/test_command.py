"""The command of an evaluation: what it leaves and takes up again; a real vLLM at last."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from espo_gateway.stop.told import Schedule
from espo_gateway.testing import FakeServer, Script
from espo_rl.evaluate.arguments import make_recipe, parse
from espo_rl.evaluate.command import Command
from espo_rl.evaluate.results import EvaluationError
from tests.helpers.evaluation import (
    ANSWERS,
    DOUBTFUL,
    Answers,
    answering,
    place,
    probe_answer,
    run,
    with_estimate,
)
from tests.helpers.gateway import GATE

pytestmark = pytest.mark.usefixtures("retry_at_once")


def results(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "out" / "results.json").read_text())


async def test_the_command_leaves_results_and_a_table(
    arguments: list[str], tmp_path: Path, capsys: Any
) -> None:
    await run(arguments, answering(ANSWERS))
    content = results(tmp_path)
    sums = content["results"]["sums"]
    assert sums["avg@2"]["value"] == pytest.approx(0.5)
    assert sums["avg@2"]["interval"][0] < 0.5 < sums["avg@2"]["interval"][1]
    assert sums["pass@2"]["value"] == pytest.approx(2 / 3)
    assert sums["maj@2"]["value"] == pytest.approx(0.5)
    assert (sums["problems"], sums["samples"], sums["errors"]) == (3, 6, 0)
    assert content["settings"]["k"] == 2
    assert content["settings"]["temperature"] == 0.6
    assert {"python", "torch", "transformers"} <= set(content["versions"])
    assert content["machine"]["cpus"] == os.cpu_count()
    said = capsys.readouterr().out
    for heading in ("avg@2", "maj@2", "pass@2", "errors"):
        assert heading in said
    assert "66.7" in said
    lines = (tmp_path / "out" / "sums.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["index"] for line in lines) == [0, 1, 2]


def asked(server: FakeServer) -> list[dict[str, Any]]:
    """The samples' requests; the gateway's own, as it starts, are of one token."""
    return [body for body in server.bodies if body.get("max_tokens") != 1]


async def test_the_same_command_asks_nothing_again(arguments: list[str], tmp_path: Path) -> None:
    await run(arguments, answering(ANSWERS))
    first = results(tmp_path)["results"]
    assert asked(await run(arguments, answering(ANSWERS))) == []
    assert results(tmp_path)["results"] == first


async def test_failed_samples_are_shown_and_asked_again(
    arguments: list[str], tmp_path: Path, capsys: Any
) -> None:
    failing: Answers = [["0", Script([], status=400)], *ANSWERS[1:]]
    async with FakeServer(answering(failing)) as server:
        assert not await Command(parse([*arguments, "--url", server.url])).run()
    assert "1 samples failed and are counted nowhere" in capsys.readouterr().out
    assert results(tmp_path)["results"]["sums"]["errors"] == 1
    server = await run(arguments, answering(ANSWERS))
    assert list(map(place, asked(server))) == [(0, 1)]
    sums = results(tmp_path)["results"]["sums"]
    assert (sums["samples"], sums["errors"]) == (6, 0)
    assert sums["avg@2"]["value"] == pytest.approx(0.5)
    # The completed line has the texts of both.
    last = json.loads((tmp_path / "out" / "sums.jsonl").read_text().splitlines()[-1])
    assert [sample["text"] for sample in last["samples"]] == ["2+#1#0", "2+#1#7"]


async def test_results_of_other_data_sets_stay(
    arguments: list[str], data: Path, tmp_path: Path
) -> None:
    await run(arguments, answering(ANSWERS))
    sums = results(tmp_path)["results"]["sums"]
    other = data.rename(tmp_path / "other.jsonl")  # noqa: ASYNC240
    await run([*arguments, "--data", str(other)], answering(ANSWERS))
    assert results(tmp_path)["results"].keys() == {"sums", "other"}
    assert results(tmp_path)["results"]["sums"] == sums
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(EvaluationError, match=r"results\.json is damaged"):
        await run([*arguments, "--data", str(other)], answering(ANSWERS))


async def test_more_problems_go_on_with_those_there(
    arguments: list[str], tmp_path: Path, capsys: Any
) -> None:
    await run([*arguments, "--limit", "2"], answering(ANSWERS))
    assert results(tmp_path)["results"]["sums"]["problems"] == 2
    server = await run(arguments, answering(ANSWERS))
    assert sorted(map(place, asked(server))) == [(2, 0), (2, 1)]
    capsys.readouterr()
    assert asked(await run([*arguments, "--limit", "1"], answering(ANSWERS))) == []
    assert results(tmp_path)["results"]["sums"]["problems"] == 1
    assert "sums: 3 problems were in results.json, 1 are now" in capsys.readouterr().out


async def test_half_a_line_is_forgotten(arguments: list[str], tmp_path: Path) -> None:
    await run(arguments, answering(ANSWERS))
    first = results(tmp_path)["results"]
    path = tmp_path / "out" / "sums.jsonl"
    lines = path.read_text().splitlines()
    cut = json.loads(lines[-1])["index"]
    path.write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    server = await run(arguments, answering(ANSWERS))
    assert sorted(map(place, asked(server))) == [(cut, 0), (cut, 1)]
    assert results(tmp_path)["results"] == first
    assert all(json.loads(line) for line in path.read_text().splitlines())


async def test_a_gate_is_pushed_and_reported(
    arguments: list[str], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "gate.json").write_bytes(GATE)
    gated = [*arguments, "--gate", str(tmp_path / "gate.json"), "--audit", "1"]
    await run(gated, answering([[DOUBTFUL, "0"]] * 3))
    sums = results(tmp_path)["results"]["sums"]
    assert sums["stopped"]["value"] == 0.5
    assert sums["false_positives"]["value"] == pytest.approx(1 / 3)
    assert sums["tokens_saved"] == pytest.approx(1 - (8 + 6) / (12 + 6))
    assert sums["overshoot_tokens"] == 0  # an audit goes on by intent
    assert results(tmp_path)["settings"]["gate"]["beta"] == 1.0
    assert "false stops" in capsys.readouterr().out


async def test_a_gate_that_reads_the_probe_has_it(arguments: list[str], tmp_path: Path) -> None:
    schedule = Schedule(every=2, growth=0.0)
    (tmp_path / "gate.json").write_text(with_estimate("probe", schedule=schedule, p_star=0.6))
    asked_about: list[str] = []

    def script(body: dict[str, Any]) -> Script:
        if "logprob_token_ids" not in body:
            return answering(ANSWERS)(body)
        asked_about.append(body["model"])
        return probe_answer(body)

    await run([*arguments, "--gate", str(tmp_path / "gate.json"), "--audit", "1"], script)
    assert asked_about
    # Weights of 0: half a chance, and that is below p*.
    assert results(tmp_path)["results"]["sums"]["stopped"]["value"] > 0.5


def test_a_slow_answer_has_time(arguments: list[str]) -> None:
    assert make_recipe(parse(arguments)).rollout.timeout == 3600.0
    assert make_recipe(parse([*arguments, "--timeout", "7200"])).rollout.timeout == 7200.0


# -- as a process ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
async def test_a_stopped_command_leaves_no_process_and_goes_on(
    arguments: list[str], tmp_path: Path, how: signal.Signals
) -> None:
    async with FakeServer(answering(ANSWERS), gated=True) as server:
        started = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "espo_rl.evaluate", *arguments),
            *("--url", server.url, "--concurrency", "1"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        # Two tokens for the gateway's start, and five samples of six; once the next is asked for,
        # two problems are on disk.
        server.release(2 + 5 * 6)
        await server.until(lambda: len(asked(server)) == 6)
        family = psutil.Process(started.pid).children(recursive=True)
        assert len(family) >= 2  # the gateway and its guard
        started.send_signal(how)
        said = (await started.communicate())[0].decode()
        _, left = psutil.wait_procs(family, timeout=30 if how is signal.SIGKILL else 0)
        assert left == []
        if how is signal.SIGINT:
            assert started.returncode == 130
            assert said.splitlines()[-1] == "espo: interrupted; the same command goes on"
            assert "Traceback" not in said
    path = tmp_path / "out" / "sums.jsonl"
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1]
    with path.open("a") as file:
        file.write('{"index": 2, "samples": [{"en')
    again = await run(arguments, answering(ANSWERS))
    assert sorted(map(place, asked(again))) == [(2, 0), (2, 1)]
    sums = results(tmp_path)["results"]["sums"]
    assert (sums["samples"], sums["avg@2"]["value"]) == (6, pytest.approx(0.5))


@pytest.mark.vllm
@pytest.mark.asyncio(loop_scope="session")
async def test_a_real_server(vllm_server: Any, tmp_path: Path) -> None:
    """A random policy, sampled with different seeds, and the same again with the same ones.

    The prompts are more than the server takes in one step: chunked, seeded ones would end it.
    """
    prompts = [f"{i:02d}" * 220 for i in range(24)]
    rows = [json.dumps({"problem": prompt, "answer": "1"}) for prompt in prompts]
    data = tmp_path / "long.jsonl"
    data.write_text("\n".join(rows))

    async def texts(out: Path) -> tuple[list[list[str]], Any]:
        arguments = ["--model", str(vllm_server.path), "--data", str(data), "--out", str(out)]
        asked = ["--k", "4", "--max-tokens", "12", "--temperature", "1", "--grader", "exact"]
        assert await Command(parse([*arguments, *asked, "--url", vllm_server.url])).run()
        rows = map(json.loads, (out / "long.jsonl").read_text().splitlines())
        samples = [row["samples"] for row in sorted(rows, key=lambda row: row["index"])]
        report = json.loads((out / "results.json").read_text())["results"]["long"]
        return [[sample["text"] for sample in problem] for problem in samples], report

    first, report = await texts(tmp_path / "first")
    assert sum(len(set(problem)) > 1 for problem in first) > 12
    assert (report["problems"], report["samples"], report["errors"]) == (24, 96, 0)
    assert 0 < report["mean_tokens"] <= 12
    assert 0.0 <= report["avg@4"]["value"] <= report["pass@4"]["value"] <= 1.0
    assert (await texts(tmp_path / "second"))[0] == first
