"""Fits a critic to the outcomes of recorded rollouts, as the trainer would: the same class, states
and loss, but many epochs on full rollouts and no policy in the way.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from espo_rl.ppo.critic import Critic
from espo_rl.ppo.losses import value_loss
from espo_rl.ppo.samples import MicroBatch, Sample, micro_batches
from espo_rl.pretrain_critic.settings import Settings
from espo_rl.types import EndReason, Rollout

Array = NDArray[np.float64]


class PretrainError(ValueError):
    """These rollouts cannot be learned from; the message says how to record ones that can."""


@dataclass(frozen=True)
class Partition:
    """Rollouts parted by problem: fitted on, when to stop, and what is measured on.

    Of a head alone the first and the last are all of them, see `deal`.
    """

    training: list[Rollout]
    validation: list[Rollout]
    held_out: list[Rollout]


def usable(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Those with tokens, in full; an audited one counts as if it had not been stopped.

    Raises:
        PretrainError: the outcome of some is unknown, so the others are no fair sample.
    """
    full = [
        replace(rollout, kept=len(rollout.token_ids))
        for rollout in rollouts
        if rollout.end is not EndReason.ERROR and rollout.token_ids
    ]
    unknown = sum(rollout.correct is None for rollout in full)
    if unknown:
        raise PretrainError(
            f"{unknown} of {len(full)} rollouts were stopped and nobody knows their outcome, so "
            "the others are no fair sample: record with stopping.rule=none"
        )
    return full


def split(rollouts: Sequence[Rollout], share: float) -> Partition:
    """Hold out about this share of the problems, and an eighth of the rest for early stopping.

    Raises:
        PretrainError: a part is empty, or all outcomes in it are the same.
    """
    parts = Partition([], [], [])
    for rollout in rollouts:
        drawn = _draw(rollout)
        if drawn < share:
            parts.held_out.append(rollout)
        elif drawn < share + (1.0 - share) / 8.0:
            parts.validation.append(rollout)
        else:
            parts.training.append(rollout)
    for name, part in vars(parts).items():
        if len({rollout.correct for rollout in part}) < 2:
            raise PretrainError(
                f"the {name.replace('_', '-')} part has {len(part)} rollouts, not both right and "
                "wrong ones: record more of them, of more problems"
            )
    return parts


def deal(rollouts: Sequence[Rollout], share: float) -> NDArray[np.intp]:
    """The fold of each rollout, [rollouts]: each fold has about this share of the problems.

    Raises:
        PretrainError: all outcomes outside of a fold are the same.
    """
    folds = max(2, round(1.0 / share))
    fold = np.array([int(_draw(rollout) * folds) for rollout in rollouts], np.intp)
    right = np.array([bool(rollout.correct) for rollout in rollouts])
    if any(np.unique(fold[right == outcome]).size < 2 for outcome in (True, False)):
        raise PretrainError(
            f"{right.sum()} of {len(rollouts)} rollouts are right; both right and wrong ones must "
            "be in two folds of the problems: record more of them, of more problems"
        )
    return fold


def _draw(rollout: Rollout) -> float:
    """In [0, 1), by the problem's text: it falls on the same side in every recording."""
    digest = hashlib.sha256(rollout.problem.prompt.encode()).digest()
    return int.from_bytes(digest[:7]) / 2.0**56


def fit_critic(
    critic: Critic,
    parts: Partition,
    settings: Settings,
    *,
    on_epoch: Callable[[float, float], None] = lambda training, validation: None,
) -> int:
    """Fit the critic in place; returns the epochs that helped.

    Args:
        on_epoch: called after each epoch with the mean losses.

    Raises:
        PretrainError: the loss is not finite before any epoch has helped.
    """
    critic.eval()  # as in the trainer: no dropout
    rng = np.random.default_rng(settings.seed)
    training, validation = (
        samples_of(part, settings) for part in (parts.training, parts.validation)
    )
    optimizer = torch.optim.AdamW(critic.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    best, loss_then, helped = _state(critic), _mean_loss(critic, validation, settings), 0
    for epoch in range(1, settings.epochs + 1):
        parts_of_epoch = max(1, len(training) // settings.batch)
        sums = np.zeros(2)  # loss, tokens
        for chosen in np.array_split(rng.permutation(len(training)), parts_of_epoch):
            rows = [training[i] for i in chosen]
            tokens = sum(sample.kept for sample in rows)
            for batch in batches(critic, rows, settings):
                loss = _losses(critic, batch).sum()
                (loss / tokens).backward()
                sums += float(loss.detach()), 0
            sums[1] += tokens
            nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        loss_now = _mean_loss(critic, validation, settings)
        if not np.isfinite(sums[0] + loss_now):
            if helped:
                break
            raise PretrainError(
                f"the loss is not finite in epoch {epoch}: lower --learning-rate, or the rewards"
            )
        on_epoch(float(sums[0] / sums[1]), loss_now)
        if loss_now < loss_then:
            best, loss_then, helped = _state(critic), loss_now, epoch
        elif epoch - helped >= settings.patience:
            break
    critic.load_state_dict(best)
    return helped


@torch.no_grad()
def values_of(critic: Critic, rollouts: Sequence[Rollout], settings: Settings) -> list[Array]:
    """V of every state, before the first token and after each one: of each rollout [tokens + 1]."""
    critic.eval()
    samples = [Sample.of(rollout) for rollout in rollouts]
    values: dict[int, Array] = {}
    for batch in batches(critic, samples, settings):
        answers = critic(batch.tokens).cpu().double().numpy()
        for row, index in enumerate(batch.indices):
            sample = samples[index]
            values[index] = answers[row, sample.prompt - 1 : len(sample.tokens)].copy()
    return [values[index] for index in range(len(samples))]


def samples_of(rollouts: Sequence[Rollout], settings: Settings) -> list[Sample]:
    """With the column `returns`: what each answer is worth, at every token."""
    samples = [Sample.of(rollout) for rollout in rollouts]
    for sample, rollout in zip(samples, rollouts, strict=True):
        worth = settings.right if rollout.correct else settings.wrong
        sample.columns = {"returns": torch.full((sample.kept,), worth)}
    return samples


def batches(critic: Critic, samples: Sequence[Sample], settings: Settings) -> Iterator[MicroBatch]:
    """The samples for the critic's passes, where it is."""
    device = next(critic.parameters()).device
    return micro_batches(samples, settings.micro_batch_tokens, rank=0, ranks=1, device=device)


def _losses(critic: Critic, batch: MicroBatch) -> Tensor:
    values = critic(batch.tokens)[:, :-1][batch.response]
    return value_loss(values, values, batch.columns["returns"], None)


@torch.no_grad()
def _mean_loss(critic: Critic, samples: Sequence[Sample], settings: Settings) -> float:
    total = sum(float(_losses(critic, batch).sum()) for batch in batches(critic, samples, settings))
    return total / sum(sample.kept for sample in samples)


def _state(critic: Critic) -> dict[str, Tensor]:
    return copy.deepcopy(critic.state_dict())
