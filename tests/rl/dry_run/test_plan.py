"""The dry run: what it finds wrong in a recipe."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from espo_gateway.supervisor import free_port
from espo_gateway.testing import FakeServer, Script
from espo_rl.base_model.train import make_model, make_tokenizer, save_checkpoint
from espo_rl.config import Recipe, RecipeError
from espo_rl.dry_run.footprint import Machine
from espo_rl.dry_run.plan import make_plan
from tests.helpers.models import headed, random_model
from tests.helpers.plans import EIGHT, LAPTOP, only_error

# -- a recipe that is whole ------------------------------------------------------------------------


def test_a_whole_recipe(recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    plan = make_plan(recipe_with(), LAPTOP, ranks=1)
    assert (plan.errors, plan.warnings) == ([], [])
    plan.check()
    text = plan.text()
    assert re.search(r"^actor +0\.40 M parameters, 2 layers, vocabulary 44", text, re.MULTILINE)
    assert re.search(r"'<user>\d{3}[a-z]<assistant>'", text)
    assert "16 prompts × 8 = 128 rollouts, at most 20,480 tokens" in text
    assert "40 steps, at most 819,200 tokens" in text
    assert "nothing speaks against a start" in text
    assert max(map(len, text.splitlines())) <= 100
    assert not (tmp_path / "out").exists()  # it only looked


def test_stale_tokens_that_cannot_be_weighted_are_warned_of(
    recipe_with: Callable[..., Recipe],
) -> None:
    (warning,) = make_plan(recipe_with("rollout.schedule=refill"), LAPTOP).warnings
    assert "servers.logprobs_mode = processed_logprobs" in warning
    for known in ("servers.logprobs_mode=processed_logprobs", "rollout.temperature=1.0"):
        assert make_plan(recipe_with("rollout.schedule=refill", known), LAPTOP).warnings == []


def test_a_cpu_that_is_slow_in_bfloat16_is_warned_of(recipe_with: Callable[..., Recipe]) -> None:
    slow = replace(LAPTOP, slow_bfloat16=True)
    (warning,) = make_plan(recipe_with("model.dtype=bfloat16"), slow).warnings
    assert "set model.dtype=float32" in warning
    for machine, dtype in ((slow, "float32"), (LAPTOP, "bfloat16")):
        assert make_plan(recipe_with(f"model.dtype={dtype}"), machine).warnings == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["ppo.critic_only_steps=40"], "ppo.critic_only_steps: the actor learns nothing"),
        (["ppo.critic_only_steps=39"], None),
        (["ppo.lr_warmup_steps=41"], "ppo.lr_warmup_steps: the learning rate"),
        (["ppo.lr_warmup_steps=40"], None),
        (["stopping.warmup_batches=40"], "stopping.warmup_batches: nothing is stopped"),
        (["run.steps=4"], "stopping.warmup_batches: nothing is stopped"),
        (["run.steps=4", "stopping.rule=none"], None),
    ],
)
def test_what_begins_after_the_last_step_is_warned_of(
    recipe_with: Callable[..., Recipe], overrides: list[str], said: str | None
) -> None:
    warnings = make_plan(recipe_with(*overrides), LAPTOP).warnings
    late = [warning for warning in warnings if "run.steps" in warning]
    assert [warning.startswith(said or "-") for warning in late] == ([True] if said else [])


def test_all_that_is_wrong_is_said_at_once(
    recipe_with: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "out").touch()
    port = 'servers.vllm_args=["--port", "80"]'
    plan = make_plan(recipe_with("rollout.max_tokens=600", port), LAPTOP)
    with pytest.raises(RecipeError) as caught:
        plan.check()
    for key in ("rollout.max_tokens", "servers.vllm_args", "run.output"):
        assert f"{key}" in str(caught.value)
        assert re.search(f"ERROR: .*{re.escape(key)}", plan.text())


# -- what it finds ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "worth", "said"),
    [
        (1, [-1.0, 1.0], None),
        (2, None, None),  # not made by `pretrain_critic`
        (3, None, "stopping.value_head: {head}: of 3 layers of width 128, and the model has 2"),
        (0, None, "stopping.value_head: {head}: no head of V"),
        (1, [0.0, 1.0], "stopping.value_head: {head} was fitted to rewards of 0 and 1"),
        (2, [-1.0, 1.0], "stopping.value_head: {head} is a critic whose layers were trained too"),
        (-1, None, "stopping.value_head: {head}: no head of V (SafetensorError"),
    ],
)
def test_a_head_is_of_the_model_and_in_the_runs_rewards(
    recipe_with: Callable[..., Recipe],
    tmp_path: Path,
    layers: int,
    worth: list[float] | None,
    said: str | None,
) -> None:
    head = tmp_path / "head"
    headed(random_model(0), 2).save_pretrained(head)
    config = head / "config.json"
    config.write_text(config.read_text().replace('_layers": 2', f'_layers": {layers}'))
    if not layers:
        (head / "model.safetensors").unlink()
    elif layers < 0:
        (head / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    if worth is not None:
        settings = dict(zip(("wrong", "right"), worth, strict=True))
        report = {"settings": settings, "head_only": layers == 1}
        (head / "report.json").write_text(json.dumps(report))
    recipe = recipe_with('stopping.sources=["critic"]', f"stopping.value_head={head}")
    errors = make_plan(recipe, LAPTOP).errors
    found = [said is not None and error.startswith(said.format(head=head)) for error in errors]
    assert found == ([] if said is None else [True])


def test_a_head_takes_no_critic(recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    headed(random_model(0)).save_pretrained(tmp_path / "head")
    group, reads = "ppo.advantage=group", 'stopping.sources=["critic"]'
    head = f"stopping.value_head={tmp_path / 'head'}"
    assert set(make_plan(recipe_with(group, reads), LAPTOP).shapes) == {"actor", "critic"}
    plan = make_plan(recipe_with(group, reads, head), LAPTOP)
    assert set(plan.shapes) == {"actor"}
    assert "critic" not in plan.text()


@pytest.mark.parametrize("key", ["model.path", "model.critic", "model.reference"])
class TestModels:
    def plan(self, recipe_with: Callable[..., Recipe], key: str, name: object) -> str:
        return only_error(make_plan(recipe_with(f"{key}={name}", "ppo.kl_coefficient=0.1"), LAPTOP))

    def test_no_folder(self, recipe_with: Callable[..., Recipe], key: str, tmp_path: Path) -> None:
        name = tmp_path / "nothing"
        assert f"{key}: no folder {name}" in self.plan(recipe_with, key, name)

    def test_no_weights(self, recipe_with: Callable[..., Recipe], key: str, tmp_path: Path) -> None:
        said = self.plan(recipe_with, key, tmp_path)
        assert said == f"{key}: {tmp_path} holds no weights (*.safetensors)"

    def test_no_model(self, recipe_with: Callable[..., Recipe], key: str, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").touch()
        (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
        said = self.plan(recipe_with, key, tmp_path)
        assert said.startswith(f"{key}: {tmp_path} is no model that can be used")

    def test_a_hub_out_of_reach(self, recipe_with: Callable[..., Recipe], key: str) -> None:
        said = self.plan(recipe_with, key, "nobody/nothing")
        assert f"{key}: nobody/nothing cannot be reached" in said
        assert "give a local folder" in said


def test_a_model_without_a_chat_template(
    recipe_with: Callable[..., Recipe], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    save_checkpoint(make_model(), tokenizer, tmp_path / "plain")
    overrides = [f"model.path={tmp_path / 'plain'}"]
    assert "set task.chat = false" in only_error(make_plan(recipe_with(*overrides), LAPTOP))
    assert make_plan(recipe_with(*overrides, "task.chat=false"), LAPTOP).errors == []


def test_a_variable_that_the_chat_template_does_not_know(
    recipe_with: Callable[..., Recipe],
) -> None:
    override = "task.chat_template_kwargs={ enable_thinking = false }"
    said = only_error(make_plan(recipe_with(override), LAPTOP))
    assert "task.chat_template_kwargs" in said
    assert "no enable_thinking" in said
    with pytest.raises(RecipeError, match=r"task: .*chat_template_kwargs.*chat = false"):
        recipe_with(override, "task.chat=false")


@pytest.mark.parametrize(
    ("arguments", "max_tokens", "wrong"),
    [
        ('"--max-model-len", "256"', 250, None),  # prompts have 6 tokens
        ('"--max-model-len", "256"', 251, r"come to 257.*takes 256.*or raise --max-model-len"),
        ('"--max-model-len=256"', 251, "takes 256"),
        ('"--max-model-len", "0.25K"', 251, "takes 256"),
        ("", 506, None),  # the model's 512 positions
        ("", 507, r"takes 512: lower rollout\.max_tokens$"),
        ('"--max-model-len", "1k"', 160, "1k is more than the model's 512 positions"),
        ('"--max-model-len", "long"', 160, "--max-model-len long is no number"),
        ('"--max-model-len", "auto"', 506, None),
        ('"--max-model-len=-1"', 507, "takes 512"),
    ],
)
def test_lengths(
    recipe_with: Callable[..., Recipe], arguments: str, max_tokens: int, wrong: str | None
) -> None:
    plan = make_plan(
        recipe_with(f"servers.vllm_args=[{arguments}]", f"rollout.max_tokens={max_tokens}"), LAPTOP
    )
    if wrong is None:
        assert plan.errors == []
    else:
        assert re.search(wrong, only_error(plan))


@pytest.mark.parametrize(
    ("override", "machine", "ranks", "said"),
    [
        ('servers.vllm_args=["--port", "80"]', LAPTOP, 1, "--port is set by the run"),
        (
            'stopping.rule=value-gated;stopping.value=critic;servers.critic_vllm_args=["--host=0"]',
            LAPTOP,
            1,
            "critic_vllm_args: --host",
        ),
        ('servers.vllm_args=["-tp", "3"]', EIGHT, 1, "3 does not divide the model's 4 attention"),
        ('servers.vllm_args=["-tp", "two"]', LAPTOP, 1, "size two is no number of GPUs"),
        ('servers.vllm_args=["-tp", "0"]', EIGHT, 1, "size 0 is no number of GPUs"),
        ("task.grader=maths", LAPTOP, 1, "task.grader = 'maths': give one of"),
        ("task.grader=foo.bar:baz", LAPTOP, 1, "task.grader = 'foo.bar:baz' cannot be imported"),
        ("run.seed=0", EIGHT, 9, "9 ranks on 8 GPUs"),
        ("servers.weight_transfer=ipc", LAPTOP, 1, "from GPU to GPU, and there is none"),
        ("servers.weight_transfer=nccl", LAPTOP, 1, "from GPU to GPU, and there is none"),
        ("servers.weight_transfer=ipc", EIGHT, 2, "is for one rank"),
        ("servers.weight_transfer=nccl", EIGHT, 1, "servers.policy_gpus"),
    ],
)
def test_settings_that_cannot_work(
    recipe_with: Callable[..., Recipe], override: str, machine: Machine, ranks: int, said: str
) -> None:
    plan = make_plan(recipe_with(*override.split(";")), machine, ranks)
    assert any(said in error for error in plan.errors), plan.errors


async def test_a_server_given_by_url_must_answer(recipe_with: Callable[..., Recipe]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    recipe = recipe_with(f'servers.policy_urls=["{url}"]')
    plan = make_plan(recipe, LAPTOP)
    assert plan.errors == []
    assert any(f"nothing answers at {url}" in warning for warning in plan.warnings)
    async with FakeServer(Script([])) as server:
        recipe = recipe_with(f'servers.policy_urls=["{server.url}"]')
        assert make_plan(recipe, LAPTOP).errors == []


def test_a_full_disk(recipe_with: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_with("logs.rollouts=false", "checkpoints.keep=2")
    shapes = make_plan(recipe, LAPTOP).shapes.values()
    # The third checkpoint is whole before the first goes; at the end come the models.
    needed = (3 * 12 + 4) * sum(shape.parameters for shape in shapes)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed - 1))
    assert "lower checkpoints.keep" in only_error(make_plan(recipe, LAPTOP))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed))
    assert make_plan(recipe, LAPTOP).errors == []
    assert "run.output" in only_error(make_plan(recipe_with("checkpoints.keep=2"), LAPTOP))
    # Of what a run needs, it has some already when it goes on.
    there = recipe.run.output / "checkpoints" / "step-00000010" / "actor"
    there.parent.mkdir(parents=True)
    there.write_bytes(bytes(100))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed - 100))
    assert make_plan(recipe, LAPTOP).errors == []


def test_more_held_out_problems_than_there_are(recipe_with: Callable[..., Recipe]) -> None:
    plan = make_plan(recipe_with("evaluation.problems=2000"), LAPTOP)
    assert "evaluation.problems" in only_error(plan)


def test_an_unreadable_task(recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    train = tmp_path / "nothing.jsonl"
    plan = make_plan(recipe_with("task.kind=dataset", f"task.train={train}"), LAPTOP)
    assert str(train) in "".join(plan.errors)
