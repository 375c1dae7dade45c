"""The training loop's side of early stopping.

Owns the batch statistics, β, the success estimator and the warm-up; makes the gate of each batch
and learns from the batch's rollouts.

Nothing here changes while a batch is generated, so no decision sees the future.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Sequence

import numpy as np

from espo_gateway.monitor import (
    MonitorConfig,
    RegretStatistics,
    ThresholdController,
    smoothed_regret,
)
from espo_gateway.rules import Gate
from espo_gateway.values import SuccessEstimator, probabilities
from espo_rl import estimator
from espo_rl.config import Stopping
from espo_rl.types import EndReason, Rollout


class WarmUp:
    """Decides when stopping starts. `reason` says why it is on, or why not yet."""

    def __init__(self, config: Stopping, total_steps: int) -> None:
        self._config = config
        self._total_steps = total_steps
        self.batches = 0
        self.critic_losses: list[float] = []
        self.done = False
        self.reason = "warm-up: no batch yet"

    def update(self, critic_loss: float | None) -> None:
        """Take note of a finished batch and the critic's loss in its update."""
        config = self._config
        self.batches += 1
        if critic_loss is not None:
            self.critic_losses = [*self.critic_losses[-2:], critic_loss]
        if self.done:
            return
        losses = self.critic_losses
        if config.warmup == "batches":
            self.done = self.batches >= config.warmup_batches
            self.reason = f"{self.batches} of {config.warmup_batches} warm-up batches seen"
        elif len(losses) == 3 and max(losses) < config.warmup_loss:
            self.done, self.reason = True, f"critic loss below {config.warmup_loss} three times"
        elif len(losses) >= 2 and abs(losses[-1] - losses[-2]) < config.warmup_change:
            self.done, self.reason = True, f"critic loss moved less than {config.warmup_change}"
        elif self.batches >= config.warmup_share * self._total_steps:
            self.done, self.reason = True, f"forced on after {self.batches} steps"
        else:
            self.reason = f"warm-up: critic loss {critic_loss}"


class StopController:
    """Makes the gate for each batch and updates itself between batches."""

    def __init__(self, config: Stopping, total_steps: int, rng: random.Random) -> None:
        self.config = config
        self.statistics = RegretStatistics(decay=config.decay)
        self.beta = config.beta
        self.estimator: SuccessEstimator | None = None
        self.warmup = WarmUp(config, total_steps)
        self.version = 0
        self.explained_variance: float | None = None
        self._monitor = MonitorConfig(smoothing=config.smoothing, clip=config.clip)
        self._threshold = ThresholdController(
            target=config.target_share,
            step=config.beta_step,
            minimum=config.beta_min,
            maximum=config.beta_max,
        )
        self._recent: deque[list[Rollout]] = deque(maxlen=config.window)
        self._rng = rng

    def gate(self, weights_version: str) -> Gate:
        """The gate for the next batch; its rule is "none" until the warm-up is over."""
        config = self.config
        gate = Gate(
            version=self.version,
            weights_version=weights_version,
            statistics=self.statistics,
            monitor=self._monitor,
            beta=self.beta or Gate.beta,
            epsilon=config.epsilon,
            value=config.value,
            constant=config.constant,
            estimator=self.estimator,
            p_star=config.p_star,
            min_tokens=config.min_tokens,
        )
        if self.warmup.done and self.statistics.batches:
            try:
                return dataclasses.replace(gate, rule=config.rule)
            except ValueError as missing_estimator:
                self.warmup.reason = str(missing_estimator)
        return gate

    def draw_audits(self, count: int) -> list[bool]:
        """Which of `count` rollouts are generated to the end even if the rule stops them.

        Drawn before anything is sampled, so an audit cannot depend on what it observes.
        """
        return [self._rng.random() < self.config.audit_share for _ in range(count)]

    def observe(self, rollouts: Sequence[Rollout], critic_loss: float | None) -> None:
        """Learn from a finished batch: statistics, estimator, β, warm-up."""
        usable = [rollout for rollout in rollouts if rollout.end is not EndReason.ERROR]
        if not usable:
            return
        if self.estimator is not None:
            self.explained_variance = estimator.explained_variance(
                self.estimator, usable, self.config.audit_share
            )
        was_on = self.warmup.done
        self.statistics = self.statistics.updated(estimator.regrets(usable))
        self._recent.append(usable)
        if self.config.audit_share:
            fitted = estimator.fit(self._window, self.config.audit_share)
            self.estimator = fitted or self.estimator
        self.warmup.update(critic_loss)
        if self.beta is None:
            if self.warmup.done:
                self.beta = self._calibrate()
        elif was_on:
            share = sum(rollout.stopped for rollout in usable) / len(usable)
            self.beta = self._threshold.updated(self.beta, share)
        self.version += 1

    @property
    def _window(self) -> list[Rollout]:
        return [rollout for batch in self._recent for rollout in batch]

    def _calibrate(self) -> float:
        config = self.config
        full = self._window
        z = smoothed_regret(estimator.regrets(full), self.statistics, self._monitor)
        values = np.full_like(z, 1.0 if config.rule == "regret-only" else config.constant)
        if config.rule == "value-gated" and config.value == "stream" and self.estimator is not None:
            values = probabilities(self.estimator.logits(estimator.features(full)[0]))
        # No rule stops before min_tokens, so what z did there must not count.
        eligible = slice(config.min_tokens - 1, None)
        return self._threshold.calibrated(z[:, eligible], values[:, eligible], config.epsilon)
