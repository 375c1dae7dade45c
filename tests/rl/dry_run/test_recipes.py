"""The recipes that ship: the paper's constants, and the machines that they are meant for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from espo_gateway.files import is_folder
from espo_rl.config import RECIPES, RecipeError, check_model_folder, load_recipe
from espo_rl.dry_run.footprint import Machine
from espo_rl.dry_run.plan import make_plan
from tests.helpers.plans import EIGHT, one_gpu_plan, qwen, qwen_plan

# -- the paper's recipes ---------------------------------------------------------------------------

PAPER = ("espo-1.5b", "espo-7b")


@pytest.mark.parametrize("name", PAPER)
def test_the_constants_of_the_paper(name: str) -> None:
    recipe = load_recipe(name)
    stopping, rollout = recipe.stopping, recipe.rollout
    assert (stopping.rule, stopping.value, stopping.threshold) == ("value-gated", "critic", "share")
    assert (stopping.beta, stopping.epsilon) == (7.0, 0.2)
    assert (stopping.beta_step, stopping.target_share) == (0.1, 0.25)
    assert (stopping.decay, stopping.smoothing) == (0.99, 0.9)
    assert stopping.failure_reward == -1.0
    assert (stopping.warmup, stopping.warmup_loss) == ("critic-loss", 0.5)
    assert (stopping.warmup_change, stopping.warmup_share) == (0.1, 0.1)
    assert (rollout.n, rollout.n * rollout.prompts_per_step) == (8, 64)
    assert (rollout.max_tokens, recipe.ppo.learning_rate) == (8192, 1e-6)
    assert recipe.evaluation.samples == 32
    assert recipe.model.path.lower().endswith(name.removeprefix("espo-"))
    # One spike of c must not cross the lowest threshold by itself.
    assert stopping.beta is not None
    assert (1 - stopping.smoothing) * stopping.clip < stopping.beta * stopping.epsilon


@pytest.mark.parametrize("name", PAPER)
def test_they_fit_the_papers_machine(tmp_path: Path, name: str) -> None:
    plan = qwen_plan(tmp_path, name, EIGHT, 8)
    assert (plan.errors, plan.warnings) == ([], [])


def ablations(name: str) -> dict[str, list[str]]:
    """Those that the head of the recipe lists, as arguments."""
    text = (RECIPES / f"{name}.toml").read_text()
    rows = re.findall(r"^#   (\S.*?) {2,}(\S+=.*)$", text, re.MULTILINE)
    return {title: shlex.split(arguments) for title, arguments in rows}


@pytest.mark.parametrize("name", PAPER)
def test_the_ablations_load_and_differ(name: str) -> None:
    assert len(ablations(name)) == 7
    recipes = [load_recipe(name, overrides) for overrides in ablations(name).values()]
    for recipe in recipes:
        assert recipe.model_dump() != load_recipe(name).model_dump()
        assert sum(recipe == other for other in recipes) == 1


# -- recipes for one GPU, and for none -------------------------------------------------------------


@pytest.mark.parametrize("size", ["0.5b", "1.5b"])
def test_a_gpu_of_24_gb_is_enough(tmp_path: Path, size: str) -> None:
    plan = one_gpu_plan(tmp_path, size)
    assert (plan.errors, plan.warnings) == ([], [])


def test_all_weights_of_the_larger_one_need_more(tmp_path: Path) -> None:
    recipe = load_recipe("qwen2.5-1.5b-gsm8k").model_dump()
    assert recipe["model"]["lora_rank"]
    text = (RECIPES / "qwen2.5-1.5b-gsm8k.toml").read_text()
    whole = re.sub(r"^lora_rank.*$", "", text, flags=re.MULTILINE)
    path = tmp_path / "whole.toml"
    path.write_text(whole)
    folder = qwen(tmp_path / "1.5b", "1.5b")
    given = [f"model.path={folder}", f"run.output={tmp_path}", "task.kind=arithmetic"]
    for memory, fits in ((24e9, False), (80e9, True)):
        machine = Machine(cpus=16, ram=64e9, gpus=(memory,))
        plan = make_plan(load_recipe(str(path), given), machine, 1)
        assert (not plan.errors and not plan.warnings) is fits


def test_what_makes_its_model_stands_in_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = [load_recipe(file).model.path for file in RECIPES.glob("*.toml")]
    local = [model for model in models if is_folder(model)]
    assert len(local) >= 3
    for model in local:
        with pytest.raises(RecipeError, match=rf"make it: python .*--out {model}\b"):
            check_model_folder("model.path", model)


def test_the_recipe_for_a_cpu_is_whole() -> None:
    recipe = load_recipe("smollm2-135m")
    assert (recipe.task.name, recipe.stopping.sources) == ("leg_counting", [])
