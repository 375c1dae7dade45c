"""The command of an evaluation: what it leaves, refuses and takes up again; a real vLLM at last."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from espo_gateway.stop.estimate import FEATURES, SuccessEstimator
from espo_gateway.stop.gate_json import gate_to_dict
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import TOLD, Schedule, SourceName
from espo_gateway.supervisor import ServerProcess, free_port
from espo_gateway.testing import FakeServer, Script
from espo_rl.evaluate.__main__ import main
from espo_rl.evaluate.arguments import make_recipe, parse
from espo_rl.evaluate.command import Command
from espo_rl.evaluate.results import EvaluationError
from espo_rl.evaluate.results_folder import ResultsFolder
from tests.helpers.evaluation import DOUBTFUL, PROBLEMS, Answers, answering, place, probe_answer
from tests.helpers.gateway import (
    GATE,
)
from tests.helpers.models import random_checkpoint

pytestmark = pytest.mark.usefixtures("retry_at_once")


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


ANSWERS = [["0", "7"], ["1", "1"], ["7", "7"]]


async def run(arguments: list[str], script: Any) -> FakeServer:
    """The command against a scripted server; what it was asked."""
    async with FakeServer(script) as server:
        await Command(parse([*arguments, "--url", server.url])).run()
    return server


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


# -- refused ---------------------------------------------------------------------------------------


def refusal(arguments: list[str], monkeypatch: Any, capsys: Any) -> str:
    """What the command says that must end with code 2 and start nothing."""

    async def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(ServerProcess, "start", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["espo_rl.evaluate", *arguments])
    code: str | int | None
    try:
        code = main()
    except SystemExit as exit:
        code = exit.code
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--k", "3"], "k: 2 there, 3 now"),
        (["--temperature", "1.0"], "temperature: 0.6 there, 1.0 now"),
        (["--top-p", "1.0"], "top_p"),
        (["--max-tokens", "21"], "max_tokens"),
        (["--seed", "1"], "seed"),
        (["--plain"], "chat"),
        (["--system", "s"], "system"),
        (["--template", "a {problem}"], "template"),
        (["--grader", "math"], "grader"),
        (["--thought-tags", "<a>", "</a>"], "thought_tags"),
        (["--answer-tags"], "answer_tags: None there, [] now"),
        (["--gate", "gate.json"], "gate"),
    ],
)
def test_other_settings_are_refused(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
    change: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gate.json").write_bytes(GATE)
    Command(parse(arguments))
    (tmp_path / "out" / "sums.jsonl").write_text("a result")
    said = refusal([*arguments, *change], monkeypatch, capsys)
    assert f"  {named}" in said
    assert "another --out" in said


def test_a_model_trained_on_since_is_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    own = random_checkpoint(tmp_path / "own", 0)
    arguments = [*arguments, "--model", str(own)]
    Command(parse(arguments))
    (tmp_path / "out" / "sums.jsonl").write_text("a result")
    random_checkpoint(own, 1)
    assert "model_files" in refusal(arguments, monkeypatch, capsys)


async def test_other_problems_under_the_same_name_are_refused(
    arguments: list[str], data: Path
) -> None:
    await run(arguments, answering(ANSWERS))
    changed = data.read_text().replace('"answer": "1"', '"answer": "5"')  # noqa: ASYNC240
    data.write_text(changed)  # noqa: ASYNC240
    with pytest.raises(EvaluationError, match="the data has changed"):
        await run(arguments, answering(ANSWERS))


async def test_a_damaged_line_is_named(arguments: list[str], tmp_path: Path) -> None:
    await run(arguments, answering(ANSWERS))
    path = tmp_path / "out" / "sums.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first[:30] + "\n", *others]))
    with pytest.raises(EvaluationError, match="line 1, is damaged"):
        await run(arguments, answering(ANSWERS))


def test_settings_hold_from_the_first_result_on(tmp_path: Path) -> None:
    """A command that came to nothing is corrected; one that still runs is left alone."""
    first = ResultsFolder(tmp_path / "out", {"k": 1})
    with pytest.raises(EvaluationError, match="k: 1 there, 2 now"):
        ResultsFolder(tmp_path / "out", {"k": 2})
    ResultsFolder(tmp_path / "out", {"k": 1})
    del first
    (tmp_path / "out" / "logs").mkdir()
    (tmp_path / "out" / "logs" / "server.log").write_text("it did not start")
    (tmp_path / "out" / "sums.jsonl").touch()
    ResultsFolder(tmp_path / "out", {"k": 2})
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == {"k": 2}
    (tmp_path / "out" / "sums.jsonl").write_text("a result")
    with pytest.raises(EvaluationError, match="k: 2 there, 3 now"):
        ResultsFolder(tmp_path / "out", {"k": 3})


async def test_a_server_that_does_not_answer(arguments: list[str]) -> None:
    with pytest.raises(EvaluationError, match="--url: nothing answers at"):
        await Command(parse([*arguments, "--url", f"http://127.0.0.1:{free_port()}"])).run()


def test_a_model_that_cannot_be_loaded(
    arguments: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    said = refusal([*arguments, "--model", str(tmp_path)], monkeypatch, capsys)
    assert f"--model: {tmp_path} cannot be loaded" in said


def test_two_evaluations_never_write_the_same_file(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path, {})
    with (tmp_path / "sums.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(EvaluationError, match="another evaluation"), folder.results("sums", []):
            pass
    with folder.results("sums", []):
        pass


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--model", "/no/such/model"], "--model: no folder /no/such/model"),
        (["--model", "runs/base"], "make it: python -m espo_rl.base_model --out runs/base"),
        (["--answer-pattern", "("], "--answer-pattern = '(' is no regular expression"),
        (["--chat-template-kwargs", "{a"], "'{a' is no JSON object; write it like '{"),
        (["--chat-template-kwargs", "[]"], "'[]' is no JSON object"),
        (["--data", "/no/such.jsonl"], "--data: No such file or folder: /no/such.jsonl"),
        (["--problem-column", "question"], "--problem-column = 'question': no text or number"),
        (["--answer-column", "solution"], "--answer-column = 'solution': no text or number"),
        (["--answer-pattern", "#### (.*)"], "--answer-pattern = '#### (.*)' finds nothing"),
        (["--grader", "no.such:grader"], "--grader = 'no.such:grader' cannot be imported"),
        (["--gate", "/no/gate.json"], "--gate /no/gate.json"),
        (["--grader", "regex"], '--grader = "regex" needs'),
        (["--template", "no place"], "--template must hold {problem}"),
        (["--k", "0"], "--k = 0"),
        (["--limit", "0"], "--limit"),
        (["--audit", "2"], "--audit = 2"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--", "typo"], "typo"),
        (["--k", "70000"], "--k = 70000"),
        (["--seed", "-1"], "--seed = -1"),
        (["--seed", str(2**63)], "--seed = "),
        (["--temperature", "2.5"], "--temperature = 2.5"),
        (["--temperature", "0.001"], "--temperature = 0.001"),
        (["--temperature", "nan"], "--temperature = nan"),
        (["--top-p", "0"], "--top-p = 0"),
        (["--concurrency", "100000"], "--concurrency = 100000"),
        (["--max-tokens", str(2**31)], "--max-tokens"),
        (["--url", "http://127.0.0.1:99999"], "--url: "),
        (["--plain", "--system", "s"], "--system has no effect with --plain"),
        (["--pattern", "is (.*)"], "--pattern has no effect with --grader"),
        (["--thought-tags", "<a>"], "--thought-tags: must be OPEN CLOSE"),
        (["--answer-tags", "<a>", ""], "--answer-tags: String should have at least 1 character"),
        (["--answer-tags", "--grader", "my:own"], "--answer-tags has no effect with a grader of"),
        (["--audit", "0.5"], "--audit has no effect without --gate"),
        (["--audit", "0"], "--audit has no effect without --gate"),
        (["--subset", "main"], "--subset has no effect with a file"),
        *(
            (
                ["--data", "reasoning-gym:leg_counting", "--limit", "2", flag, "(.*)"],
                f"{flag} has no effect with reasoning-gym's problems",
            )
            for flag in (
                *("--problem-column", "--answer-column", "--answer-pattern"),
                *("--subset", "--split"),
            )
        ),
        (
            ["--chat-template-kwargs", '{"enable_thinkin": false}'],
            "--chat-template-kwargs: the chat template of",
        ),
        (["--url", "http://127.0.0.1:1", "--dtype", "float32"], "--dtype has no effect"),
        (["--data", "reasoning-gym:leg_counting"], "say how many with --limit"),
        (["--data", "reasoning-gym:leg_county", "--limit", "2"], "--data = 'leg_county': no such"),
        (["--grader", "task"], '--grader = "task" is that of'),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
    change: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # where nobody has made runs/base
    assert named in refusal([*arguments, *change], monkeypatch, capsys)


def test_a_bad_gate_is_named(
    arguments: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "gate.json").write_text('{"rule": "regret-only", "bta": 1.0}')
    said = refusal([*arguments, "--gate", str(tmp_path / "gate.json")], monkeypatch, capsys)
    assert "did you mean beta" in said


def with_estimate(source: SourceName, **more: Any) -> str:
    """A gate whose estimate of success reads a source, and its weight, as JSON."""
    estimator = SuccessEstimator((0.0,) * (len(FEATURES) + len(TOLD[source])), 0.0, (source,))
    gate = Gate(rule="success-probability", value="stream", estimator=estimator, **more)
    return json.dumps(gate_to_dict(gate))


def test_an_estimate_that_reads_earlier_steps_is_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "gate.json").write_text(with_estimate("history"))
    said = refusal([*arguments, "--gate", str(tmp_path / "gate.json")], monkeypatch, capsys)
    assert "earlier steps (history)" in said


def test_two_data_sets_of_one_name(
    arguments: list[str], data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / data.name
    other.write_text(data.read_text())
    said = refusal([*arguments, "--data", str(data), str(other)], monkeypatch, capsys)
    assert "two data sets are called sums" in said


def test_no_chat_template(
    arguments: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    model = random_checkpoint(tmp_path / "plain", 0)
    (model / "chat_template.jinja").unlink()
    said = refusal([*arguments, "--model", str(model)], monkeypatch, capsys)
    assert "--plain" in said


def test_an_output_that_cannot_be_written(
    arguments: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "file").touch()
    said = refusal([*arguments, "--out", str(tmp_path / "file")], monkeypatch, capsys)
    assert "--out" in said


def test_what_follows_two_dashes_goes_to_vllm(arguments: list[str]) -> None:
    options = parse([*arguments, "--", "--tensor-parallel-size", "2"])
    assert options.vllm_args == ["--tensor-parallel-size", "2"]
    vllm_args = make_recipe(options).servers.vllm_args
    assert vllm_args == ["--tensor-parallel-size", "2"]


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
