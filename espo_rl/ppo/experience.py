"""What a PPO step learns from: samples with all that the losses need, and how they look.

Pure: the models' answers come in as `ModelOutputs`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from espo_rl.config import Ppo
from espo_rl.ppo.advantages import Trajectory, estimate, noise_variance
from espo_rl.ppo.losses import importance_weights, kl_estimate
from espo_rl.ppo.samples import Sample

Metrics = dict[str, float]

NOTHING = torch.empty(0)


@dataclass
class ModelOutputs:
    """What the models say of a sample before the update; arrays are [kept].

    The actor's are empty where it is asked in the update alone.
    """

    logprobs: Tensor = NOTHING  # at the sampling temperature
    reported: Tensor = NOTHING  # as the server reports them: raw, or at the sampling temperature
    entropy: Tensor = NOTHING
    reference: Tensor | None = None  # log π of the reference model at the sampling temperature
    values: Tensor | None = None  # V before each token


def compare(
    samples: Sequence[Sample], before: Sequence[ModelOutputs], ppo: Ppo
) -> tuple[dict[str, Tensor], Metrics]:
    """The actor against server and reference: columns of the losses, all tokens in a row, and the
    metrics."""
    old = torch.cat([one.logprobs for one in before])
    served = torch.cat([sample.columns["served_logprobs"] for sample in samples])
    metrics = {"entropy": float(torch.cat([one.entropy for one in before]).mean())}
    # Of older weights the trainer knows nothing that it could compare.
    newest = torch.cat(
        [torch.ones(s.kept, dtype=torch.bool) if s.newest is None else s.newest for s in samples]
    )
    metrics |= mismatch(served[newest], torch.cat([one.reported for one in before])[newest])
    columns = {"old_logprobs": old}
    if before[0].reference is not None:
        kl = kl_estimate(old, _joined([one.reference for one in before]), ppo.kl_estimator)
        metrics["kl_reference"] = float(kl.mean())
        if ppo.kl_in_reward:
            columns["penalties"] = ppo.kl_coefficient * kl
    if ppo.importance_cap is not None:
        columns["importance"], capped = importance_weights(old, served, ppo.importance_cap)
        metrics["importance_mean"] = float(columns["importance"].mean())
        metrics["importance_capped"] = float(capped.mean())
    return columns, metrics


def prepare(samples: Sequence[Sample], before: Sequence[ModelOutputs], ppo: Ppo) -> Metrics:
    """Give each sample the columns of the losses; returns the metrics known before the update.

    Where the actor has not been asked, all but what follows from that.
    """
    kept = [sample.kept for sample in samples]
    columns: dict[str, Tensor]
    metrics: Metrics
    columns, metrics = compare(samples, before, ppo) if len(before[0].logprobs) else ({}, {})
    penalties = columns.pop("penalties", torch.zeros(sum(kept)))
    if before[0].reference is not None:
        columns["reference_logprobs"] = _joined([one.reference for one in before])

    valued = [
        sample.columns.get("baseline", one.values)
        for sample, one in zip(samples, before, strict=True)
    ]
    values = [None if each is None else each.numpy() for each in valued]
    trajectories = [
        Trajectory(sample.group, sample.reward, penalty.numpy(), value)
        for sample, penalty, value in zip(samples, penalties.split(kept), values, strict=True)
    ]
    advantages, returns = estimate(trajectories, ppo)
    columns["advantages"] = torch.from_numpy(np.concatenate(advantages))
    if returns is not None and before[0].values is not None:
        targets = columns["returns"] = torch.from_numpy(np.concatenate(returns))
        old_values = columns["old_values"] = torch.cat(
            [one.values for one in before if one.values is not None]
        )
        total, noise = float(targets.var()), noise_variance(targets.double().numpy())
        metrics["critic_explained_variance"] = (
            1.0 - float((targets - old_values).var()) / total if total > noise else math.nan
        )

    for name, column in columns.items():
        for sample, part in zip(samples, column.split(kept), strict=True):
            sample.columns[name] = part
    return metrics


def _joined(parts: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])


def mismatch(served: Tensor, ours: Tensor) -> Metrics:
    """How far the server's logprobs of sampled tokens are from the trainer's; NaN: none served."""
    difference = (served - ours).double()
    difference = difference[difference.isfinite()]
    if not len(difference):
        return dict.fromkeys(("mismatch_kl", "mismatch_k3", "mismatch_max"), math.nan)
    return {
        "mismatch_kl": float(difference.mean()),
        "mismatch_k3": float(kl_estimate(difference, torch.zeros(()), "k3").mean()),
        "mismatch_max": float(difference.abs().max()),
    }


def unusable(columns: Mapping[str, Tensor]) -> Counter[str]:
    """How many numbers of each column are not finite; what servers left out is meant to be."""
    counts = {
        name: int((~column.isfinite()).sum())
        for name, column in columns.items()
        if name != "served_logprobs"
    }
    return Counter({name: count for name, count in counts.items() if count})
