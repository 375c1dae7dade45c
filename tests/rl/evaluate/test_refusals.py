"""What the command refuses, before anything is started or written over."""

from __future__ import annotations

import fcntl
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from espo_gateway.supervisor import ServerProcess, free_port
from espo_rl.evaluate.__main__ import main
from espo_rl.evaluate.arguments import make_recipe, parse
from espo_rl.evaluate.command import Command
from espo_rl.evaluate.results import EvaluationError
from espo_rl.evaluate.results_folder import ResultsFolder
from tests.helpers.evaluation import (
    ANSWERS,
    answering,
    run,
    with_estimate,
)
from tests.helpers.gateway import GATE
from tests.helpers.models import random_checkpoint

pytestmark = pytest.mark.usefixtures("retry_at_once")


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
    path.write_bytes(first.encode().replace(b'"', b'"\xff', 1) + b"")
    with pytest.raises(EvaluationError, match="line 1, is damaged"):
        await run(arguments, answering(ANSWERS))


async def test_a_problem_without_a_prompt_is_named(arguments: list[str], tmp_path: Path) -> None:
    """No tokenizer takes half of a character, which JSON may hold."""
    rows = [{"problem": "1", "answer": "1"}, {"problem": "\ud83d", "answer": "2"}]
    (tmp_path / "half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [*arguments, "--data", str(tmp_path / "half.jsonl")]
    with pytest.raises(EvaluationError, match="--data: no prompt can be made of problem 2 of half"):
        Command(parse(asked))


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
        (["--temperature", "0", "--k", "4"], "--k above 1 asks for the same answers again"),
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
