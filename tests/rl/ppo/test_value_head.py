"""V by a head on the actor's own layers: what a server with --value-head tells of a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from espo_rl.ppo.policy import Policy
from espo_rl.ppo.trainer import PpoTrainer
from espo_rl.ppo.value_head import ValueHead
from tests.helpers.models import headed, random_model, values
from tests.helpers.trainer import (
    Paths,
    assert_same_update,
    make_rollouts,
    recipe_of,
    weights_of,
)

TOLERANCE = 1e-4


def trainer(paths: Paths, head: Path | None, **settings: Any) -> PpoTrainer:
    """Without a critic. settings: of `recipe_of`, and `model`, of that section."""
    model = settings.pop("model", {})
    settings = {"advantage": "group", "critic_learning_rate": None, **settings}
    recipe = recipe_of(Paths(paths.actor, paths.critic), **settings)
    told = {"value": "critic", "rule": "value-only", "value_head": head}
    sections = {
        "stopping": recipe.stopping.model_copy(update=told if head else {}),
        "model": recipe.model.model_copy(update={"critic": None, **model}),
    }
    return PpoTrainer(recipe.model_copy(update=sections))


def expected(critic: PreTrainedModel) -> list[list[float]]:
    """V of the state that each token was sampled in."""
    return [
        values(critic, one.prompt_ids + one.token_ids)[len(one.prompt_ids) - 1 : -1]
        for one in make_rollouts()
    ]


def assert_told(ours: PpoTrainer, critic: PreTrainedModel) -> None:
    found = ours.critic_values(make_rollouts())
    for one, other in zip(found, expected(critic), strict=True):
        assert one == pytest.approx(other, abs=TOLERANCE)


def with_weights(ours: PpoTrainer, layers: int) -> PreTrainedModel:
    """A head on the layers of what is trained, as servers are sent it."""
    policy = random_model(0)
    with torch.no_grad():
        for name, weights in ours.weights("actor"):
            policy.get_parameter(name).copy_(weights)
    return headed(policy, layers)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("budget", [1, 16384])
def test_it_says_what_the_critic_of_these_layers_says(
    paths: Paths, tmp_path: Path, layers: int, budget: int
) -> None:
    """Past a cut, too; and of the last layer, whose states the LM head reads."""
    critic = headed(random_model(0), layers)
    critic.save_pretrained(tmp_path)
    ours = trainer(paths, tmp_path, micro_batch_tokens=budget)
    assert ours.critic is None
    assert_told(ours, critic)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("model", [{}, {"lora_rank": 4}, {"gradient_checkpointing": True}], ids=str)
def test_it_stands_on_the_weights_of_now_and_changes_no_update(
    paths: Paths, tmp_path: Path, stage: int, model: dict[str, Any]
) -> None:
    headed(random_model(0)).save_pretrained(tmp_path)
    settings = {"zero_stage": stage, "model": model, "learning_rate": 0.01}
    ours, plain = trainer(paths, tmp_path, **settings), trainer(paths, None, **settings)
    assert_told(ours, headed(random_model(0)))
    for one in (ours, plain):
        assert one.update(make_rollouts())["skipped_steps"] == 0
    assert_same_update(weights_of(ours), weights_of(plain))
    before = ours.critic_values(make_rollouts())
    assert_told(ours, with_weights(ours, 1))
    then = np.array(expected(headed(random_model(0)))[2])
    assert np.abs(before[2] - then).max() > 10 * TOLERANCE


def test_a_head_that_cannot_stand_on_it_is_refused(paths: Paths, tmp_path: Path) -> None:
    critic = headed(random_model(0))
    critic.config.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no head of V .*--head-only"):
        trainer(paths, tmp_path / "none")
    critic.save_pretrained(tmp_path / "deep")
    config = tmp_path / "deep/config.json"
    config.write_text(config.read_text().replace('_layers": 1', '_layers": 3'))
    with pytest.raises(ValueError, match="of 3 layers of width 128, and the model has 2 of 128"):
        trainer(paths, tmp_path / "deep")


def test_a_model_that_does_not_show_its_states_is_refused(tmp_path: Path) -> None:
    headed(random_model(0)).save_pretrained(tmp_path)
    config = GPT2Config(n_embd=128, n_head=2, n_layer=2, vocab_size=50, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel does not show .* ask a critic server"):
        ValueHead(model, Policy(model, 1.0), tmp_path)
