"""PPO's losses, per token, and how they add up to one number. Pure torch.

All tensors are flat: one entry for each kept token of a batch, [tokens], so that prompts and
padding never take part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from espo_rl.config import Ppo

#: Log-ratios are kept within ± this, as verl does: their exponentials stay finite in float32. Out
#: there a token has no gradient.
LOG_RATIO = 20.0


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log π of `tokens` [...] under `logits` [..., vocabulary]: [...]."""
    picked = logits.gather(-1, tokens[..., None]).squeeze(-1).float()
    return picked - logits.float().logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the next-token distribution, [..., vocabulary] -> [...]."""
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


@dataclass(frozen=True)
class Statistics:
    """What is known of a policy at the sampled tokens, each [tokens].

    raw: log π before the temperature.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    raw: Tensor | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """Per-token results, each [tokens]."""

    loss: Tensor
    clipped: Tensor
    kl: Tensor


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """The clipped surrogate (arXiv 1707.06347, eq. 7), with separate bounds below and above 1.

    Args:
        logprobs, old: log π_θ and log π_old of the sampled tokens at the sampling temperature.
        advantages: of the same shape, [tokens].
        dual_clip: above 1; the ratio's bound where the advantage is negative, which has none
            otherwise (arXiv 1912.09729, eq. 5).

    Returns:
        the loss, whether the clip was active, and the k3 estimate of KL(old || new).
    """
    log_ratio = _bounded(logprobs - old)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.minimum(ratio * advantages, bounded * advantages)
    if dual_clip is not None:
        surrogate = torch.where(
            advantages < 0.0, surrogate.maximum(dual_clip * advantages), surrogate
        )
    clipped = (surrogate != ratio * advantages).float()
    return PolicyLoss(-surrogate, clipped, ratio - 1.0 - log_ratio)


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO, LOG_RATIO)


def kl_estimate(sampled: Tensor, other: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(sampled || other) from tokens drawn from the first: [tokens].

    k1, k2 and k3 of http://joschu.net/blog/kl-approx.html: k1 is unbiased and may be negative, k2
    has low variance, k3 is both unbiased and never negative. As a loss, k1's gradient is 0 on
    average and k2's is the KL's own, on tokens of the current policy.
    """
    difference = sampled - other
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    difference = _bounded(difference)
    return (-difference).exp() - 1.0 + difference


def actor_loss(
    policy: Statistics, columns: Mapping[str, Tensor], ppo: Ppo
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the actor minimises, per token, and what to report.

    Args:
        policy: at the sampling temperature; its entropy only where there is a bonus.
        columns: each [tokens]: `old_logprobs`, `advantages`; `importance`, the weights against the
            server's policy, where there are any; `reference_logprobs`, where a KL is in the loss.

    Returns:
        the loss [tokens], and the metrics' per-token values, each [tokens].
    """
    logprobs = policy.logprobs
    surrogate = policy_loss(
        logprobs,
        columns["old_logprobs"],
        columns["advantages"],
        ppo.clip_low,
        ppo.clip_high,
        ppo.dual_clip,
    )
    clipped = surrogate.loss * columns.get("importance", 1.0)
    loss = clipped
    if ppo.entropy_bonus:
        assert policy.entropy is not None
        loss = loss - ppo.entropy_bonus * policy.entropy
    if ppo.kl_coefficient and ppo.kl_place == "loss":
        kl = kl_estimate(logprobs, columns["reference_logprobs"], ppo.kl_estimator)
        loss = loss + ppo.kl_coefficient * kl
    return loss, {"policy_loss": clipped, "clip_share": surrogate.clipped, "kl": surrogate.kl}


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Half the squared error; with `clip`, the worse of it and that of V kept within old ± clip."""
    error = (values - returns).square()
    if clip is not None:
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - returns).square())
    return 0.5 * error


def importance_weights(ours: Tensor, served: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Truncated importance weights min(π_trainer/π_server, cap) of sampled tokens.

    Corrects for the server computing a slightly other policy than the trainer does. Where the
    server gave no number (NaN), the weight is 1.

    Args:
        ours, served: log π of the sampled tokens, [tokens].

    Returns:
        the weights, and which of them the cap cut, both [tokens].
    """
    ratio = _bounded(ours - served).exp().nan_to_num(nan=1.0)
    return ratio.clamp(max=cap), (ratio > cap).float()


def aggregation_weights(
    kept: list[int], aggregation: Literal["token-mean", "sequence-mean"]
) -> list[float]:
    """By what a token of each rollout is weighted so that a minibatch's loss is the weighted sum.

    Args:
        kept: tokens of each rollout in the minibatch.
        aggregation: "token-mean" over all tokens alike; "sequence-mean" over each rollout's tokens,
            then over rollouts, so that a token of a long one counts for less.
    """
    if aggregation == "token-mean":
        return [1.0 / sum(kept)] * len(kept)
    return [1.0 / (tokens * len(kept)) for tokens in kept]
