"""When stopping may begin."""

from __future__ import annotations

import math

from espo_rl.config import Stopping


class WarmUp:
    """Decides when stopping may start. `reason` says why it may, or why not yet."""

    def __init__(self, config: Stopping, total_steps: int) -> None:
        self._config = config
        self._total_steps = total_steps
        self.batches = 0
        self.critic_losses: list[float] = []
        self.done = config.warmup == "none"
        self.reason = "no warm-up" if self.done else "warm-up: no batch yet"

    def extend(self, total_steps: int) -> None:
        """The run is to have so many steps in all."""
        self._total_steps = total_steps

    def update(self, critic_loss: float | None, explained_variance: float | None) -> None:
        """Take note of a finished batch.

        Args:
            critic_loss: of the critic's update on it; None without a critic.
            explained_variance: of the V that gates, on this batch, which it had not seen.
        """
        self.batches += 1
        if critic_loss is not None:
            self.critic_losses = [*self.critic_losses[-2:], critic_loss]
        if self.done:
            return
        if self._config.warmup == "batches":
            self._after_batches()
        elif self._config.warmup == "critic-loss":
            self._by_critic_loss()
        else:
            self._by_explained_variance(explained_variance)

    def _after_batches(self) -> None:
        wanted = self._config.warmup_batches
        self.done = self.batches >= wanted
        self.reason = f"{self.batches} of {wanted} warm-up batches seen"

    def _by_critic_loss(self) -> None:
        """Row 8."""
        config, losses = self._config, self.critic_losses
        forced = config.warmup_share * self._total_steps
        self.done = True
        if len(losses) == 3 and all(loss < config.warmup_loss for loss in losses):
            self.reason = f"critic loss below {config.warmup_loss} three times"
        elif len(losses) >= 2 and abs(losses[-1] - losses[-2]) < config.warmup_change:
            self.reason = f"critic loss moved less than {config.warmup_change}"
        elif self.batches >= forced:
            self.reason = f"forced on after {self.batches} steps"
        else:
            self.done = False
            loss = f"critic loss {losses[-1]:.3g}" if losses else "no critic loss"
            self.reason = f"warm-up: {loss}; forced on after {math.ceil(forced)} steps"

    def _by_explained_variance(self, explained: float | None) -> None:
        wanted = self._config.warmup_explained
        self.done = explained is not None and explained > wanted
        known = "unknown" if explained is None else f"{explained:.2f}"
        self.reason = f"explained variance {known}, more than {wanted} wanted"
        if not self.done:
            self.reason = f"warm-up: {self.reason}; never forced"
