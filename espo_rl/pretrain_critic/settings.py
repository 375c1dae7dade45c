"""What a fit of a critic can be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Of a fit. right, wrong: what an answer is worth, as in the recipe of the run to come."""

    learning_rate: float = 3e-4
    epochs: int = 20
    patience: int = 3  # epochs without a lower validation loss before it ends
    batch: int = 64  # rollouts in an optimizer step
    micro_batch_tokens: int = 4096  # few, so that rows of like length are padded together
    right: float = 1.0
    wrong: float = -1.0
    seed: int = 0
