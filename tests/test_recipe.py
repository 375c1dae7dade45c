"""Recipes, tasks and rewards: what a user writes, and what they are told when it is wrong."""

import json
import random
from itertools import islice

import pytest

from espo_rl.config import RECIPES, RecipeError, load_recipe
from espo_rl.rewards import exact, math
from espo_rl.tasks import Arithmetic, JsonlTask, TaskError


@pytest.mark.parametrize("name", [recipe.stem for recipe in RECIPES.glob("*.toml")])
def test_every_shipped_recipe_holds(name):
    assert load_recipe(name).model.path


def test_overrides_take_toml_values_and_bare_words():
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
        ("stopping.audit_share=0", ["stopping", "audit_share"]),
        ("ppo.minibatches=10000", ["ppo.minibatches", "rollouts"]),
        ("task.kind=dataset", ["task", "train"]),
        ("nonsense", ["section.key=value"]),
        ("run.steps.more=1", ["run.steps.more"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_fix(override, names):
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
        (["ppo.advantage=group", "model.critic_statistics=true"], ["critic_statistics", "gae"]),
        (["ppo.advantage=group", "stopping.warmup=critic-loss"], ["critic-loss", "gae"]),
    ],
)
def test_settings_that_do_not_go_together_are_named_with_the_fix(overrides, names):
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
def test_a_critic_is_trained_where_something_reads_it(overrides, needed):
    assert load_recipe("arithmetic", overrides).needs_critic is needed


def test_a_missing_recipe_lists_those_that_ship():
    with pytest.raises(RecipeError, match="arithmetic"):
        load_recipe("no-such-recipe")


def test_a_file_that_is_no_toml_says_where(tmp_path):
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(RecipeError, match=r"bad\.toml"):
        load_recipe(tmp_path / "bad.toml")


def test_arithmetic_solutions_are_right_and_of_the_wished_lengths():
    task, rng = Arithmetic(), random.Random(0)
    assert task.solution("358c") == "c3+8=1b5+1=6a8+6=4#164"
    for _ in range(300):
        problem = task.problem(rng)
        steps = ord(problem.prompt[3]) - ord("a") + 1
        assert 2 <= steps <= 24
        assert exact(task.solution(problem.prompt), problem.answer)


def test_one_slip_always_spoils_the_answer():
    class OneSlip(random.Random):
        def __init__(self, at, by):
            super().__init__(0)
            self.at, self.by, self.seen = at, by, -1

        def random(self):
            self.seen += 1
            return 0.0 if self.seen == self.at else 1.0

        def randint(self, low, high):
            return self.by

    task = Arithmetic()
    for at in range(24):
        for by in range(1, 10):
            slipped = task.solution("358x", OneSlip(at, by), 0.5)
            assert slipped.split("#")[1] != task.solution("358x").split("#")[1]


def test_training_problems_repeat_by_seed_and_leave_the_held_out_ones_alone():
    task = Arithmetic(2, 3)  # few problems, so that they would meet
    first, again = (list(islice(task.training(3), 200)) for _ in range(2))
    assert first == again
    assert first != list(islice(task.training(4), 200))
    assert not {p.id for p in first} & {p.id for p in task.held_out(100)}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_problems_come_shuffled_each_epoch_and_held_out_ones_never(tmp_path):
    rows = [{"problem": f"q{i}", "answer": i} for i in range(20)]
    task = JsonlTask(write_rows(tmp_path / "data.jsonl", rows))
    held_out = {problem.prompt for problem in task.held_out(100)}
    assert len(held_out) == 2
    epochs = [problem.prompt for problem in islice(task.training(0), 36)]
    assert sorted(epochs[:18]) == sorted(epochs[18:])
    assert epochs[:18] != epochs[18:]
    assert not held_out & set(epochs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "x"}\n', "line 1"),
        ("not json\n", "line 1"),
        ("\n", "no problems"),
        ('{"problem": "x", "answer": "1"}\n[]\n', "line 2"),
    ],
)
def test_a_malformed_task_file_names_the_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(TaskError, match=message):
        list(JsonlTask(path, path).held_out(5))


def test_a_missing_task_file_is_named(tmp_path):
    with pytest.raises(TaskError, match="nowhere"):
        JsonlTask(tmp_path / "nowhere.jsonl").held_out(1)


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("the total is #42", "42", True),
        ("#41 no, #42", "42", True),
        ("42", "42", True),
        ("#42 or so", "42", False),
        ("", "42", False),
    ],
)
def test_exact_match(completion, answer, right):
    assert exact(completion, answer) is right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"so it is \boxed{18}", "18", True),
        (r"\boxed{17}, no: \boxed{18}", "18", True),
        (r"\boxed{18}, no: \boxed{17}", "18", False),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"The answer is $\frac{3}{4}$.", r"\frac{3}{4}", True),
        ("The final answer is 204", "204", True),
        ("I do not know", "204", False),
        ("", "204", False),
    ],
)
def test_math_answers(completion, answer, right):
    assert math(completion, answer) is right
