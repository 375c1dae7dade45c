"""Tiny checkpoints and what Hugging Face computes with them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from espo_rl.base_model.train import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    make_model,
    make_tokenizer,
    save_checkpoint,
)

#: ids that no special token has, long enough to fill several blocks of vLLM's KV cache
PROBE = [(7 * position) % 15 + 4 for position in range(70)]


def random_model(seed: int, *, tied: bool = True) -> PreTrainedModel:
    """A random policy; another seed gives another policy of the same shape."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_model(tied=tied, layers=2)
        with torch.no_grad():
            for parameter in model.parameters():
                # As initialised all policies are nearly uniform; these differ by whole nats.
                parameter.mul_(3.0)
    return model.eval()


def random_checkpoint(folder: Path, seed: int, *, tied: bool = True) -> Path:
    save_checkpoint(random_model(seed, tied=tied), make_tokenizer(), folder)
    return folder


@torch.no_grad()
def logprobs(model: PreTrainedModel, token_ids: list[int]) -> list[float]:
    """log π(token | tokens before it), shape [tokens - 1]."""
    rows = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
    return rows.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()


def text_checkpoint(folder: Path, seed: int, *, hidden: int = 128, layers: int = 2) -> Path:
    """A random policy that reads and writes any text, a token a byte, up to 4096 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    config = make_model(hidden=hidden, layers=layers).config
    config.update({"vocab_size": len(alphabet), "max_position_embeddings": 4096})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    save_checkpoint(model, fast, folder)
    return folder


def random_critic(seed: int) -> Qwen2ForSequenceClassification:
    """A random critic: one label, whose values differ by whole units from prefix to prefix."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = make_model(layers=2).config
        config.num_labels = 1
        model = Qwen2ForSequenceClassification(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0)
    return model.eval()


@torch.no_grad()
def values(critic: PreTrainedModel, token_ids: list[int]) -> list[float]:
    """V after each token, shape [tokens]."""
    hidden = critic.model(torch.tensor([token_ids])).last_hidden_state
    return critic.score(hidden)[0, :, 0].tolist()


def headed(policy: PreTrainedModel, layers: int = 1) -> Qwen2ForSequenceClassification:
    """A random head on a policy's first layers, as `pretrain_critic --head-only` leaves it."""
    critic = random_critic(0)
    critic.model.load_state_dict(policy.model.state_dict())
    critic.model.layers = nn.ModuleList(list(critic.model.layers)[:layers])
    critic.config.num_hidden_layers = layers
    critic.config.layer_types = critic.config.layer_types[:layers]
    return critic
