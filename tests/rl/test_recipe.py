"""Recipes: what a user writes, and what they are told when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from espo_rl.config import RECIPES, RecipeError, load_recipe


@pytest.mark.parametrize("name", [recipe.stem for recipe in RECIPES.glob("*.toml")])
def test_every_shipped_recipe_holds(name: str) -> None:
    assert load_recipe(name).model.path


def test_overrides_take_toml_values_and_bare_words() -> None:
    recipe = load_recipe(
        "arithmetic",
        ["run.seed=7", "ppo.learning_rate=1e-4", "stopping.rule=none", "run.output=runs/x y"],
    )
    assert (recipe.run.seed, recipe.ppo.learning_rate) == (7, 1e-4)
    assert (recipe.stopping.rule, str(recipe.run.output)) == ("none", "runs/x y")


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("ppo.learning_rte=1", ["ppo.learning_rte", "no such key", "learning_rate"]),
        ("nosuch.key=1", ["nosuch", "no such key", "rollout"]),
        ("rollout.n=0", ["rollout.n", "greater than or equal to 1"]),
        ("stopping.rule=luck", ["stopping.rule", "value-gated"]),
        ("stopping.rule=confidence", ["stopping", "surprise"]),
        ("stopping.audit_share=0", ["stopping", "audit_share"]),
        ("ppo.minibatches=10000", ["ppo.minibatches", "rollouts"]),
        ("task.kind=dataset", ["task", "train"]),
        ("task.kind=reasoning-gym", ["task", "name", "chain_sum"]),
        ("task.template=solve this", ["task", "{problem}"]),
        ("task.grader=regex", ["task", "pattern"]),
        ("task.pattern=answer: .*", ["task", "pattern", "group"]),
        ("task.answer_pattern=(", ["task", "answer_pattern", "regular expression"]),
        ("task.grader=task", ["task", "reasoning-gym"]),
        ("task.steps=[2,27]", ["task.steps", "26"]),
        ("task.steps=[]", ["task.steps", "at least 1 item"]),
        ("nonsense", ["section.key=value"]),
        ("run.steps.more=1", ["run.steps.more"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_fix(override: str, names: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("arithmetic", [override])
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["deepspeed.offload=optimizer"], ["offload", "zero_stage to 1, 2 or 3"]),
        (
            ["deepspeed.offload=all", "deepspeed.zero_stage=2"],
            ["offload", "zero_stage = 3"],
        ),
        (["ppo.advantage=group", "rollout.n=1"], ["ppo.advantage", "rollout.n"]),
        (["ppo.advantage=group", "ppo.critic_only_steps=2"], ["ppo.critic_only_steps", "gae"]),
        (["ppo.advantage=group", "stopping.warmup=critic-loss"], ["critic-loss", "gae"]),
    ],
)
def test_settings_that_do_not_go_together_are_named_with_the_fix(
    overrides: list[str], names: list[str]
) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("arithmetic", overrides)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], True),
        (["ppo.advantage=group"], False),
        (["ppo.advantage=group", "stopping.value=critic"], False),  # p* reads no critic
        (["ppo.advantage=group", "stopping.value=critic", "stopping.rule=value-gated"], True),
    ],
)
def test_a_critic_is_trained_where_something_reads_it(overrides: list[str], needed: bool) -> None:
    assert load_recipe("arithmetic", overrides).needs_critic is needed


def test_a_missing_recipe_lists_those_that_ship() -> None:
    with pytest.raises(RecipeError, match="arithmetic"):
        load_recipe("no-such-recipe")


def test_a_file_that_is_no_toml_says_where(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(RecipeError, match=r"bad\.toml"):
        load_recipe(tmp_path / "bad.toml")
