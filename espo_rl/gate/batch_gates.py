"""The training loop's side of early stopping.

Owns the batch statistics, the threshold, the success estimator and the warm-up; makes the gate of
each batch and learns from the batch's rollouts.

Nothing here changes while a batch is generated, so no decision sees the future.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.estimate import SuccessEstimator, probabilities, sigmoid
from espo_gateway.stop.fit import Examples, fit
from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.regret import Array, MonitorConfig, RegretStatistics
from espo_gateway.stop.replay import estimated, gate_logits, stop_levels
from espo_gateway.stop.rules import P_STAR, Gate, threshold_of, value_source
from espo_gateway.stop.threshold_control import AuditThreshold, Outcomes, ShareThreshold
from espo_gateway.stop.told import ASKED, Schedule, asked_below, in_order
from espo_rl.config import Stopping
from espo_rl.gate.audits import Audits
from espo_rl.gate.history import History
from espo_rl.gate.outcomes import KnownRollouts, recorded_of, with_outcome
from espo_rl.gate.warm_up import WarmUp
from espo_rl.types import EndReason, Rollout

#: Tokens that stop from which is learnt where to ask.
ENOUGH_STOPS = 50


class StopController:
    """Makes the gate for each batch and updates itself between batches.

    explained_variance: of the V that gates, on the last batch, which it had not seen; None where
        the rule has no V, but for a warm-up that asks for the stream's estimate. free_variance: the
        same without the sources that are asked, at the tokens where they were.
    history: what earlier steps tell of a prompt.
    auc_within: between right and wrong rollouts of one prompt in the last batch, of the gate that
        had not seen it; None where no prompt had both.
    z_quantiles: 50, 90 and 99 % quantiles of z over the tokens of the last batch.
    """

    def __init__(
        self,
        config: Stopping,
        total_steps: int,
        rng: random.Random,
        *,
        worth: tuple[float, float] = (0.0, 1.0),
        audits: Audits | None = None,
    ) -> None:
        """worth: what a wrong and a right answer are worth in the critic's returns.

        audits: None: by the recipe's share alone, whatever the prompts.
        """
        self.config = config
        self.audits = audits or Audits(config.audit_share)
        self.statistics = RegretStatistics(decay=config.decay)
        self.estimator: SuccessEstimator | None = None
        self.history = History()
        self.warmup = WarmUp(config, total_steps)
        self.version = 0
        self.explained_variance: float | None = None
        self.free_variance: float | None = None
        self.auc_within: float | None = None
        self.z_quantiles: tuple[float, float, float] | None = None
        self._monitor = MonitorConfig(smoothing=config.smoothing, clip=config.clip)
        self._source = value_source(config.rule, config.value)
        self._sources = in_order(config.read)
        self._free: SuccessEstimator | None = None
        self._below = 1.0
        self._threshold = None if config.rule == "none" else make_threshold(config)
        self._recent: deque[Examples] = deque(maxlen=config.window)
        self._recent_free: deque[Examples] = deque(maxlen=config.window)
        self._rng = rng
        self._worth = worth

    # -- before a batch ------------------------------------------------------------------------

    def gate(self, weights_version: str) -> Gate:
        """The gate for the next batch; its rule is "none" while stopping is off."""
        gate = self._gate(weights_version)
        if not self.on:
            return gate
        rule = self.config.rule
        assert self.threshold is not None
        return threshold_of(rule).set(dataclasses.replace(gate, rule=rule), self.threshold)

    def draw_audits(self, count: int) -> list[bool]:
        """Which of `count` rollouts are generated to the end even if the rule stops them."""
        return self.audits.draw(count, self._rng)

    @property
    def on(self) -> bool:
        """Whether the next batch is gated."""
        estimates = self._source != "stream" or self.estimator is not None
        return self.warmup.done and self.threshold is not None and estimates

    @property
    def reason(self) -> str:
        """Why stopping is on and at which threshold, or why it is off."""
        if self._threshold is None:
            return "no stop rule"
        if not self.warmup.done:
            return self.warmup.reason
        if self._source == "stream" and self.estimator is None:
            return "no estimator yet: all outcomes so far are the same"
        if self.threshold is None:
            return self._threshold.reason
        symbol = threshold_of(self.config.rule).symbol
        return f"{symbol} = {self.threshold:.3g}: {self._threshold.reason}"

    @property
    def threshold(self) -> float | None:
        """β, p* or the hazard of the next batch; None when there is none to be had."""
        if self._threshold is None or self._threshold.level is None:
            return None
        return threshold_of(self.config.rule).at(self._threshold.level)

    @property
    def bound_upper(self) -> float | None:
        """threshold = "audit": upper confidence bound of what `Stopping.bound` bounds."""
        return None if self._threshold is None else self._threshold.upper

    @property
    def known_outcomes(self) -> float | None:
        """threshold = "audit": effective number of outcomes that the bound rests on."""
        return None if self._threshold is None else self._threshold.known

    def metrics(self) -> dict[str, float]:
        """What a log says beside the gate, after a batch; NaN where nothing is known."""
        numbers = (
            self.bound_upper,
            self.known_outcomes,
            self.explained_variance,
            self.auc_within,
        )
        bound, known, explained, within = (
            math.nan if value is None else value for value in numbers
        )
        z = self.z_quantiles or (math.nan,) * 3
        free = {} if self.free_variance is None else {"explained_variance_free": self.free_variance}
        return free | {
            "bound_upper": bound,
            "effective_n": known,
            "auc_within_prompts": within,
            "explained_variance": explained,
            "regret_mean": self.statistics.mean,
            "regret_variance": self.statistics.variance,
            "z_p50": z[0],
            "z_p90": z[1],
            "z_p99": z[2],
        }

    def _gate(self, weights_version: str) -> Gate:
        config = self.config
        return Gate(
            version=self.version,
            weights_version=weights_version,
            statistics=self.statistics,
            monitor=self._monitor,
            epsilon=config.epsilon,
            value=config.value,
            constant=config.constant,
            critic_wrong=self._worth[0],
            critic_right=self._worth[1],
            estimator=self.estimator,
            free=self._free,
            schedule=Schedule(*config.schedule, below=self._below),
            min_tokens=config.min_tokens,
        )

    # -- after a batch -------------------------------------------------------------------------

    @property
    def needs_values(self) -> bool:
        """Whether `observe` has a use for V."""
        learns = self._threshold is not None and self._threshold.learns
        gates = self._source == "critic" and (learns or self.config.head is not None)
        return gates or "critic" in self._sources

    def observe(
        self,
        rollouts: Sequence[Rollout],
        critic_loss: float | None,
        critic_explained_variance: float | None = None,
        *,
        gated: bool | None = None,
    ) -> None:
        """Learn from a finished batch: statistics, threshold, estimator, warm-up.

        Args:
            rollouts: those `with_outcome` carry V of each token where a critic's is read; without
                any nothing is learnt of a critic's threshold. That V stands for the next gate's,
                too, whose critic is an update further.
            critic_loss, critic_explained_variance: of the critic on the batch; None without one. A
                head is judged by the rollouts' own V instead.
            gated: whether the batch's gate had a rule; None: as the present one has.
        """
        usable = [rollout for rollout in rollouts if rollout.end is not EndReason.ERROR]
        if not usable:
            return
        was_on = self.on if gated is None else gated
        known = KnownRollouts.of(usable, self.audits.share, gated=was_on)
        recorded = recorded_of(usable)
        updated = self.statistics.updated(recorded.regrets)
        # The first batch had no statistics in force: its own stand in.
        in_force = self.statistics if self.statistics.batches else updated
        self.z_quantiles = self._quantiles(recorded, in_force)
        # Before the estimator learns of the batch: what it says here must be out of sample.
        expected = self._expected(known)
        outcomes = self._outcomes(known, expected, in_force)
        self.auc_within = None if outcomes is None else known.auc_within(outcomes.levels)
        if self._source == "critic":
            self.explained_variance = critic_explained_variance
            if self.config.head is not None and (said := known.recorded.critic) is not None:
                self.explained_variance = known.explained_variance(self._gate("").success(said))
        elif expected is not None:
            self.explained_variance, self.free_variance = self._explained(known, expected)
        self.statistics = updated
        if self.config.estimates:
            self._learn(known)
        self.history.add(with_outcome(usable), known.weights)
        self.warmup.update(critic_loss, self.explained_variance)
        if self._threshold is not None:
            share = sum(rollout.stopped for rollout in usable) / len(usable)
            audited = [bool(rollout.correct) for rollout in usable if rollout.audited]
            self._threshold.update(
                outcomes,
                share if was_on else None,
                ready=self.warmup.done,
                rehearsal=self._outcomes(known, self._expected(known), self.statistics),
                audits=(len(audited), sum(audited)),
            )
        self.version += 1

    def _learn(self, known: KnownRollouts) -> None:
        """Fit the estimates anew, and see where the free one leaves the other a decision."""
        self._recent.append(known.examples(self._sources))
        self.estimator = fit(self._recent, self._sources) or self.estimator
        if not self.config.asks or self.config.head is not None:
            return  # asking costs nothing
        weights = np.broadcast_to(known.weights[:, None], known.recorded.logprobs.shape)
        if self._free is not None:
            # Where it left the other nothing to decide, only those drawn for an audit were asked.
            passed = probabilities(estimated(self._free, known.recorded)) >= self._below
            weights = np.where(passed, 1.0 / self.audits.share, weights)
        # Of its own examples: the other's are only where something was asked.
        free_sources = [source for source in self._sources if source not in ASKED]
        self._recent_free.append(known.examples(free_sources))
        self._free = fit(self._recent_free, free_sources) or self._free
        p_star = self.threshold
        if self.estimator is None or self._free is None or not p_star:
            return
        expected = probabilities(estimated(self.estimator, known.recorded))
        if threshold_of(self.config.rule) is P_STAR:
            stops = expected < p_star
            if stops.sum() >= ENOUGH_STOPS:
                free = probabilities(estimated(self._free, known.recorded))
                self._below = asked_below(free, stops, weights)

    def baselines(self, rollouts: Sequence[Rollout]) -> list[NDArray[np.float32]]:
        """V before each token that is trained on, in rewards: by the estimate as it is now.

        Where its sources were not asked it stands as it stood; before they first were, it is what
        is known of the prompt. As it is called before `observe`, it has not seen the outcomes.

        Returns:
            [tokens] each.
        """
        wrong, right = self._worth
        recorded = recorded_of(rollouts)
        said = np.full(recorded.logprobs.shape, np.nan)
        if self.estimator is not None:
            said = probabilities(estimated(self.estimator, recorded))
        start = [sigmoid(self.history.log_odds(rollout.problem.id)) for rollout in rollouts]
        before = np.column_stack([start, said])
        last = np.maximum.accumulate(
            np.where(np.isnan(before), 0, np.arange(before.shape[1])), axis=1
        )
        values = wrong + (right - wrong) * np.take_along_axis(before, last, axis=1)
        return [
            row[: rollout.trained].astype(np.float32)
            for row, rollout in zip(values, rollouts, strict=True)
        ]

    def _quantiles(
        self, recorded: Recorded, statistics: RegretStatistics
    ) -> tuple[float, float, float] | None:
        z = recorded.z(statistics, self._monitor)[recorded.known]
        if not z.size:
            return None
        half, most, nearly_all = np.quantile(z, (0.5, 0.9, 0.99))
        return float(half), float(most), float(nearly_all)

    def _expected(self, known: KnownRollouts) -> Array | None:
        """V at each token as the next gate would take it, [rollouts, tokens]; None without one."""
        if self.estimator is None:
            return None
        return probabilities(gate_logits(self._gate(""), known.recorded))

    def _explained(
        self, known: KnownRollouts, expected: Array
    ) -> tuple[float | None, float | None]:
        """Explained variance of the estimate, and of the free one at the same tokens.

        expected: what `_expected` gives.
        """
        if self.estimator is None or self._free is None:
            return known.explained_variance(expected), None
        whole, free = (
            probabilities(estimated(estimator, known.recorded))
            for estimator in (self.estimator, self._free)
        )
        asked = np.where(np.isnan(whole), np.nan, free)
        return known.explained_variance(whole), known.explained_variance(asked)

    def _outcomes(
        self, known: KnownRollouts, expected: Array | None, statistics: RegretStatistics
    ) -> Outcomes | None:
        """What the batch says about thresholds; None when the rule cannot be replayed on it.

        expected: V at each token by the stream's estimator.
        """
        values = {"stream": expected, "critic": known.recorded.critic}
        unknown = self._source in values and values[self._source] is None
        if self._threshold is None or unknown:
            return None
        gate = dataclasses.replace(self._gate(""), rule=self.config.rule, statistics=statistics)
        levels = stop_levels(gate, known.recorded, expected if self._source == "stream" else None)
        return Outcomes(
            levels=levels.astype(np.float32),
            correct=known.correct,
            weights=known.weights.astype(np.float32),
            known_share=known.known_share,
            prompts=known.prompts,
        )


def make_threshold(config: Stopping) -> ShareThreshold | AuditThreshold:
    """The controller of the rule's threshold, by `config.threshold`."""
    rule, target = config.rule, config.target_share
    threshold = threshold_of(rule)
    low, high = map(threshold.level, config.limits)
    if rule == "random":
        # Half a Newton step toward the share 1 - (1 - hazard)^length, as one batch's is noisy.
        step = -0.5 / ((1.0 - target) * math.log1p(-target))
        return ShareThreshold(target=target, step=step, low=low, high=high, start=None)
    if config.threshold == "audit":
        return AuditThreshold(config.bound, window=config.evidence, low=low, high=high)
    default = threshold.level(threshold.of(Gate()))
    _, given = config.start
    start = None if given is None else threshold.level(given)
    if config.threshold == "fixed":
        start = default if start is None else start
        return ShareThreshold(target=target, step=0.0, low=-math.inf, high=math.inf, start=start)
    if config.threshold == "quantile":
        return ShareThreshold(target=target, step=0.0, low=low, high=high, start=None)
    if start is None and config.warmup == "none":
        start = default
    return ShareThreshold(target=target, step=config.beta_step, low=low, high=high, start=start)
