"""The critic: V(s_t) for every prefix of prompt and response."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Critic(nn.Module):
    """A sequence classifier with one label, read at each position.

    It is saved as the Hugging Face checkpoint `...ForSequenceClassification`, which vLLM's pooling
    runner serves.
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, tokens: Tensor) -> Tensor:
        """Values of the state after each token, [batch, time] -> [batch, time]."""
        return self.classifier.score(self.states(tokens)).squeeze(-1).float()

    def states(self, tokens: Tensor) -> Tensor:
        """What the head reads, [batch, time] -> [batch, time, hidden]."""
        body = getattr(self.classifier, self.classifier.base_model_prefix)
        hidden: Tensor = body(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden


def load_classifier(path: str, *, fresh: bool, dtype: torch.dtype) -> Any:
    """A Hugging Face `...ForSequenceClassification` with one label; fresh: its V is 0 everywhere.

    Raises:
        OSError, ValueError: it cannot be loaded; the message is transformers' own.
    """
    from transformers import AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype)
    if fresh:
        nn.init.zeros_(classifier.score.weight)  # else V would start at noise
    return classifier
