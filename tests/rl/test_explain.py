"""What the command says of a recipe's settings: all of it is read from where it stands."""

from __future__ import annotations

import argparse
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from espo_rl import run
from espo_rl.config import RECIPES, Recipe, RecipeError, load_recipe
from espo_rl.config.explain import explained, meanings, overview, paper_values
from espo_rl.evaluate.arguments import asked_as, make_recipe, parse
from espo_rl.train import next_commands


def sections() -> dict[str, Any]:
    return {name: field.annotation for name, field in Recipe.model_fields.items()}


def said_by(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["espo_rl.run", *arguments])
    assert run.main() == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("section", sections())
def test_every_key_has_a_meaning_of_its_own(section: str) -> None:
    found = meanings(sections()[section])
    assert found.keys() == sections()[section].model_fields.keys()
    assert all(found.values()), [key for key, text in found.items() if not text]
    assert len({*found.values()}) == len(found)


def test_a_key_is_told_with_default_bounds_unit_meaning_and_the_papers_value() -> None:
    told = explained(["stopping.beta_step"]).splitlines()
    assert told[0] == "stopping.beta_step = 0.1"
    assert told[1].strip() == "number above 0"
    assert "η" in told[2]
    assert told[-1].strip() == "paper: 0.1"
    assert "(seconds)" in explained(["rollout.timeout"])
    assert 'one of "batch", "refill"' in explained(["rollout.schedule"])
    assert "(must be given)" in explained(["model.path"])
    assert "from 0 to 1" in explained(["ppo.lam"])


def test_what_is_ours_is_not_said_to_be_the_papers() -> None:
    published = paper_values()
    assert published["stopping.target_share"] == 0.25
    assert published["ppo.learning_rate"] == 1e-6
    for key in ("stopping.audit_share", "stopping.beta_min", "ppo.gamma", "rollout.concurrency"):
        assert key not in published
        assert "paper:" not in explained([key])
    recipe = tomllib.loads((RECIPES / "espo-7b.toml").read_text())
    for key, value in published.items():
        section, _, name = key.partition(".")
        assert recipe[section][name] == value


def test_a_section_has_all_its_keys_and_nothing_all_sections(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    said = said_by(monkeypatch, capsys, "--explain", "stopping")
    assert [line.split(" = ")[0] for line in said.splitlines() if line.startswith("stopping.")] == [
        f"stopping.{key}" for key in sections()["stopping"].model_fields
    ]
    everything = said_by(monkeypatch, capsys, "--explain")
    assert said.strip() in everything
    for section in sections():
        assert f"[{section}]" in everything


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("stoping", "stopping"),
        ("stopping.betta", "stopping.beta"),
        ("rollout.learning_rate", "ppo.learning_rate"),
        ("ppo.lr_warmup", "ppo.lr_warmup_steps"),
        ("seed", "run.seed"),
    ],
)
def test_a_misspelt_name_suggests_the_right_one(name: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean {meant}"):
        explained([name])


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("rolout.n=3", "rollout"),
        ("rollout.prompts_pr_step=3", "rollout.prompts_per_step"),
        ("rollout.learning_rate=1e-4", "ppo.learning_rate"),
        ("learning_rate=1e-4", "ppo.learning_rate=1e-4"),
        ("evaluation.evry=3", "evaluation.every"),
    ],
)
def test_a_misspelt_key_suggests_the_right_one(override: str, meant: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("arithmetic", ["model.path=base", override])
    assert f"{meant}" in str(error.value)
    assert "did you mean" in str(error.value) or "perhaps" in str(error.value)


def test_a_misspelt_recipe_suggests_the_right_one() -> None:
    with pytest.raises(RecipeError, match="did you mean espo-7b"):
        load_recipe("espo7b")


def test_what_is_like_nothing_lists_what_there_is() -> None:
    with pytest.raises(RecipeError, match="sections: run, model"):
        explained(["xyzzy"])
    with pytest.raises(RecipeError, match="ppo has: learning_rate") as error:
        load_recipe("arithmetic", ["ppo.xyzzy=1"])
    assert "did you mean" not in str(error.value)


def test_the_help_lists_recipes_and_sections(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["espo_rl.run", "--help"])
    with pytest.raises(SystemExit):
        run.main()
    said = capsys.readouterr().out
    assert overview() in said
    for name in [*sections(), *(path.stem for path in RECIPES.glob("*.toml"))]:
        assert f"  {name} " in said


def test_no_recipe_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["espo_rl.run"])
    with pytest.raises(SystemExit) as error:
        run.main()
    assert error.value.code == 2
    assert "a recipe is needed" in capsys.readouterr().err


def test_a_finished_run_says_what_comes_next(tmp_path: Path) -> None:
    output = tmp_path / "my run"
    overrides = [f"run.output={output}", "run.steps=5", "model.path=base"]
    options = argparse.Namespace(recipe="arithmetic", overrides=overrides)
    said = next_commands(options, load_recipe("arithmetic", overrides))
    commands = [line.split(":", 1)[1].strip() for line in said.splitlines()]
    assert commands == [
        f"python -m espo_rl.report '{output}'",
        f"python -m espo_rl.run arithmetic 'run.output={output}' model.path=base run.steps=10 "
        "--resume auto",
        f"python -m espo_gateway.vllm_plugin '{output}/actor'",
    ]


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("qwen2.5-0.5b-gsm8k", []),
        ("espo-1.5b", ["task.eval_answer_column=solution", "task.system=- Think."]),
        ("espo-1.5b", ["task.grader=regex", "task.pattern='is (.*)'", "task.chat=false"]),
        ("espo-1.5b", ["task.chat_template_kwargs={ enable_thinking = false }"]),
        ("espo-1.5b", ['task.thought_tags=[["<a>", "</a>"], ["[b]", "[/b]"]]', "task.chat=false"]),
        ("espo-1.5b", ["task.thought_tags=[]", 'task.answer_tags=[["so: ", "."]]']),
        ("smollm2-135m", ["task.options={}"]),
        ("smollm2-135m", None),
    ],
)
def test_a_finished_run_is_evaluated_as_its_recipe_asks(
    recipe: str, overrides: list[str] | None
) -> None:
    options = argparse.Namespace(recipe=recipe, overrides=overrides or [])
    run = load_recipe(recipe, options.overrides)
    lines = next_commands(options, run).splitlines()
    commands = [line for line in lines if line.startswith("evaluate it:")]
    if overrides is None:  # the command knows no options of reasoning-gym's
        assert commands == []
        return
    [command] = commands
    words = shlex.split(command.partition("espo_rl.evaluate ")[2])
    evaluation = make_recipe(parse([*words, "--dtype", "bfloat16"]))
    task, given = run.task, evaluation.task
    keys = ["name", "chat", "system", "template", "grader", "pattern", "chat_template_kwargs"]
    for key in (*keys, "thought_tags", "answer_tags"):
        assert getattr(given, key) == getattr(task, key)
    if task.kind == "dataset":
        assert (given.train, given.eval_split) == (task.eval, task.eval_split)
        assert given.subset == task.eval_subset
        for key in ("problem_column", "answer_column", "answer_pattern"):
            assert getattr(given, key) == (getattr(task, f"eval_{key}") or getattr(task, key))
    assert evaluation.rollout.max_tokens == run.rollout.max_tokens


def test_a_run_that_holds_out_some_of_its_own_data_is_told_no_evaluation() -> None:
    """The command would ask what was trained on."""
    run = load_recipe("arithmetic", ["task.kind=dataset", "task.train=train.jsonl"])
    assert asked_as(run) == []
