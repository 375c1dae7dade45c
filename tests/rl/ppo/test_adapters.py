"""LoRA: what is trained, sent, saved and resumed, with real DeepSpeed engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from espo_rl.config import Model, Recipe
from espo_rl.dry_run.memory import training_parts
from espo_rl.dry_run.plan import load_shape
from espo_rl.ppo.adapters import AdapterError, adapt
from espo_rl.ppo.parameters import adapters, dithered, gathered, tensor_specs
from espo_rl.ppo.trainer import PpoTrainer
from tests.helpers.models import random_model
from tests.helpers.trainer import Paths, make_models, make_rollouts, recipe_of, weights_of

pytestmark = pytest.mark.slow

PROBE = [4, 9, 7, 11, 5, 6, 4]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    made = make_models(tmp_path_factory.mktemp("models"))
    return Paths(made.actor, made.critic)


def trainer(paths: Paths, *, model: dict[str, Any] | None = None, **settings: Any) -> PpoTrainer:
    recipe = recipe_of(paths, **{"learning_rate": 0.01, **settings})
    lora = {"lora_rank": 4, **(model or {})}
    return PpoTrainer(recipe.model_copy(update={"model": recipe.model.model_copy(update=lora)}))


@torch.no_grad()
def logprobs(model: Any) -> list[float]:
    rows = model(torch.tensor([PROBE])).logits[0, :-1].log_softmax(-1)
    return rows.gather(1, torch.tensor(PROBE[1:])[:, None])[:, 0].tolist()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", [{}, {"gradient_checkpointing": True}], ids=str)
def test_weights_that_are_sent_say_what_the_adapters_say(
    paths: Paths, tmp_path: Path, stage: int, model: dict[str, Any]
) -> None:
    ours = trainer(paths, model=model, zero_stage=stage)
    base = AutoModelForCausalLM.from_pretrained(paths.actor)
    names = [spec.name for spec in tensor_specs(base)]
    assert [spec.name for spec in ours.specs("actor")] == names
    before, start = weights_of(ours), ours.prompt_logprobs(PROBE)
    assert start == pytest.approx(logprobs(base), abs=1e-5)  # new adapters change nothing
    metrics = ours.update(make_rollouts())
    assert metrics["skipped_steps"] == 0
    assert metrics["grad_norm"] > 0
    after, said = weights_of(ours), ours.prompt_logprobs(PROBE)
    assert said != pytest.approx(start, abs=1e-3)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    linear = {f"actor.{name}" for name in names if "proj" in name and name.endswith("weight")}
    # Of the actor the linear layers, of the critic the head alone.
    assert moved == linear | {"critic.score.weight"}
    ours.save_models(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "actor")
    assert logprobs(merged) == pytest.approx(said, abs=1e-4)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "actor" / "adapter")
    assert logprobs(again) == pytest.approx(said, abs=1e-4)


@pytest.mark.parametrize("stage", [0, 3])
def test_weights_do_not_drift_however_often_they_are_sent(paths: Paths, stage: int) -> None:
    ours = trainer(paths, zero_stage=stage, dtype="bfloat16")
    ours.update(make_rollouts())
    first = weights_of(ours)
    for _ in range(3):
        again = weights_of(ours)
    assert all(torch.equal(value, first[name]) for name, value in again.items())


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizers_know_and_checkpoints_hold_the_adapters_alone(
    paths: Paths, tmp_path: Path, stage: int, dtype: str
) -> None:
    straight = trainer(paths, zero_stage=stage, dtype=dtype, minibatches=2)
    straight.update(make_rollouts())
    straight.save(tmp_path)
    factors = sum(value.numel() for _, value in adapters(straight.module("actor")))
    weights = sum(spec.num_bytes for spec in straight.specs("actor"))
    written = sum(file.stat().st_size for file in (tmp_path / "actor" / "state").iterdir())
    assert 4 * factors < written < weights + 16 * factors
    straight.update(make_rollouts())
    resumed = trainer(paths, zero_stage=stage, dtype=dtype, minibatches=2)
    resumed.load(tmp_path)
    resumed.update(make_rollouts())
    expected = weights_of(straight)
    for name, value in weights_of(resumed).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_reference_is_the_policy_without_its_adapters(paths: Paths, stage: int) -> None:
    ours = trainer(paths, zero_stage=stage, kl_coefficient=0.1)
    assert ours.reference is ours.actor
    assert ours.update(make_rollouts())["kl_reference"] == pytest.approx(0.0, abs=1e-6)
    # Adapters are on again, and learn.
    before = weights_of(ours)
    second = ours.update(make_rollouts())
    assert second["kl_reference"] > 1e-4
    assert not torch.equal(
        before["actor.model.layers.0.self_attn.q_proj.weight"],
        weights_of(ours)["actor.model.layers.0.self_attn.q_proj.weight"],
    )
    whole = trainer(
        Paths(paths.actor, paths.critic, paths.actor), zero_stage=stage, kl_coefficient=0.1
    )
    whole.update(make_rollouts())
    assert second["kl_reference"] == pytest.approx(
        whole.update(make_rollouts())["kl_reference"], rel=1e-3
    )


@pytest.mark.parametrize(
    "settings", [{"lora_targets": ["q_proj", "v_proj"], "lora_alpha": 1.0}, {"lora_rank": 2}]
)
def test_what_is_adapted_and_by_how_much(settings: dict[str, Any]) -> None:
    model = random_model(0)
    before = dict(random_model(0).named_parameters())
    adapt(model, Model(path="base", **{"lora_rank": 4, **settings}))
    torch.manual_seed(1)
    rank = settings.get("lora_rank", 4)
    scale = settings.get("lora_alpha", 2.0 * rank) / rank
    expected = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            torch.nn.init.normal_(layer.lora_B["default"].weight)
            added = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            expected[f"{name}.weight"] = before[f"{name}.weight"] + scale * added
    targets = settings.get("lora_targets", ["proj"])
    assert len(expected) == sum(any(t in name for t in targets) for name in before) - sum(
        name.endswith("bias") and any(t in name for t in targets) for name in before
    )
    for name, value in gathered(model):
        torch.testing.assert_close(value, expected.get(name, before[name]), msg=name)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.5])
def test_in_bfloat16_a_step_smaller_than_rounding_arrives_in_the_mean(share: float) -> None:
    """share: of the step from one bfloat16 number to the next, by which every weight has moved."""
    torch.manual_seed(0)
    base = torch.randn(300, 400).bfloat16()
    exponent = torch.frexp(base.float()).exponent
    step = torch.ldexp(base.float().sign(), exponent - 8)  # away from 0, where all are alike
    moved = base.float() + share * step
    found = dithered(moved, torch.bfloat16, "layer.weight")
    arrived = (found.float() - base.float()) / step
    assert arrived.mean().item() == pytest.approx(share, abs=0.01)
    assert set(arrived.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(found, dithered(moved, torch.bfloat16, "layer.weight"))
    assert torch.equal(dithered(moved, torch.float32, "layer.weight"), moved)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["query"], "query"),
        (["embed_tokens"], "embed_tokens is no linear layer before the head"),
        (["lm_head"], "lm_head is no linear layer before the head"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_by_name(targets: list[str], said: str) -> None:
    with pytest.raises(AdapterError, match=f"model.lora_targets.*{said}"):
        adapt(random_model(0), Model(path="base", lora_rank=2, lora_targets=targets))


def test_a_plan_knows_what_adapters_take(paths: Paths) -> None:
    model = Model(path=str(paths.actor), lora_rank=4)
    recipe = Recipe(model=model)
    shape = load_shape("model.path", str(paths.actor), lora=model)
    plain = load_shape("model.path", str(paths.actor))
    ours = trainer(paths)
    factors = sum(value.numel() for _, value in adapters(ours.module("actor")))
    assert shape.trained == factors
    assert shape.parameters == plain.parameters + factors
    states = next(p for p in training_parts(recipe, "actor", shape, 1) if "states" in p.name)
    assert states.device == 8 * factors
    head = load_shape("model.critic", str(paths.critic), classifier=True, lora=model)
    assert head.trained == ours.module("critic").score.weight.numel()
