"""The study of a real model: its worked examples, and the SFT that reads them."""

from __future__ import annotations

import json
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
import worked_examples
from transformers import AutoModelForCausalLM

from espo_rl.config import load_recipe
from espo_rl.tasks.graders import make_grader
from espo_rl.tasks.gym import GymTask
from tests.helpers.models import random_checkpoint


@pytest.mark.parametrize("task", list(worked_examples.WORKED))
def test_worked_examples_are_right_and_of_no_held_out_problem(task: str) -> None:
    section = worked_examples.section(task)
    right, held_out = make_grader(section), GymTask(section).held_out(300)
    asked = {problem.prompt for problem in held_out}
    problems = islice(GymTask(section).training(0), 200)
    for example, problem in zip(worked_examples.examples(task, 200, 0), problems, strict=True):
        [prompt], [completion] = example["prompt"], example["completion"]
        assert prompt["content"] == problem.prompt
        steps, _, end = completion["content"].partition("\n\n")
        answer = re.findall(r"total (\d+)", steps)[-1]
        assert end == f"The final answer is \\boxed{{{answer}}}"
        assert answer == problem.answer
        assert right(completion["content"], problem)
        assert problem.prompt not in asked


def test_the_sft_writes_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_checkpoint(tmp_path / "model", 0)
    out = tmp_path / "out"
    arguments = ["worked_examples.py", "--model", str(model), "--out", str(out), "--examples", "8"]
    monkeypatch.setattr(sys, "argv", arguments)
    worked_examples.main()
    said = json.loads((out / "worked.json").read_text())
    assert said["examples_each"] == 8
    assert said["tokens"] > 0
    trained, before = map(AutoModelForCausalLM.from_pretrained, (out, model))
    assert any(
        not a.float().equal(b.float())
        for a, b in zip(trained.parameters(), before.parameters(), strict=True)
    )
    with pytest.raises(SystemExit):
        worked_examples.main()  # not over what is there


def test_what_was_broken_off_does_not_keep_it_from_beginning_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["worked_examples.py", "--model", str(tmp_path / "none"), "--out"]
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "out")])
    for _ in range(2):
        with pytest.raises(SystemExit):
            worked_examples.main()
        assert str(tmp_path / "none") in capsys.readouterr().err
        assert not [*tmp_path.iterdir()]


def test_the_recipe_asks_for_what_the_examples_show() -> None:
    assert load_recipe("smollm2-135m").task == worked_examples.section("leg_counting")
