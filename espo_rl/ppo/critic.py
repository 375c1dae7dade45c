"""The critic: V(s_t) for every prefix, from the tokens and, if asked, the stream's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from espo_gateway.stop.estimate import FEATURES, StreamStatistics
from espo_rl.gate.outcomes import recorded_of
from espo_rl.types import Rollout

Array = NDArray[np.float64]

#: The head on the statistics starts at 0 and has a dozen inputs of size 1: at the rate of a
#: pretrained model's weights it would never get anywhere.
STATISTICS_LEARNING_RATE = 1e-2


class Critic(nn.Module):
    """A sequence classifier with one label, read at each position.

    It is saved as the Hugging Face checkpoint `...ForSequenceClassification`, which vLLM's pooling
    runner serves.

    Args:
        statistics: add a linear head on the stream's statistics: V = score(h) + w·f.
    """

    def __init__(self, classifier: Any, *, statistics: bool = False) -> None:
        super().__init__()
        self.classifier = classifier
        self.statistics: nn.Linear | None = None
        if statistics:
            self.statistics = nn.Linear(len(FEATURES), 1, dtype=classifier.dtype)
            nn.init.zeros_(self.statistics.weight)
            nn.init.zeros_(self.statistics.bias)

    def forward(self, tokens: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Values of the state after each token, [batch, time].

        Args:
            tokens: [batch, time].
            statistics: at each of these states, scaled, [batch, time, features]. Without them V is
                what the tokens alone say.
        """
        body = getattr(self.classifier, self.classifier.base_model_prefix)
        hidden = body(input_ids=tokens, use_cache=False).last_hidden_state
        values = self.classifier.score(hidden).squeeze(-1).float()
        if self.statistics is not None and statistics is not None:
            inputs = statistics.to(self.statistics.weight.dtype)
            values = values + self.statistics(inputs).squeeze(-1).float()
        return values

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The optimizer's: the head on the statistics learns at a rate of its own."""
        groups = [{"params": list(self.classifier.parameters()), "lr": learning_rate}]
        if self.statistics is not None:
            head = list(self.statistics.parameters())
            groups.append({"params": head, "lr": STATISTICS_LEARNING_RATE})
        return groups


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


@dataclass
class Scaler:
    """Running mean and variance of the statistics, over all tokens seen so far."""

    count: float = 0.0
    mean: Array = field(default_factory=lambda: np.zeros(len(FEATURES)))
    variance: Array = field(default_factory=lambda: np.zeros(len(FEATURES)))

    def update(self, rows: Array) -> None:
        """Take more states, [states, features] (Chan et al. 1979, pairwise update)."""
        total = self.count + len(rows)
        difference = rows.mean(0) - self.mean
        share = len(rows) / total
        self.variance = (
            (1.0 - share) * self.variance
            + share * rows.var(0)
            + share * (1.0 - share) * difference**2
        )
        self.mean = self.mean + share * difference
        self.count = total

    def scaled(self, rows: Array) -> NDArray[np.float32]:
        """To mean 0 and deviation 1; bounded, as one that hardly moved so far may jump."""
        scaled = (rows - self.mean) / np.sqrt(self.variance + 1e-6)
        return scaled.clip(-5.0, 5.0).astype(np.float32)


def state_statistics(rollouts: Sequence[Rollout]) -> list[Array]:
    """The stream's statistics at each state: before the first token and after each kept one.

    Returns:
        for each rollout [kept + 1, features]; row t is what is known when token t is sampled.
    """
    after = recorded_of(rollouts).features
    return [
        np.vstack([StreamStatistics(len(rollout.prompt_ids)).features(), rows[: rollout.kept]])
        for rollout, rows in zip(rollouts, after, strict=True)
    ]


def save_statistics_head(folder: Path, head: dict[str, Tensor], scaler: Scaler) -> None:
    """Write what the Hugging Face checkpoint in the folder does not hold."""
    tensors = {name: tensor.float().numpy() for name, tensor in head.items()}
    scale = {"count": np.array(scaler.count), "mean": scaler.mean, "variance": scaler.variance}
    save_file(tensors | scale, folder / "statistics_head.safetensors")


def load_statistics_head(folder: str | Path, critic: Critic, scaler: Scaler) -> None:
    """Read what `save_statistics_head` wrote, if it is there: else the head starts at 0."""
    path = Path(folder) / "statistics_head.safetensors"
    if critic.statistics is None or not path.is_file():
        return
    tensors = load_file(path)
    scaler.count = float(tensors.pop("count"))
    scaler.mean, scaler.variance = tensors.pop("mean"), tensors.pop("variance")
    critic.statistics.load_state_dict(
        {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    )
