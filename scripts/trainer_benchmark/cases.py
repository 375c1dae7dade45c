"""What is measured: models, batches, and how each side is set up to do the same work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

#: rollouts of one prompt
GROUP = 8
LEARNING_RATE = 1e-6

#: a prompt is as long for both sides: a token a byte with the models made here
PROMPT = "What is {} plus 7?"


@dataclass(frozen=True)
class Shape:
    """A model, and the batch that it is measured with.

    rows: of one forward and backward pass, on both sides.
    """

    dtype: Literal["float32", "bfloat16"]
    rollouts: int
    tokens: int  # sampled of each rollout, to the last
    rows: int
    words: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int


SHAPES = {
    "tiny": Shape("float32", 128, 80, 128, 260, 128, 384, 3, 4, 2),
    # SmolLM2-135M's
    "135m": Shape("bfloat16", 64, 94, 8, 49152, 576, 1536, 30, 9, 3),
    # Of the tests
    "quick": Shape("float32", 16, 6, 8, 260, 32, 64, 1, 2, 1),
}

#: one forward and one backward pass and one optimizer step over the batch, as TRL does
SINGLE = {"epochs": 1, "minibatches": 1}


@dataclass(frozen=True)
class Case:
    """ppo: this project's settings. lora: the rank of both sides' adapters, if there are any."""

    shape: str
    ppo: dict[str, Any]
    what: str
    lora: int | None = None


CASES = {
    "tiny-group": Case("tiny", {"advantage": "group", **SINGLE}, "like for like"),
    "tiny-default": Case("tiny", {"advantage": "group"}, "two minibatches"),
    "tiny-ppo": Case("tiny", SINGLE, "with a critic, which TRL has not"),
    "135m-group": Case("135m", {"advantage": "group", **SINGLE}, "like for like"),
    "135m-default": Case("135m", {"advantage": "group"}, "two minibatches"),
    "135m-ppo": Case("135m", SINGLE, "with a critic, which TRL has not"),
    "135m-lora": Case("135m", {"advantage": "group", **SINGLE}, "adapters of rank 16", 16),
    "quick-group": Case("quick", {"advantage": "group", **SINGLE}, "of the tests"),
    "quick-lora": Case("quick", SINGLE, "of the tests, with a critic and adapters", 2),
}


def make_checkpoint(shape: Shape, folder: Path) -> Path:
    """A random model of the shape, which reads bytes; its further words are noise."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = [*alphabet, *(f"w{i}" for i in range(len(alphabet), shape.words))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, shape.dtype)).save_pretrained(folder)
    return folder
