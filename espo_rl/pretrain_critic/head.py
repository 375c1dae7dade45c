"""A head on frozen states: V as one linear map of what the policy itself knows at a token.

Nothing is trained but the head, by least squares from sums over one forward pass: minutes where a
fit of all weights takes hours. To leave some out is to subtract their sums, so every rollout can be
judged by a head that has not seen its problem. That a policy's hidden states tell success, mostly
by the problem's difficulty, is known (arXiv 2505.24362, 2511.14773).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from espo_rl.ppo.critic import Critic
from espo_rl.pretrain_critic.fit import Array, PretrainError, batches, samples_of
from espo_rl.pretrain_critic.settings import Settings
from espo_rl.types import Rollout

#: Strengths of the ridge penalty that are tried, in variances of the states.
PENALTIES = 10.0 ** np.arange(-6.0, 2.0)


def keep_layers(critic: Critic, layers: int) -> None:
    """Leave the trunk its first layers: in the middle of a policy the states tell as much, and the
    critic costs less.

    Raises:
        PretrainError: the model has fewer, or is not made of `layers`.
    """
    config = critic.classifier.config
    body = getattr(critic.classifier, critic.classifier.base_model_prefix)
    found = getattr(body, "layers", None)
    if not isinstance(found, nn.ModuleList) or layers > len(found):
        there = len(found) if isinstance(found, nn.ModuleList) else "no list of"
        raise PretrainError(f"--layers {layers}: the model has {there} layers")
    body.layers = nn.ModuleList(list(found)[:layers])
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


@torch.no_grad()
def fit_head(
    critic: Critic,
    rollouts: Sequence[Rollout],
    folds: NDArray[np.intp],
    settings: Settings,
    *,
    scratch: Path | None = None,
    on_rollouts: Callable[[int], None] = lambda count: None,
) -> list[Array]:
    """Fit the head to all rollouts in place, and judge each by one that has not seen its fold.

    Args:
        folds: of each rollout, [rollouts]; those of a problem are in one.
        scratch: the folder that has room for the states, which are kept until they are judged:
            hidden size times the size of a number, for each token.
        on_rollouts: told how many more have been read.

    Returns:
        V of every state, before the first token and after each one: of each rollout [tokens + 1].

    Raises:
        OSError: there is no room.
    """
    critic.eval()
    samples = samples_of(rollouts, settings)
    sums = [_Sums.none(critic.classifier.score.in_features) for _ in range(folds.max() + 1)]
    with TemporaryFile(dir=scratch) as store:
        order: list[int] = []
        for batch in batches(critic, samples, settings):
            states = critic.states(batch.tokens).cpu()
            for row, index in zip(states, batch.indices, strict=True):
                sample = samples[index]
                seen = row[sample.prompt - 1 : len(sample.tokens)].contiguous()
                sums[folds[index]].add(seen[:-1], float(sample.columns["returns"][0]))
                store.write(seen.view(torch.uint8).numpy())
                order.append(index)
            on_rollouts(len(batch.indices))
        heads, head = _heads(sums)
        weight = critic.classifier.score.weight
        weight.copy_(torch.from_numpy(head)[None].to(weight))
        values: dict[int, Array] = {}
        store.seek(0)
        for index in order:
            states = _read(store, samples[index].kept + 1, weight.shape[1], states.dtype)
            values[index] = states.double().numpy() @ heads[folds[index]]
    return [values[index] for index in range(len(samples))]


def _read(store: IO[bytes], count: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """The next states of a file, [count, hidden]."""
    data = bytearray(store.read(count * hidden * dtype.itemsize))
    return torch.frombuffer(data, dtype=dtype).view(count, hidden)


def _heads(sums: Sequence[_Sums]) -> tuple[list[Array], Array]:
    """Without each fold, and of all, under the penalty that tells most of the folds left out."""
    every = reduce(_Sums.plus, sums)
    without = [every.plus(one, -1.0) for one in sums]
    found = [[rest.head(penalty) for rest in without] for penalty in PENALTIES]
    losses = [sum(map(_Sums.loss, sums, heads)) for heads in found]
    best = int(np.argmin(losses))
    return found[best], every.head(PENALTIES[best])


@dataclass
class _Sums:
    """What least squares need of many states: Σ s sᵀ, Σ s R, and Σ R²."""

    states: Array  # [hidden, hidden]
    products: Array  # [hidden]
    squares: float

    @classmethod
    def none(cls, hidden: int) -> _Sums:
        return cls(np.zeros((hidden, hidden)), np.zeros(hidden), 0.0)

    def add(self, states: Tensor, worth: float) -> None:
        """States, [count, hidden], of a rollout that is worth this."""
        rows = states.double().numpy()
        self.states += rows.T @ rows
        self.products += rows.sum(axis=0) * worth
        self.squares += len(rows) * worth**2

    def plus(self, other: _Sums, sign: float = 1.0) -> _Sums:
        return _Sums(
            self.states + sign * other.states,
            self.products + sign * other.products,
            self.squares + sign * other.squares,
        )

    def head(self, penalty: float) -> Array:
        """By least squares with a ridge, [hidden]."""
        scales = np.diag(np.diag(self.states))
        head = np.linalg.solve(self.states + penalty * scales, self.products)
        return np.asarray(head, np.float64)

    def loss(self, head: Array) -> float:
        """The sum of the squared errors."""
        return float(head @ self.states @ head - 2.0 * head @ self.products + self.squares)
