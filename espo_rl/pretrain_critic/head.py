"""A head on frozen states: V as one linear map of what the policy itself knows at a token.

Nothing is trained but the head, by least squares from sums over one forward pass: minutes where a
fit of all weights takes hours. That a policy's hidden states tell success, mostly by the problem's
difficulty, is known (arXiv 2505.24362, 2511.14773).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from espo_rl.ppo.critic import Critic
from espo_rl.ppo.samples import Sample
from espo_rl.pretrain_critic.fit import Partition, PretrainError, batches, samples_of
from espo_rl.pretrain_critic.settings import Settings

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


def fit_head(
    critic: Critic,
    parts: Partition,
    settings: Settings,
    *,
    on_rollouts: Callable[[int], None] = lambda count: None,
) -> float:
    """Fit the head in place; returns the mean loss on the validation part.

    Args:
        on_rollouts: told how many more have been read.
    """
    critic.eval()
    training, validation = (
        _Sums.over(critic, samples_of(part, settings), settings, on_rollouts)
        for part in (parts.training, parts.validation)
    )
    scales = np.diag(np.diag(training.states))
    heads = [
        np.linalg.solve(training.states + penalty * scales, training.products)
        for penalty in PENALTIES
    ]
    losses = [validation.loss(head) for head in heads]
    best = int(np.argmin(losses))
    weight = critic.classifier.score.weight
    with torch.no_grad():
        weight.copy_(torch.from_numpy(heads[best])[None].to(weight))
    return losses[best]


@dataclass(frozen=True)
class _Sums:
    """What least squares need of many states: Σ s sᵀ, Σ s R, Σ R², and their number."""

    states: NDArray[np.float64]  # [hidden, hidden]
    products: NDArray[np.float64]  # [hidden]
    squares: float
    count: int

    @classmethod
    @torch.no_grad()
    def over(
        cls,
        critic: Critic,
        samples: Sequence[Sample],
        settings: Settings,
        on_rollouts: Callable[[int], None],
    ) -> _Sums:
        """Over the states before each token of the samples."""
        hidden = critic.classifier.score.in_features
        states, products = np.zeros((hidden, hidden)), np.zeros(hidden)
        squares, count = 0.0, 0
        for batch in batches(critic, samples, settings):
            rows = critic.states(batch.tokens)[:, :-1][batch.response].cpu().double().numpy()
            returns = batch.columns["returns"].cpu().double().numpy()
            states += rows.T @ rows
            products += rows.T @ returns
            squares += float(returns @ returns)
            count += len(rows)
            on_rollouts(len(batch.indices))
        return cls(states, products, squares, count)

    def loss(self, head: NDArray[np.float64]) -> float:
        """Half the mean squared error, as the trainer's."""
        error = head @ self.states @ head - 2.0 * head @ self.products + self.squares
        return float(0.5 * error / self.count)
