"""Data sets: what is read of them, and what a user is told when they cannot be had."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import socket
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from espo_rl.tasks.task import TaskError
from tests.helpers.tasks import first, numbered, prompts, task_of, write_rows

pytestmark = pytest.mark.usefixtures("own_cache")
GSM8K = Path(__file__).parents[2] / "data" / "gsm8k_excerpt.jsonl"


# -- data sets: what comes -------------------------------------------------------------------------


def test_problems_come_shuffled_each_epoch(tmp_path: Path) -> None:
    task = task_of(train=write_rows(tmp_path / "data.jsonl", numbered(20)))
    assert len(task.held_out(100)) == 2
    epochs = prompts(first(task, 36))
    assert sorted(epochs[:18]) == sorted(epochs[18:])
    assert epochs[:18] != epochs[18:]


def test_gsm8k_rows() -> None:
    task = task_of(train=str(GSM8K))
    problems = [*first(task, 18), *task.held_out(2)]
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    assert sorted((p.prompt, p.answer) for p in problems) == sorted(
        (row["problem"], row["answer"]) for row in rows
    )
    assert all(p.extra == {"problem": p.prompt, "answer": p.answer} for p in problems)
    assert len({p.id for p in problems}) == 20


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file(tmp_path: Path, ending: str) -> None:
    path = str(tmp_path / f"data.{ending}")
    data = datasets.Dataset.from_list(
        [{"problem": f"{i}, {i}", "answer": str(i)} for i in range(9)]
    )
    if ending == "parquet":
        data.to_parquet(path)
    elif ending == "csv":
        data.to_csv(path)
    else:
        data.to_json(path, lines=ending == "jsonl")
    task = task_of(train=path)
    assert {(p.prompt, p.answer) for p in first(task, 9)} == {
        (f"{i}, {i}", f"{i}") for i in range(9)
    }


#: answers beside one another that a data frame would change, as they are written
WRITTEN = {
    "integers beside floats": ["15", "2.5", "-3", "1.50", "0.10"],
    "large ones": ["1" + "0" * 30, "-9223372036854775809", "18446744073709551616", "7"],
    "large ones beside floats": ["12345678901234567", "0.5", "9007199254740993"],
    "very large ones": ["1" * 5000, "2"],
    "many digits": ["3.14159265358979323846264338327950288", "1e400", "1E3", "-0.0"],
    "truth": ["true", "false", "1", "0.5"],
}


@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz", "folder"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_answers_stay_as_they_are_written(
    tmp_path: Path, name: str, nested: bool, ending: str
) -> None:
    answers = {f"q{i}": answer for i, answer in enumerate(WRITTEN[name])}
    answers["a text"] = "007"
    cells = [*WRITTEN[name], '"007"']
    rows = [
        f'{{"problem": "{asked}", "a": ' + (f'{{"b": {cell}}}}}' if nested else f"{cell}}}")
        for asked, cell in zip(answers, cells, strict=True)
    ]
    path = tmp_path / ("train.jsonl" if ending == "folder" else f"data.{ending}")
    text = "[" + ",\n ".join(rows) + "]\n" if ending == "json" else "\n".join(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    task = task_of(
        train=str(tmp_path if ending == "folder" else path),
        answer_column="a.b" if nested else "a",
    )
    problems = first(task, len(answers))
    assert {p.prompt: p.answer for p in problems} == answers
    for problem in problems:
        assert pickle.loads(pickle.dumps(problem)) == problem
        json.dumps(problem.extra)  # still a row of plain numbers


@pytest.mark.parametrize("cell", ["NaN", "null", "Infinity", "[1]", '""'])
def test_what_is_no_answer_is_refused(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"problem": "a", "answer": 1}}\n{{"problem": "b", "answer": {cell}}}\n')
    with pytest.raises(TaskError, match=r"task\.answer_column.*row 2 "):
        task_of(train=str(path))


def test_a_column_that_only_some_rows_have(tmp_path: Path) -> None:
    rows = [{"problem": "a", "answer": 1, "hint": "x"}, {"problem": "b", "answer": "2"}]
    task = task_of(train=write_rows(tmp_path / "data.jsonl", rows))
    assert {p.prompt: p.extra["hint"] for p in first(task, 2)} == {"a": "x", "b": None}


def test_numbers_of_a_table(tmp_path: Path) -> None:
    """In Parquet a column has one type; whole numbers among others are whole again."""
    columns = {
        "floats": ([15.0, 2.5, -3.0], ["15", "2.5", "-3"]),
        "integers": ([2**62 + 1, 7, -3], [str(2**62 + 1), "7", "-3"]),
        "decimals": (
            [Decimal("1.50"), Decimal("15.00"), Decimal(10**20)],
            ["1.50", "15", "1" + "0" * 20],
        ),
        "truth": ([True, False, True], ["true", "false", "true"]),
        "small ones": ([1e-05, -0.0, 1e23], ["0.00001", "0", "1" + "0" * 23]),
        "halves": (pa.array([0.1, 2.5, 15.0], pa.float16()), ["0.1", "2.5", "15"]),
        "singles": (pa.array([0.1, 1e-05, 15.0], pa.float32()), ["0.1", "0.00001", "15"]),
        "days": ([date(2024, 2, 29)] * 3, ["2024-02-29"] * 3),
        "moments": (
            [datetime(2024, 2, 29), datetime(2024, 2, 29, 18, 30), datetime(1999, 1, 1)],
            ["2024-02-29", "2024-02-29T18:30:00", "1999-01-01"],
        ),
        "nested.singles": (None, ["0.1", "0.00001", "15"]),
        "small decimals": (
            [Decimal("0.0000001"), Decimal("0.1000000"), Decimal("2")],
            ["0.0000001", "0.1000000", "2"],
        ),
    }
    cells = {name: given for name, (given, _) in columns.items() if given is not None}
    cells["nested"] = pa.StructArray.from_arrays([cells["singles"]], ["singles"])
    table = pa.table({"problem": ["a", "b", "c"], **cells})
    pq.write_table(table, tmp_path / "data.parquet")
    for name, (_, expected) in columns.items():
        problems = first(task_of(train=str(tmp_path / "data.parquet"), answer_column=name), 3)
        assert sorted((p.prompt, p.answer) for p in problems) == list(
            zip("abc", expected, strict=True)
        )


def test_labels_of_a_table_are_their_names(tmp_path: Path) -> None:
    """As of MMLU's answers, which the table holds as numbers."""
    labels = datasets.ClassLabel(names=["A", "B", "C", "D"])
    features = datasets.Features(
        {"problem": datasets.Value("string"), "answer": labels, "nested": {"answer": labels}}
    )
    rows = [{"problem": f"{i}", "answer": i, "nested": {"answer": 3 - i}} for i in range(4)]
    path = str(tmp_path / "data.parquet")
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    for column, expected in (("answer", "ABCD"), ("nested.answer", "DCBA")):
        problems = first(task_of(train=path, answer_column=column), 4)
        assert {p.prompt: p.answer for p in problems} == dict(zip("0123", expected, strict=True))


def test_csv_cells_of_a_folder_are_taken_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("problem,answer\na,007\nb,15\nc,2.50\nd,NA\n")
    problems = first(task_of(train=str(tmp_path)), 4)
    assert {p.prompt: p.answer for p in problems} == {"a": "007", "b": "15", "c": "2.50", "d": "NA"}


@pytest.mark.parametrize("cells", [{"1": "007", "2": "1.50"}, {"1": "NA", "2": "3", "x": "None"}])
def test_csv_cells_are_taken_as_they_stand(tmp_path: Path, cells: dict[str, str]) -> None:
    lines = ["problem,answer", *(f"{problem},{answer}" for problem, answer in cells.items())]
    (tmp_path / "data.csv").write_text("\n".join(lines))
    problems = first(task_of(train=str(tmp_path / "data.csv")), len(cells))
    assert {p.prompt: p.answer for p in problems} == cells


def test_csv_columns_that_are_not_read_may_hold_anything(tmp_path: Path) -> None:
    lines = ["problem,answer,note", *(f"q{i},{i},00{i}" for i in range(10_001)), "last,1,a text"]
    (tmp_path / "data.csv").write_text("\n".join(lines))
    for problem in first(task_of(train=str(tmp_path / "data.csv")), 20):
        assert problem.extra["note"] in ("a text", f"00{problem.answer}")


def test_a_chat_prompt_and_a_nested_answer_as_in_dapo_math(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "not this"},
                {"role": "assistant", "content": "nor this"},
                {"role": "user", "content": f"what is {i}?"},
            ],
            "reward_model": {"ground_truth": str(i), "style": "rule"},
        }
        for i in range(5)
    ]
    task = task_of(
        train=write_rows(tmp_path / "dapo.jsonl", rows),
        problem_column="prompt",
        answer_column="reward_model.ground_truth",
    )
    problems = first(task, 5)
    assert {(p.prompt, p.answer) for p in problems} == {(f"what is {i}?", f"{i}") for i in range(5)}
    assert all(p.extra["reward_model"]["style"] == "rule" for p in problems)


def test_a_column_with_a_dot_in_its_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", [{"problem": "q", "final.answer": 7}])
    assert first(task_of(train=path, answer_column="final.answer"), 1)[0].answer == "7"


def test_the_answer_at_the_end_of_a_solution(tmp_path: Path) -> None:
    rows = [{"question": "eggs?", "answer": "16 - 3 - 4 = <<16-3-4=9>>9.\n#### 1,234"}]
    task = task_of(
        train=write_rows(tmp_path / "gsm8k.jsonl", rows),
        problem_column="question",
        answer_pattern="#### (.*)",
    )
    assert first(task, 1)[0].answer == "1,234"
    with pytest.raises(TaskError, match=r"task\.answer_pattern.*row 1 .*1,234"):
        task_of(
            train=str(tmp_path / "gsm8k.jsonl"), problem_column="question", answer_pattern="= (x)"
        )


def test_an_evaluation_set_laid_out_differently(tmp_path: Path) -> None:
    task = task_of(
        train=write_rows(tmp_path / "train.jsonl", numbered(5)),
        answer_pattern="(.)",
        eval=write_rows(tmp_path / "eval.jsonl", [{"q": "e", "x": {"a": "so 3."}}]),
        eval_problem_column="q",
        eval_answer_column="x.a",
        eval_answer_pattern=r"so (\d)",
    )
    assert [(p.prompt, p.answer) for p in task.held_out(9)] == [("e", "3")]
    assert len(set(prompts(first(task, 5)))) == 5


def test_training_leaves_out_what_the_evaluation_set_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"problem": f"what is {i}?", "answer": i} for i in range(10)]
    copied = [{"problem": f" what  is\n{i}?", "answer": 0} for i in range(3)]
    with caplog.at_level(logging.WARNING):
        task = task_of(
            train=write_rows(tmp_path / "train.jsonl", rows),
            eval=write_rows(tmp_path / "eval.jsonl", [*copied, {"problem": "new", "answer": 1}]),
        )
    assert "3 of 10 training problems are in the evaluation set" in caplog.text
    assert sorted(prompts(first(task, 7))) == [f"what is {i}?" for i in range(3, 10)]
    assert len(task.held_out(9)) == 4


def test_a_clean_evaluation_set_is_not_spoken_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write_rows(tmp_path / "train.jsonl", numbered(10))
    task_of(train=train, eval=write_rows(tmp_path / "eval.jsonl", numbered(10, start=10)))
    assert not [record for record in caplog.records if record.name == "espo_rl.tasks.task"]


def test_an_evaluation_set_that_is_the_training_set(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", numbered(10))
    with pytest.raises(TaskError, match=r"task\.eval"):
        task_of(train=path, eval=path)


def test_a_problem_that_repeats_counts_once(tmp_path: Path) -> None:
    """As in DAPO-Math-17k, where every problem stands a hundred times."""
    task = task_of(train=write_rows(tmp_path / "data.jsonl", numbered(20) * 10))
    assert len(task.held_out(100)) == 2
    assert len({p.prompt for p in first(task, 18)}) == 18


def test_splits_and_subsets_of_a_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", numbered(10))
    write_rows(tmp_path / "test.jsonl", numbered(4, start=100))
    task = task_of(train=str(tmp_path), eval=str(tmp_path))
    assert sorted(prompts(task.held_out(9))) == [f"q{i}" for i in range(100, 104)]
    assert sorted(prompts(first(task, 10))) == [f"q{i}" for i in range(10)]
    task = task_of(train=str(tmp_path), train_split="train[:3]+test[:1]")
    assert sorted(prompts(first(task, 4))) == ["q0", "q1", "q100", "q2"]


def test_named_subsets_of_a_folder(tmp_path: Path) -> None:
    for subset, start in (("easy", 0), ("hard", 50)):
        (tmp_path / subset).mkdir()
        write_rows(tmp_path / subset / "train.jsonl", numbered(5, start))
    configs = "".join(f"\n- config_name: {s}\n  data_files: {s}/*.jsonl" for s in ("easy", "hard"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:{configs}\n---\n")
    path = str(tmp_path)
    hard = sorted(prompts(first(task_of(train=path, subset="hard"), 5)))
    assert hard == [f"q{i}" for i in range(50, 55)]
    task = task_of(train=path, subset="hard", eval=path, eval_subset="easy", eval_split="train")
    assert sorted(prompts(task.held_out(9))) == [f"q{i}" for i in range(5)]
    # The evaluation part of the same set is of the same subset, unless another is given.
    halves = {"train_split": "train[2:]", "eval_split": "train[:2]"}
    task = task_of(train=path, subset="hard", eval=path, **halves)
    assert sorted(prompts(task.held_out(9))) == ["q50", "q51"]
    with pytest.raises(TaskError, match=r"task\.subset: .*medium.*easy"):
        task_of(train=path, subset="medium")


def test_a_part_of_a_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", numbered(10))
    task = task_of(train=path, train_split="train[:3]", eval=path, eval_split="train[7:]")
    assert sorted(prompts(first(task, 3))) == ["q0", "q1", "q2"]
    assert sorted(prompts(task.held_out(9))) == ["q7", "q8", "q9"]


def test_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", numbered(3))
    assert len(set(prompts(first(task_of(train=path), 3)))) == 3
    write_rows(tmp_path / "data.jsonl", [{"problem": "new", "answer": "1"}])
    assert prompts(first(task_of(train=path), 1)) == ["new"]


def test_local_files_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write_rows(tmp_path / "train.jsonl", numbered(10))
    for train in (tmp_path / "train.jsonl", tmp_path):
        assert first(task_of(train=str(train)), 1)


# -- data sets: what is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "x"}\n', r"task\.answer_column = 'answer'.*row 1 .*columns are problem"),
        ('{"problem": "x", "answer": null}\n', r"task\.answer_column.*row 1 "),
        (
            '{"problem": "x", "answer": "1"}\n{"problem": " ", "answer": 1}\n',
            "problem_column.*row 2 ",
        ),
        ('{"problem": "x", "answer": ["1"]}\n', r"task\.answer_column.*row 1 "),
        ('{"problem": [{"role": "user"}], "answer": 1}\n', r"task\.problem_column.*row 1 "),
        ("not json\n", "bad.jsonl.*JSON parse error"),
        ('{"problem": "x", "answer": "1"}\n[]\n', "bad.jsonl"),
        ("\n", r"task\.train: .*bad\.jsonl.*no data"),
        ("", r"task\.train: .*bad\.jsonl.*nothing"),
    ],
)
def test_a_malformed_file_names_the_row_or_the_column(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(TaskError, match=message):
        task_of(train=str(path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cut.json", '[{"problem": 1, "answer": 1},', "cut.json: JSON parse error in row 2"),
        ("cut.json", '[{"problem": 1, "answer": 1}', "cut.json: JSON parse error after row 1"),
        ("odd.json", '[{"problem": 1, "answer": 1} {}]', "odd.json: JSON parse error after row 1"),
        ("odd.json", '[{"problem": 1, "answer": 1}] {}', "odd.json: JSON parse error after row 1"),
        ("odd.json", "[ ]", "odd.json holds nothing"),
        ("wide.csv", "problem,answer\nx,1,2\ny,1,2\n", "wide.csv: row 1 has more cells"),
        ("wide.csv", "problem,answer\nx,1\ny,1,2\n", "wide.csv: .*Expected 2 .* line 3, saw 3"),
        ("cut.csv", 'problem,answer\nx,"1\n', "cut.csv: .*EOF inside string"),
        ("empty.csv", "problem,answer\n", "empty.csv holds nothing"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TaskError, match=rf"task\.train: .*{message}"):
        task_of(train=str(tmp_path / name))


def test_a_misspelt_column_is_set_right(tmp_path: Path) -> None:
    rows = [{"problem": "x", "reward_model": {"ground_truth": "1"}}]
    path = write_rows(tmp_path / "data.jsonl", rows)
    meant = r"did you mean reward_model\.ground_truth\?"
    with pytest.raises(TaskError, match=rf"reward_model\.truth.*columns are problem, .*{meant}"):
        task_of(train=path, answer_column="reward_model.truth")
    with pytest.raises(TaskError, match=r"task\.eval_problem_column = 'q'"):
        task_of(
            train=write_rows(tmp_path / "train.jsonl", numbered(2)),
            eval=path,
            eval_problem_column="q",
        )


@pytest.mark.parametrize("key", ["train", "eval"])
def test_a_missing_file_is_named(tmp_path: Path, key: str) -> None:
    there = write_rows(tmp_path / "there.jsonl", numbered(2))
    settings = {"train": there, "eval": there, key: str(tmp_path / "nowhere.jsonl")}
    with pytest.raises(TaskError, match=rf"task\.{key}: No such file.*nowhere"):
        task_of(**settings)


def test_a_misspelt_split_lists_those_there_are(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", numbered(3))
    write_rows(tmp_path / "test.jsonl", numbered(3))
    with pytest.raises(TaskError, match=r"task\.train_split: .*trian.*\['train', 'test'\]"):
        task_of(train=str(tmp_path), train_split="trian")
    with pytest.raises(TaskError, match=r"task\.eval_split: .*validation"):
        task_of(train=str(tmp_path), eval=str(tmp_path), eval_split="validation")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("x")
    with pytest.raises(TaskError, match=r"task\.train: .*data\.txt.*\.parquet"):
        task_of(train=str(tmp_path / "data.txt"))


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task\.train: .*data files"):
        task_of(train=str(tmp_path))


def test_a_name_on_the_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError, match=r"task\.train: .*openai/gsm8k.*Hugging Face hub"):
        task_of(train="openai/gsm8k", subset="main")
