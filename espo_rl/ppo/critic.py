"""The critic: V(s_t) for every prefix of prompt and response."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from espo_rl.ppo.packed import takes_packed


class Critic(nn.Module):
    """A sequence classifier with one label, read at each position.

    It is saved as the Hugging Face checkpoint `...ForSequenceClassification`, which vLLM's pooling
    runner serves.
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier
        self.packs = takes_packed(self._body)

    @property
    def _body(self) -> Any:
        return getattr(self.classifier, self.classifier.base_model_prefix)

    def forward(self, input_ids: Tensor, **layout: Tensor) -> Tensor:
        """Values of the state after each token, [batch, time] -> [batch, time].

        layout: of packed tokens, see `MicroBatch.view`.
        """
        states = self.states(input_ids, **layout).to(self.classifier.score.weight.dtype)
        return self.classifier.score(states).squeeze(-1).float()

    def states(self, input_ids: Tensor, **layout: Tensor) -> Tensor:
        """What the head reads, [batch, time] -> [batch, time, hidden]."""
        hidden: Tensor = self._body(
            input_ids=input_ids, use_cache=False, **layout
        ).last_hidden_state
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
