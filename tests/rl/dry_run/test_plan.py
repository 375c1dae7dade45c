"""The dry run: what it finds wrong, what it says a run takes, and the recipes of the paper."""

from __future__ import annotations

import re
import shlex
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config

from espo_gateway.supervisor import free_port
from espo_gateway.testing import FakeServer, Script
from espo_rl.base_model.train import make_model, make_tokenizer, save_checkpoint
from espo_rl.config import RECIPES, Recipe, RecipeError, load_recipe
from espo_rl.dry_run.footprint import Machine
from espo_rl.dry_run.hours import Hours, Speed
from espo_rl.dry_run.memory import Part, activation_parts, checkpoint_bytes, training_parts
from espo_rl.dry_run.plan import RunPlan, load_shape, make_plan
from espo_rl.types import EndReason, Problem, Rollout
from tests.helpers.models import random_checkpoint

LAPTOP = Machine(cpus=2, ram=16e9)
EIGHT = Machine(cpus=64, ram=1e12, gpus=(96e9,) * 8)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("plan") / "base", 0)


@pytest.fixture
def recipe_with(tiny: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(*overrides: str) -> Recipe:
        given = [f"model.path={tiny}", f"run.output={tmp_path / 'out'}", *overrides]
        return load_recipe("arithmetic", given)

    return make


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


def only_error(plan: RunPlan) -> str:
    (error,) = plan.errors
    return error


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
    assert "set task.chat=false" in only_error(make_plan(recipe_with(*overrides), LAPTOP))
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
        ('servers.critic_vllm_args=["--host=0"]', LAPTOP, 1, "critic_vllm_args: --host"),
        ('servers.vllm_args=["-tp", "3"]', EIGHT, 1, "3 does not divide the model's 4 attention"),
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
    plan = make_plan(recipe_with(override), machine, ranks)
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


def test_an_unreadable_task(recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    train = tmp_path / "nothing.jsonl"
    plan = make_plan(recipe_with("task.kind=dataset", f"task.train={train}"), LAPTOP)
    assert str(train) in "".join(plan.errors)


# -- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_exact(tmp_path: Path, tied: bool) -> None:
    path = random_checkpoint(tmp_path, 0, tied=tied)
    for classifier, kind in (
        (False, AutoModelForCausalLM),
        (True, AutoModelForSequenceClassification),
    ):
        model = kind.from_pretrained(path, **({"num_labels": 1} if classifier else {}))
        shape = load_shape("model.path", str(path), classifier=classifier)
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.layers, shape.hidden, shape.intermediate) == (2, 128, 384)
    assert (shape.heads, shape.key_values) == (4, 64)


QWEN = {  # https://huggingface.co/Qwen/Qwen2.5-0.5B, -1.5B and -7B, config.json
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}


def qwen(folder: Path, size: str, **changes: Any) -> Path:
    """A checkpoint's folder without its weights: nothing can read any."""
    config = Qwen2Config(
        **{"num_hidden_layers": 28, "max_position_embeddings": 131_072, **QWEN[size], **changes}
    )
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize(("size", "millions"), [("0.5b", 494.0), ("1.5b", 1543.7), ("7b", 7615.6)])
def test_parameters_of_known_models(tmp_path: Path, size: str, millions: float) -> None:
    shape = load_shape("model.path", str(qwen(tmp_path, size)))
    assert shape.parameters / 1e6 == pytest.approx(millions, abs=0.1)


# -- memory and disk -------------------------------------------------------------------------------


def bytes_each(parts: list[Part], name: str) -> float:
    return sum(part.device for part in parts if name in part.name)


@pytest.mark.parametrize(
    ("dtype", "stage", "weights", "optimizer"),
    [
        # Read off DeepSpeed's engines in one process: bytes a parameter alive, by dtype.
        ("float32", 0, 4, 8),
        ("float32", 1, 4, 12),
        ("float32", 2, 4, 12),
        ("bfloat16", 0, 2, 12),
        ("bfloat16", 1, 2, 12),
        ("bfloat16", 2, 2, 12),
        ("bfloat16", 3, 2, 12),
    ],
)
def test_bytes_a_parameter(
    recipe_with: Callable[..., Recipe],
    tiny: Path,
    dtype: str,
    stage: int,
    weights: int,
    optimizer: int,
) -> None:
    recipe = recipe_with(f"model.dtype={dtype}", f"deepspeed.zero_stage={stage}")
    shape = load_shape("model.path", str(tiny))
    parts = training_parts(recipe, "actor", shape, ranks=1)
    assert bytes_each(parts, "weights") == weights * shape.parameters
    assert bytes_each(parts, "optimizer") == optimizer * shape.parameters
    split = training_parts(recipe, "actor", shape, ranks=4)
    assert bytes_each(split, "optimizer") == bytes_each(parts, "optimizer") / (4 if stage else 1)
    assert bytes_each(split, "weights") == bytes_each(parts, "weights") / (4 if stage == 3 else 1)


def test_offloading_moves_memory_to_the_machine(
    recipe_with: Callable[..., Recipe], tiny: Path
) -> None:
    shape, ranks = load_shape("model.path", str(tiny)), 4

    def sums(offload: str) -> tuple[float, float]:
        recipe = recipe_with("deepspeed.zero_stage=3", f"deepspeed.offload={offload}")
        parts = [p for p in training_parts(recipe, "actor", shape, ranks) if p.sure]
        return sum(p.device for p in parts), sum(p.host for p in parts) / shape.parameters

    assert sums("none") == (20 * shape.parameters / ranks, 0.0)
    assert sums("optimizer") == (4 * shape.parameters / ranks, 16.0)
    assert sums("all") == (0.0, 20.0)


def test_logits_grow_with_the_micro_batch(recipe_with: Callable[..., Recipe], tiny: Path) -> None:
    shape = load_shape("model.path", str(tiny))

    def logits(*overrides: str, longest: int = 100) -> float:
        parts = activation_parts(recipe_with(*overrides), [shape], longest)
        return bytes_each(parts, "logits")

    assert logits("ppo.micro_batch_tokens=1000") == 1000 * 44 * 4 * 5
    assert logits("ppo.micro_batch_tokens=1000", "ppo.entropy_bonus=0.1") == 1000 * 44 * 4 * 6
    # One longer than the budget is alone in a micro-batch; and there are 128 samples at most.
    assert logits("ppo.micro_batch_tokens=50") == 100 * 44 * 4 * 5
    assert logits("ppo.micro_batch_tokens=1000000") == 12_800 * 44 * 4 * 5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_is_as_large_as_planned(
    recipe_with: Callable[..., Recipe], tmp_path: Path, stage: int
) -> None:
    from espo_rl.ppo.trainer import PpoTrainer

    recipe = recipe_with(f"deepspeed.zero_stage={stage}")
    trainer = PpoTrainer(recipe)
    ends = [-1.0, 1.0]
    trainer.update(
        [
            Rollout(
                problem=Problem("1", "1", "1"),
                prompt_ids=[1, 2],
                token_ids=[5] * 8,
                logprobs=np.full(8, -1.0),
                max_logprobs=np.full(8, -1.0),
                text="",
                end=EndReason.COMPLETED,
                kept=8,
                reward=reward,
            )
            for reward in ends
        ]
    )
    trainer.save(tmp_path / "checkpoint")
    files = [path for path in (tmp_path / "checkpoint").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    shapes = make_plan(recipe, LAPTOP).shapes
    planned = checkpoint_bytes(recipe, [shapes["actor"], shapes["critic"]])
    assert size == pytest.approx(planned, rel=0.1)


def test_what_is_here() -> None:
    here = Machine.here()
    assert 0 < here.ram <= psutil.virtual_memory().total
    assert here.cpus >= 1


# -- does it fit? ----------------------------------------------------------------------------------


def fit_error(plan: RunPlan) -> str:
    (error,) = (message for message in plan.errors if "does not fit" in message)
    return error


def qwen_plan(
    tmp_path: Path, recipe: str, machine: Machine, ranks: int, *overrides: str
) -> RunPlan:
    size = recipe.removeprefix("espo-")
    if not (tmp_path / size).exists():
        # The distilled models have a head of their own.
        qwen(tmp_path / size, size, tie_word_embeddings=False)
    given = [f"model.path={tmp_path / size}", f"run.output={tmp_path}", "task.kind=arithmetic"]
    return make_plan(load_recipe(recipe, [*given, *overrides]), machine, ranks)


@pytest.fixture
def large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(4e12))


SMALL_ONES = Machine(cpus=64, ram=1e12, gpus=(24e9,) * 8)
ONE_GPU = 'servers.vllm_args=["--gpu-memory-utilization", "0.4"]'


@pytest.mark.usefixtures("large_disk")
class TestFit:
    @pytest.mark.parametrize(
        ("machine", "ranks", "overrides"),
        [
            # ZeRO-3 helps over ranks, offloading with one, the length of micro-batches always.
            (SMALL_ONES, 8, ["deepspeed.zero_stage=1", "ppo.micro_batch_tokens=65536"]),
            (Machine(16, 512e9, (80e9,)), 1, [ONE_GPU, "stopping.value=constant"]),
            (SMALL_ONES, 8, ["model.dtype=float32", "deepspeed.zero_stage=2"]),
        ],
    )
    def test_the_advice_holds(
        self, tmp_path: Path, machine: Machine, ranks: int, overrides: list[str]
    ) -> None:
        error = fit_error(qwen_plan(tmp_path, "espo-1.5b", machine, ranks, *overrides))
        assert "in a GPU" in error
        advice = error.partition("; set ")[2].split(", ")
        better = qwen_plan(tmp_path, "espo-1.5b", machine, ranks, *overrides, *advice)
        assert better.errors == []
        for i in range(len(advice)):
            fewer = advice[:i] + advice[i + 1 :]
            worse = qwen_plan(tmp_path, "espo-1.5b", machine, ranks, *overrides, *fewer)
            assert any("not fit" in said for said in worse.errors + worse.warnings)

    def test_more_ranks_are_advised(self, tmp_path: Path) -> None:
        error = fit_error(qwen_plan(tmp_path, "espo-7b", EIGHT, 1))
        assert "--num_gpus 8" in error

    def test_no_advice_for_what_cannot_be(self, tmp_path: Path) -> None:
        error = fit_error(qwen_plan(tmp_path, "espo-7b", Machine(8, 64e9, (24e9,)), 1, ONE_GPU))
        assert error.endswith("it takes more or larger GPUs, or a smaller model")

    def test_without_a_gpu_all_is_in_ram(self, tmp_path: Path) -> None:
        error = fit_error(qwen_plan(tmp_path, "espo-7b", LAPTOP, 2))
        assert "in RAM of 16.0 GB" in error

    def test_a_rough_estimate_only_warns(self, recipe_with: Callable[..., Recipe]) -> None:
        footprint = make_plan(recipe_with(), LAPTOP).footprint
        assert footprint is not None
        sure, all_of_it = (footprint.demand(sure=sure)[1] for sure in (True, False))
        assert sure < all_of_it
        plan = make_plan(recipe_with(), Machine(2, (sure + all_of_it) / 2))
        assert plan.errors == []
        (warning,) = plan.warnings
        assert warning.startswith("may not fit")
        assert "does not fit" in only_error(make_plan(recipe_with(), Machine(2, 0.99 * sure)))

    def test_a_server_without_room(self, tmp_path: Path) -> None:
        flags = '"--tensor-parallel-size", "4", "--gpu-memory-utilization"'
        for share, found in (("0.04", "errors"), ("0.08", "warnings"), ("0.15", None)):
            override = f'servers.vllm_args=[{flags}, "{share}"]'
            plan = qwen_plan(tmp_path, "espo-7b", EIGHT, 8, override)
            assert ["policy server" in said for said in plan.errors] == (
                [True] if found == "errors" else []
            )
            assert ["some will wait" in said for said in plan.warnings] == (
                [True] if found == "warnings" else []
            )


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


@pytest.mark.usefixtures("large_disk")
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


def one_gpu_plan(tmp_path: Path, size: str, *overrides: str) -> RunPlan:
    """Of the recipe for GSM8K, whose problems are on the hub."""
    folder = qwen(tmp_path / size, size)
    given = [f"model.path={folder}", f"run.output={tmp_path}", "task.kind=arithmetic"]
    recipe = load_recipe(f"qwen2.5-{size}-gsm8k", [*given, *overrides])
    return make_plan(recipe, Machine(cpus=16, ram=64e9, gpus=(24e9,)), 1)


@pytest.mark.usefixtures("large_disk")
@pytest.mark.parametrize("size", ["0.5b", "1.5b"])
def test_a_gpu_of_24_gb_is_enough(tmp_path: Path, size: str) -> None:
    plan = one_gpu_plan(tmp_path, size)
    assert (plan.errors, plan.warnings) == ([], [])


@pytest.mark.usefixtures("large_disk")
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


def test_the_recipe_for_a_cpu_is_whole() -> None:
    recipe = load_recipe("smollm2-135m")
    assert (recipe.task.name, recipe.stopping.sources) == ("leg_counting", ["probe"])


# -- hours -----------------------------------------------------------------------------------------


def hours(plan: RunPlan, speed: Speed = Speed(flops=1e14, bandwidth=1e12)) -> Hours:  # noqa: B008
    return Hours.of(plan.recipe, plan.shapes, plan.longest_prompt, plan.ranks, speed)


def test_hours_are_those_of_the_arithmetic(tmp_path: Path) -> None:
    plan = one_gpu_plan(tmp_path, "0.5b", "model.gradient_checkpointing=false")
    found, parameters = hours(plan), plan.shapes["actor"].parameters
    # 200 steps of 128 rollouts at once: 512 decoding steps, by the matrix products.
    assert found.sampling == pytest.approx(
        200 * 512 * (0.005 + 2 * parameters * 128 / 0.4e14) / 3600
    )
    tokens = 200 * (128 * 512 + 16 * plan.longest_prompt)
    # Forward, backward twice as much, and a forward for the old logprobs.
    assert found.updates == pytest.approx(tokens * 8 * parameters / 0.4e14 / 3600)
    # Decoding one at a time is bound by the bandwidth.
    alone = one_gpu_plan(tmp_path, "0.5b", "rollout.concurrency=1")
    assert hours(alone).sampling == pytest.approx(
        200 * 512 * 128 * (0.005 + 2 * parameters / 1e12) / 3600
    )


def test_what_costs_hours(tmp_path: Path) -> None:
    plan = one_gpu_plan(tmp_path, "0.5b")
    for override, more in (
        ("model.lora_rank=8", False),
        ("model.gradient_checkpointing=false", False),
        ("ppo.minibatches=1", False),
        ("ppo.epochs=2", True),
        ("ppo.advantage=gae", True),
        ("ppo.kl_coefficient=0.1", True),
    ):
        other = one_gpu_plan(tmp_path, "0.5b", override)
        assert (hours(other).updates > hours(plan).updates) is more
        assert hours(other).sampling == pytest.approx(hours(plan).sampling, rel=0.01)
    assert "hours" in plan.text(Speed(1e14, 1e12))
    assert "hours" not in plan.text()


def test_the_speed_of_this_machine_is_measured() -> None:
    speed = Speed.here(load_recipe("arithmetic"))
    assert 1e9 < speed.flops < 1e16
    assert 1e8 < speed.bandwidth < 1e14
