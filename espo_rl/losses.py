"""PPO's losses, per token. Pure torch; the mean over a minibatch is the trainer's business."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log π of `tokens` [batch, time] under `logits` [batch, time, vocabulary]: [batch, time]."""
    picked = logits.gather(-1, tokens[..., None]).squeeze(-1).float()
    return picked - logits.float().logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the next-token distribution, [..., vocabulary] -> [...]."""
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


@dataclass(frozen=True)
class PolicyLoss:
    """Per-token results, each [batch, time]."""

    loss: Tensor
    clipped: Tensor
    kl: Tensor


def policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> PolicyLoss:
    """The clipped surrogate (arXiv 1707.06347, eq. 7), with separate bounds below and above 1.

    Args:
        logprobs, old: log π_θ and log π_old of the sampled tokens at the sampling temperature.
        advantages: of the same shape, [batch, time].

    Returns:
        the loss, whether the clip was active, and the k3 estimate of KL(old || new).
    """
    log_ratio = logprobs - old
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    clipped = (bounded * advantages < ratio * advantages).float()
    return PolicyLoss(loss, clipped, ratio - 1.0 - log_ratio)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Half the squared error; with `clip`, the worse of it and that of V kept within old ± clip."""
    error = (values - returns).square()
    if clip is not None:
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - returns).square())
    return 0.5 * error
