"""Packed micro-batches say what padded rows say, to the gradient, whatever attends to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from espo_rl.ppo import critic as critics
from espo_rl.ppo import policy as policies
from espo_rl.ppo.critic import Critic
from espo_rl.ppo.engine import without_noise
from espo_rl.ppo.packed import Packed, takes_packed
from espo_rl.ppo.policy import Policy
from espo_rl.ppo.samples import MicroBatch, Sample, micro_batches
from espo_rl.types import Rollout
from tests.helpers.trainer import (
    Paths,
    assert_same_update,
    make_rollouts,
    trainer,
    weights_of,
)
from tests.rl.ppo.test_policy import MODELS, SMALL

SMALLER = {"vocab_size": 48, "n_layer": 2, "n_head": 2}
ONE_HEAD = {**SMALL, "num_key_value_heads": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

PACKED: dict[str, PreTrainedConfig] = {
    **{name: config for name, (config, _) in MODELS.items()},
    "llama": LlamaConfig(**ONE_HEAD),
    "qwen3": Qwen3Config(**ONE_HEAD, head_dim=16),
    "experts": Qwen3MoeConfig(**ONE_HEAD, head_dim=16, **EXPERTS),
    "learned positions": GPT2Config(**SMALLER, n_embd=32, bos_token_id=1, eos_token_id=2),
    "in parallel": GPTNeoXConfig(**SMALL),
    "a window": MistralConfig(**ONE_HEAD, sliding_window=4),
    "windows in some layers": Qwen2Config(
        **{**ONE_HEAD, "num_hidden_layers": 2},
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
    "fused projections": Phi3Config(**SMALL, sliding_window=6),
}
#: positions in the attention's scores, and no attention at all
NOT_PACKED: dict[str, PreTrainedConfig] = {
    "alibi": BloomConfig(**SMALLER, hidden_size=32),
    "mamba": MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=2),
}


def make_samples(seed: int = 0) -> list[Sample]:
    """Three prompts, one of a token, with rollouts down to one token; the third has one alone."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 48, size).tolist() for size in (5, 1, 9)]
    rows = [(0, 12), (1, 3), (0, 4), (0, 1), (1, 17), (2, 6), (1, 3)]
    samples = []
    for group, kept in rows:
        tokens = torch.tensor([*prompts[group], *rng.integers(3, 48, kept).tolist()])
        samples.append(Sample(tokens, len(prompts[group]), group, 0.0))
    return samples


def the_batch(samples: list[Sample]) -> MicroBatch:
    (batch,) = micro_batches(samples, 10_000, rank=0, ranks=1, device="cpu")
    assert batch.packed is not None
    return batch


def _known(column: torch.Tensor | None) -> torch.Tensor:
    assert column is not None
    return column


def loud(model: Any) -> Any:
    """As initialised, a model says nearly the same whatever stands before."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", PACKED)
def test_packed_rollouts_are_what_padded_ones_are(name: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = loud(AutoModelForCausalLM.from_config(PACKED[name]))
    if checkpointing:
        model.gradient_checkpointing_enable()
    without_noise(model)
    batch = the_batch(make_samples())
    rows = replace(batch, packed=None)
    policy = Policy(model, 0.7)
    found, expected = (policy(model, of, entropy=True, raw=True) for of in (batch, rows))
    assert batch.view(packs=True).inputs["input_ids"].numel() < 0.7 * batch.tokens.numel()
    for key in ("logprobs", "entropy", "raw"):
        torch.testing.assert_close(
            getattr(found, key), getattr(expected, key), atol=1e-5, rtol=1e-5
        )
    shares = torch.randn(len(batch.targets))
    gradients = [
        torch.autograd.grad(
            ((of.logprobs + _known(of.entropy)) * shares).sum(),
            [*model.parameters()],
            allow_unused=True,
        )
        for of in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_what_stands_before_a_rollout_is_its_own_prompt() -> None:
    """The test above can fail: another prompt, or another rollout before it, is another answer."""
    model = loud(AutoModelForCausalLM.from_config(PACKED["llama"])).eval()
    samples, others = make_samples(), make_samples()
    others[0].tokens[2] += 1  # in its prompt, which it shares no longer
    others[4].tokens[-2] += 1
    policy = Policy(model, 1.0)
    found = [policy(model, the_batch(of)).logprobs for of in (samples, others)]
    order = the_batch(samples).indices
    assert order == the_batch(others).indices
    parts = [of.split([samples[i].kept for i in order]) for of in found]
    changed = [
        i for i, one, other in zip(order, *parts, strict=True) if not torch.allclose(one, other)
    ]
    assert sorted(changed) == [0, 4]


@pytest.mark.parametrize("name", NOT_PACKED)
def test_a_model_that_looks_at_other_tokens_otherwise_is_given_rows(name: str) -> None:
    torch.manual_seed(0)
    model = loud(AutoModelForCausalLM.from_config(NOT_PACKED[name])).eval()
    before = model.config._attn_implementation
    assert not takes_packed(model)
    assert model.config._attn_implementation == before
    batch = the_batch(make_samples())
    found = Policy(model, 1.0)(model, batch).logprobs
    assert torch.equal(found, Policy(model, 1.0)(model, replace(batch, packed=None)).logprobs)


def test_a_critic_values_the_same_states() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**ONE_HEAD, num_labels=1)
    critic = Critic(loud(AutoModelForSequenceClassification.from_config(config))).eval()
    assert critic.packs
    batch = the_batch(make_samples())
    packed, rows = batch.view(packs=True), batch.view(packs=False)
    found, expected = (critic(**view.inputs).flatten() for view in (packed, rows))
    torch.testing.assert_close(found[packed.before], expected[rows.before], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[packed.kept], expected[rows.kept], atol=1e-5, rtol=1e-5)


def test_what_packs_is_saved_as_any_other(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(PACKED["llama"])
    assert takes_packed(model)
    model.save_pretrained(tmp_path)
    assert "espo" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


texts = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=8
)  # prompt, and tokens after it


@given(texts)
def test_each_row_can_be_read_off_the_line(rows: list[tuple[int, int]]) -> None:
    prompts = [torch.arange(100 * size, 100 * size + size) for size in range(4)]
    made = [torch.cat([prompts[p], torch.randint(500, 900, (n,))]) for p, n in rows]
    packed = Packed.of(made, [p for p, _ in rows])
    line, (places, back) = packed.tokens[0], packed.layout[0]
    for text, row in zip(made, places, strict=True):
        assert torch.equal(line[row[: len(text)]], text)
        assert torch.equal(packed.positions[0][row[: len(text)]], torch.arange(len(text)))
    # Each token once: those of a prompt for all of its rollouts.
    assert len(line) == sum(n for _, n in rows) + sum({p for p, _ in rows})
    padded = nn.utils.rnn.pad_sequence(made, batch_first=True).flatten()
    assert torch.equal(padded[back.flatten()[: len(line)]], line)


# -- the trainer -----------------------------------------------------------------------------------


def of_two_prompts() -> list[Rollout]:
    rollouts = make_rollouts()
    first: dict[int, Rollout] = {}
    return [
        replace(one, prompt_ids=first.setdefault(one.group, one).prompt_ids) for one in rollouts
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("budget", [60, 16384])
def test_an_update_is_the_same_with_and_without(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, stage: int, budget: int
) -> None:
    settings: dict[str, Any] = {
        "zero_stage": stage,
        "micro_batch_tokens": budget,
        "kl_coefficient": 0.1,
        "importance_cap": 2.0,
    }
    ours = trainer(paths, **settings)
    found = ours.update(of_two_prompts())
    values = ours.critic_values(of_two_prompts())
    monkeypatch.setattr(policies, "takes_packed", lambda model: False)
    monkeypatch.setattr(critics, "takes_packed", lambda model: False)
    rows = trainer(paths, **settings)
    expected = rows.update(of_two_prompts())
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert_same_update(weights_of(ours), weights_of(rows))
    for one, other in zip(values, rows.critic_values(of_two_prompts()), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
