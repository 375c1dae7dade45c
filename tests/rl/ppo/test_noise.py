"""Nothing random in an update: what models do in training alone is off, checkpointing is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import (
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from espo_rl.config import Recipe
from espo_rl.ppo import trainer as ppo_trainer
from espo_rl.ppo.losses import policy_loss, value_loss
from espo_rl.ppo.trainer import PpoTrainer
from tests.helpers.trainer import EXTRA, make_rollouts, weights_of

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: As published, but more of it: modules, functions, layers left out, and noise on a router's input.
NOISY: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=48,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        embd_pdrop=0.1,
        resid_pdrop=0.1,
        attn_pdrop=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "qwen2": Qwen2Config(
        **SMALL, num_key_value_heads=1, intermediate_size=64, attention_dropout=0.3
    ),
    "opt": OPTConfig(
        **SMALL,
        ffn_dim=64,
        word_embed_proj_dim=32,
        dropout=0.3,
        attention_dropout=0.3,
        layerdrop=0.5,
    ),
    "falcon": FalconConfig(**SMALL, hidden_dropout=0.3, attention_dropout=0.3),
    "gpt-neox": GPTNeoXConfig(
        **SMALL, intermediate_size=64, hidden_dropout=0.3, attention_dropout=0.3
    ),
    "mixtral": MixtralConfig(
        **SMALL,
        num_key_value_heads=1,
        intermediate_size=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        router_jitter_noise=0.3,
        attention_dropout=0.3,
    ),
}


def saved(folder: Path, name: str) -> tuple[Path, Path]:
    """A policy and a critic, whose values are not 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(NOISY[name]).save_pretrained(folder / "actor")
        config = NOISY[name].__class__.from_pretrained(folder / "actor", num_labels=1)
        critic = AutoModelForSequenceClassification.from_config(config)
        critic.save_pretrained(folder / "critic")
    return folder / "actor", folder / "critic"


def made(paths: tuple[Path, Path], *, stage: int = 0, **model: Any) -> PpoTrainer:
    settings = {"path": str(paths[0]), "critic": str(paths[1]), **model}
    extra = EXTRA if stage == 3 else {}
    return PpoTrainer(
        Recipe.model_validate(
            {
                "model": settings,
                "ppo": {"minibatches": 1, "learning_rate": 1e-3, "kl_coefficient": 0.1},
                "deepspeed": {"zero_stage": stage, "extra": extra},
            }
        )
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NOISY)
def test_a_policys_ratio_to_itself_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, checkpointing: bool
) -> None:
    ours = made(saved(tmp_path, name), gradient_checkpointing=checkpointing)
    policies, critics = Mock(wraps=policy_loss), Mock(wraps=value_loss)
    monkeypatch.setattr("espo_rl.ppo.losses.policy_loss", policies)
    monkeypatch.setattr(ppo_trainer, "value_loss", critics)
    metrics = ours.update(make_rollouts())
    for losses in (policies, critics):
        now, before = losses.call_args.args[:2]
        torch.testing.assert_close(now.detach(), before, atol=1e-6, rtol=0)
    assert metrics["kl_reference"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_checkpointing_recomputes_and_changes_nothing(
    tmp_path: Path, name: str, stage: int
) -> None:
    paths = saved(tmp_path, name)
    plain = made(paths, stage=stage)
    ours = made(paths, stage=stage, gradient_checkpointing=True)
    passes = {}
    for trainer in (plain, ours):
        calls = passes[trainer] = Mock(return_value=None)
        for engine in (trainer.actor, trainer.critic):
            assert engine is not None
            for layer in engine.module.modules():
                if hasattr(layer, "gradient_checkpointing") and not hasattr(layer, "config"):
                    layer.register_forward_pre_hook(lambda *_, calls=calls: calls())
        trainer.update(make_rollouts())
    assert passes[ours].call_count > passes[plain].call_count > 0
    expected = weights_of(plain)
    for key, value in weights_of(ours).items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=0, msg=key)
