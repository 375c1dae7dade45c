"""A tiny base model for the arithmetic task, trained from scratch in about two minutes.

    python -m espo_rl.base_model --out runs/base

The demonstrations carry slips: each step's result is wrong with probability `error`. The model
learns to *sample* errors that it does not *believe* (greedy decoding is right, sampling often is
not). That is the kind of base in which an error shows in the logprobs, and so the kind that shows
what early stopping does; a base that believes its errors hides it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from espo_rl.tasks import Arithmetic

SPECIAL_TOKENS = ("<pad>", "<eos>", "<user>", "<assistant>")
ALPHABET = "0123456789+-=;#"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(*, tied: bool = True, hidden: int = 128, layers: int = 4) -> Qwen2ForCausalLM:
    """A random Qwen2 that vLLM's CPU build can serve (head size 32)."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(SPECIAL_TOKENS) + len(ALPHABET),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            rope_theta=10_000.0,
            bos_token_id=None,
            eos_token_id=SPECIAL_TOKENS.index("<eos>"),
            pad_token_id=SPECIAL_TOKENS.index("<pad>"),
            dtype="float32",
        )
    )


def save_checkpoint(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a Hugging Face checkpoint that vLLM and transformers load by its folder."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
