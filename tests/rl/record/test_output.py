"""No command writes over what another left: what is there, and no own result of before, stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reproduce
from espo_rl.base_model.__main__ import main as base_model
from espo_rl.base_model.train import train_base_model
from espo_rl.evaluate.results import EvaluationError
from espo_rl.evaluate.results_folder import ResultsFolder
from espo_rl.record.output import OutputError, check_empty, check_own, json_with
from espo_rl.replay.command import check_output
from espo_rl.report import command as report
from tests.helpers.report import make_run


def test_only_its_own_kind_is_replaced(tmp_path: Path) -> None:
    own = json_with("rules")
    file = tmp_path / "result.json"
    check_own(file, "--output", "result", own)
    for content in ("", '{"rules": 1, "more": 2}'):  # an empty one is no loss
        file.write_text(content)
        check_own(file, "--output", "result", own)
    for content in ("[]", "{}", '{"rule": 1}', "no json", "\x00"):
        file.write_text(content)
        with pytest.raises(OutputError, match=r"--output: .*result\.json is there and no result"):
            check_own(file, "--output", "result", own)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OutputError, match="folder"):
        check_own(folder, "--output", "result", own)


def test_where_nothing_can_be_written_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the hours that make what is to be written."""
    monkeypatch.chdir(tmp_path)
    check_empty(tmp_path / "new" / "folder", "--output")
    check_empty(Path("."), "--output")  # into which all is written
    with pytest.raises(OutputError, match=r"--output: \. has no name"):
        check_empty(Path("."), "--output", whole=True)
    with pytest.raises(OutputError, match=r"--output: \. has no name"):
        check_own(Path("."), "--output", "result", bool)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot (use|write into) .*file"):
        check_empty(tmp_path / "file" / "folder", "--output")
    monkeypatch.setattr("espo_rl.record.output.os.access", lambda path, mode: False)
    with pytest.raises(OutputError, match=f"--output: cannot write into {tmp_path}; choose"):
        check_empty(tmp_path / "new" / "folder", "--output")


@pytest.mark.parametrize("name", ["notes.txt", "metrics.jsonl", "aime.jsonl", "results.json"])
def test_an_evaluation_begins_in_an_empty_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(EvaluationError, match=rf"--out: .* is not empty \(it holds {name}\)"):
        ResultsFolder(tmp_path, {"k": 1})
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_evaluation_goes_on_in_its_own(tmp_path: Path) -> None:
    ResultsFolder(tmp_path / "out", {"k": 1})
    (tmp_path / "out" / "aime.jsonl").write_text("{}\n")
    ResultsFolder(tmp_path / "out", {"k": 1})
    with pytest.raises(EvaluationError, match="k: 1 there, 2 now"):
        ResultsFolder(tmp_path / "out", {"k": 2})


@pytest.mark.parametrize("there", ["[1]", "3", "null", '{"editor.tabSize": 4}'])
def test_other_settings_are_no_evaluations(tmp_path: Path, there: str) -> None:
    (tmp_path / "settings.json").write_text(there)
    with pytest.raises(EvaluationError, match="no evaluation's"):
        ResultsFolder(tmp_path, {"k": 1})
    assert (tmp_path / "settings.json").read_text() == there


OF_A_REPLAY = {"rollouts": 3, "bound": {}, "rules": {}}


@pytest.mark.parametrize("name", ["replay.json", "curves.csv", "replay.png"])
def test_a_replay_replaces_a_replay_alone(tmp_path: Path, name: str) -> None:
    check_output(tmp_path / "none")
    check_output(tmp_path)
    (tmp_path / "notes.txt").write_text("they may stay")
    check_output(tmp_path)
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=name):
        check_output(tmp_path)
    (tmp_path / "replay.json").write_text(json.dumps(OF_A_REPLAY))
    check_output(tmp_path)


def test_a_replay_wants_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="--output"):
        check_output(tmp_path / "file")


def test_a_report_replaces_a_report_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    output = tmp_path / "page.html"
    output.write_text("<title>thesis</title>")
    with pytest.raises(SystemExit, match=r"page\.html is there and no report"):
        report.main([str(run), "--output", str(output)])
    assert output.read_text() == "<title>thesis</title>"
    output.unlink()
    for _ in range(2):
        report.main([str(run), "--output", str(output)])
    assert "ESPO report" in output.read_text()


def other_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_text("weeks of work")


def other_base(folder: Path) -> None:
    folder.mkdir()
    (folder / "base_model.json").write_text(json.dumps({"seed": 5}))


@pytest.mark.parametrize(
    ("there", "arguments", "said"),
    [
        (other_model, [], "is not empty (it holds model.safetensors)"),
        (other_model, ["--overwrite"], "is not empty (it holds model.safetensors)"),
        (other_base, [], "seed = 5"),
        (lambda folder: folder.write_text("file"), [], "--out"),
    ],
)
def test_a_base_model_is_not_written_over_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    there: Callable[[Path], Any],
    arguments: list[str],
    said: str,
) -> None:
    there(tmp_path / "base")
    monkeypatch.setattr("sys.argv", ["base_model", "--out", str(tmp_path / "base"), *arguments])
    with pytest.raises(SystemExit) as ended:
        base_model()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_base_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    other_base(tmp_path / "base")
    with pytest.raises(OutputError, match="--overwrite") as error:
        train_base_model(tmp_path / "base", error=0.06, steps=1600, seed=0)
    assert "torch = None" in str(error.value)
    assert json.loads((tmp_path / "base" / "base_model.json").read_text()) == {"seed": 5}


def test_results_of_a_study_replace_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_an_evaluation = '{"results": {}, "settings": {}}'
    (tmp_path / "results.json").write_text(of_an_evaluation)
    arguments = ["reproduce", "--output", str(tmp_path), "--results-only"]
    monkeypatch.setattr("sys.argv", arguments)
    assert reproduce.main() == 2
    assert "results.json is there and no results of a study" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == of_an_evaluation
    (tmp_path / "results.json").unlink()
    assert reproduce.main() == 2
    assert "no run of the study is done" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
