"""Log π of the kept tokens, a slice of the vocabulary at a time: the numbers, and what it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from espo_rl.config import Recipe
from espo_rl.ppo import policy as policies
from espo_rl.ppo.losses import entropy, token_logprobs
from espo_rl.ppo.policy import Policy
from espo_rl.ppo.samples import MicroBatch
from espo_rl.ppo.trainer import PpoTrainer
from espo_rl.types import EndReason, Problem, Rollout
from tests.helpers.trainer import (
    EXTRA,
    Paths,
    assert_same_update,
    make_rollouts,
    trainer,
    weights_of,
)


class Linear(nn.Module):
    """The least that a causal model can be: an embedding and a head."""

    device = torch.device("cpu")

    def __init__(self, words: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, hidden)
        self.head = nn.Linear(hidden, words, bias=bias)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return Mock(logits=self.head(self.embedding(input_ids)))


def batch_of(words: int, rows: int, time: int, rng: np.random.Generator) -> MicroBatch:
    tokens = torch.tensor(rng.integers(0, words, (rows, time)))
    response = torch.tensor(rng.random((rows, time - 1)) < 0.5)
    return MicroBatch([*range(rows)], tokens, response, {})


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    words=st.integers(4, 90),
    width=st.integers(1, 2000),
    temperature=st.floats(0.3, 3.0),
    bias=st.booleans(),
    asks_entropy=st.booleans(),
)
def test_slices_say_what_whole_logits_say(
    seed: int, words: int, width: int, temperature: float, bias: bool, asks_entropy: bool
) -> None:
    """With their gradients, at any width of a slice, without a kept token too."""
    torch.manual_seed(seed)
    model = Linear(words, 8, bias)
    batch = batch_of(words, 2, 7, np.random.default_rng(seed))
    logits = model(batch.tokens, use_cache=False).logits[:, :-1][batch.response]
    scaled = logits / temperature
    expected = [token_logprobs(scaled, batch.targets), entropy(scaled)]
    before = token_logprobs(logits, batch.targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SLICE, "cpu", width)
        patch.setattr(policies, "NARROWEST", 1)
        found = Policy(model, temperature)(model, batch, entropy=asks_entropy, raw=True)
        assert found.entropy is not None or not asks_entropy
        zeros = torch.zeros(len(before))
        answers = [found.logprobs, zeros if found.entropy is None else found.entropy]
        torch.testing.assert_close(answers[0], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.raw, before, atol=1e-5, rtol=1e-5)
        if asks_entropy:
            torch.testing.assert_close(answers[1], expected[1], atol=1e-5, rtol=1e-5)
        shares = torch.randn(2, len(before))
        if not asks_entropy:
            shares[1] = 0.0
        wanted, got = (
            torch.autograd.grad((torch.stack(of) * shares).sum(), [*model.parameters()])
            for of in (expected, answers)
        )
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[PreTrainedConfig, bool]] = {
    "qwen2": (Qwen2Config(**SMALL, num_key_value_heads=1), True),
    "a bias": (PhiConfig(**SMALL), True),
    "a soft cap": (
        Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=16, final_logit_softcapping=30.0),
        False,
    ),
    "a factor": (CohereConfig(**SMALL, logit_scale=0.0625), False),
    "a divisor": (GraniteConfig(**SMALL, logits_scaling=8.0), False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_does_more_with_its_logits_is_asked_for_them(
    name: str, dtype: torch.dtype
) -> None:
    config, sliced = MODELS[name]
    torch.manual_seed(0)
    # A copy, as the type is noted in it.
    model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype).eval()
    batch = batch_of(48, 3, 9, np.random.default_rng(0))
    logits = model(batch.tokens).logits[:, :-1][batch.response].float()
    policy = Policy(model, 0.7)
    assert ("forward" in vars(model.get_output_embeddings())) is sliced
    found = policy(model, batch, entropy=True, raw=True)
    loose = 1e-5 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(
        found.logprobs, token_logprobs(logits / 0.7, batch.targets), atol=loose, rtol=0.0
    )
    torch.testing.assert_close(
        found.raw, token_logprobs(logits, batch.targets), atol=loose, rtol=0.0
    )
    torch.testing.assert_close(found.entropy, entropy(logits / 0.7), atol=loose, rtol=0.0)
    assert torch.equal(model(batch.tokens).logits[:, :-1][batch.response].float(), logits)


# -- memory ----------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.untyped_storage().nbytes() // 4)
        return made


WORDS, HIDDEN, KEPT = 4000, 8, 60


def long_rollouts() -> list[Rollout]:
    rng = np.random.default_rng(0)
    return [
        Rollout(
            problem=Problem("p", "p", "1"),
            prompt_ids=[3] * 20,
            token_ids=rng.integers(4, WORDS, KEPT).tolist(),
            logprobs=rng.normal(-7.0, 1.0, KEPT),
            max_logprobs=np.full(KEPT, -1.0),
            text="",
            end=EndReason.COMPLETED,
            kept=KEPT,
            reward=float(i % 2),
        )
        for i in range(8)
    ]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with many words, whose other tensors are small."""
    folder = tmp_path_factory.mktemp("wide")
    config = {
        **SMALL,
        "vocab_size": WORDS,
        "hidden_size": HIDDEN,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    }
    AutoModelForCausalLM.from_config(Qwen2Config(**config)).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    "ppo",
    [
        {"advantage": "group", "minibatches": 1},
        {"minibatches": 2, "epochs": 2, "entropy_bonus": 0.01, "kl_coefficient": 0.1},
    ],
)
def test_no_tensor_has_a_number_for_each_word_at_each_token(
    wide: Path, monkeypatch: pytest.MonkeyPatch, stage: int, ppo: dict[str, Any]
) -> None:
    monkeypatch.setitem(policies.SLICE, "cpu", 1 << 14)
    extra = {"zero_optimization": {**EXTRA["zero_optimization"], "reduce_bucket_size": 10_000}}
    ours = PpoTrainer(
        Recipe.model_validate(
            {
                "model": {"path": str(wide)},
                "ppo": ppo,
                "rollout": {"temperature": 0.8},
                "deepspeed": {"zero_stage": stage, "extra": extra if stage == 3 else {}},
            }
        )
    )
    with Largest() as largest:
        ours.update(long_rollouts())
    # A minibatch has 4 × 60 kept tokens at least; weights and their gradients are as they are.
    assert largest.numbers < 4 * KEPT * WORDS / 8
    assert largest.numbers >= WORDS * HIDDEN  # so the head was seen


# -- a single pass ---------------------------------------------------------------------------------


def passes(ours: PpoTrainer) -> Iterator[int]:
    """Forward passes of the actor: before and after what is done in between."""
    counted = Mock(return_value=None)
    ours.actor.module.register_forward_pre_hook(lambda *_: counted())
    while True:
        yield counted.call_count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ppo", "single"),
    [
        ({}, True),
        ({"advantage": "group"}, True),
        ({"kl_coefficient": 0.2, "importance_cap": 1.3, "aggregation": "sequence-mean"}, True),
        ({"kl_coefficient": 0.2, "kl_place": "reward"}, False),
        ({"minibatches": 2}, False),
        ({"epochs": 2}, False),
        ({"critic_only_steps": 1}, False),
    ],
)
def test_in_a_single_pass_the_actor_is_asked_once(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, ppo: dict[str, Any], single: bool
) -> None:
    """And what comes of it is what would come of asking it before as well."""
    settings = {"epochs": 1, "minibatches": 1, "micro_batch_tokens": 60, **ppo}
    ours, twice = trainer(paths, **settings), trainer(paths, **settings)
    counts = passes(ours)
    next(counts)
    found = ours.update(make_rollouts())
    asked = next(counts)
    monkeypatch.setattr(twice, "_in_one_pass", lambda parts: False)
    counts = passes(twice)
    next(counts)
    expected = twice.update(make_rollouts())
    assert (asked < next(counts)) is single
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True)
    assert_same_update(weights_of(ours), weights_of(twice))


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_a_group_without_an_advantage_is_not_passed_back(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, aggregation: str
) -> None:
    """And what comes of it is what would come of passing it back as well."""
    settings = {"advantage": "group", "epochs": 1, "minibatches": 1, "micro_batch_tokens": 20}
    settings |= {"aggregation": aggregation, "entropy_bonus": 0.0, "kl_coefficient": 0.0}
    ours, whole = trainer(paths, **settings), trainer(paths, **settings)
    rollouts = make_rollouts()  # in the first group rewards differ, in the second they do not
    trained: Counter[str] = Counter()

    def count(name: str, of: PpoTrainer) -> None:
        backward = of.actor.backward

        def counted(loss: Tensor) -> None:
            trained[name] += 1
            backward(loss)

        monkeypatch.setattr(of.actor, "backward", counted)

    count("ours", ours)
    count("whole", whole)
    found = ours.update(rollouts)
    monkeypatch.setattr(whole, "_idle", lambda samples: np.zeros(len(samples), dtype=bool))
    expected = whole.update(rollouts)
    assert 0 < trained["ours"] < trained["whole"]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True)
    assert_same_update(weights_of(ours), weights_of(whole))
