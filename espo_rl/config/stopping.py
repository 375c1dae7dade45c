"""The section `stopping` of a recipe: when a rollout is given up, and how that is learned.

As in `sections`, a comment above or beside a setting is its explanation (`explain`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from espo_gateway.stop.rules import BETA, P_STAR, RuleName, ValueName, threshold_of, value_source
from espo_gateway.stop.threshold_control import Bound
from espo_gateway.stop.told import ASKED, MOST_GROWTH, SourceName
from espo_rl.config.bounds import (
    Between,
    Count,
    Decay,
    Number,
    Positive,
    Section,
    Share,
    Tokens,
    Written,
)
from espo_rl.types import AuditedRight


class Stopping(Section):
    """When a rollout is given up, and how that is learned (rows 2-8 of the method)."""

    rule: RuleName = "success-probability"  # value-gated: the paper's; none: plain PPO
    value: ValueName = (
        "stream"  # where V comes from: stream statistics, a critic or value_head, "constant"
    )
    # How the threshold is set: β, or p* of the rules that compare a value with it.
    # "audit": as loose as known outcomes allow under the bound below; "share": the paper's
    # controller; "quantile": once, so that target_share of the warm-up's rollouts would stop;
    # "fixed". Rule "random" always follows "share"
    threshold: Literal["audit", "share", "quantile", "fixed"] = "audit"
    # "fixed", and where "share" starts; None: 7.0 (the paper's) and 0.05, but "share" starts at
    # the quantile when there is a warm-up
    beta: Positive | None = None
    p_star: Between | None = None  # the same, for rules that compare with p*
    epsilon: Positive = 0.2  # ε of the value gate z > β·max(V, ε)
    constant: Number = 1.0  # V where value = "constant"
    min_tokens: Tokens = 4  # no rollout is stopped before so many
    # What a stopped rollout is worth; None: ppo.wrong_reward. A lower one makes an answer that is
    # wrong but finished the better of two failures, in a group the one that is learnt
    failure_reward: Number | None = None
    # Generated to the end though stopped. Of each prompt's rollouts it is one at least, where there
    # are 4 or more, so that none is left without a finished one
    audit_share: Share = 0.1
    # What a rollout is that was stopped though its audit found it right. "whole": right, trained on
    # to its end; "cut": right, trained on up to the cut; "failed": a failure, as in the paper
    audited_right: AuditedRight = "whole"
    right_lost: Between = 0.05  # "audit": of the right rollouts at most this share is stopped
    # "audit", in the place of right_lost: of the stopped ones at most this share would have been
    # right (the paper's figure)
    false_positives: Between | None = None
    confidence: Between = 0.9  # "audit": with which the bound is kept
    evidence: Count = 20  # "audit": batches whose outcomes it is judged on
    decay: Decay = 0.99  # α of the running mean and variance of the regret g
    smoothing: Decay = 0.9  # α_s of z, the smoothed regret
    clip: Positive = 10.0  # of the normalised regret, ±c
    target_share: Between = 0.25  # "share", "quantile": of the rollouts that are stopped
    beta_step: Positive = 0.1  # "share": η of β, or of log p*/(1 - p*)
    beta_min: Positive = 0.5  # β is kept above it
    beta_max: Positive = 20.0  # and below this
    # p* is kept below it
    p_star_max: Annotated[float, Field(gt=P_STAR.strictest, le=1 - 1e-6)] = 0.5
    # Until when nothing is stopped. "critic-loss" is the paper's rule
    warmup: Literal["none", "batches", "critic-loss", "explained-variance"] = "batches"
    warmup_batches: Count = 4  # "batches": so many
    warmup_share: Share = 0.1  # "critic-loss": of all steps, after which stopping is forced on
    warmup_loss: Positive = 0.5  # "critic-loss": three times below it
    warmup_change: Positive = 0.1  # "critic-loss": or moved by less than this
    warmup_explained: Share = 0.2  # "explained-variance": of the V that gates, above it
    window: Count = 6  # batches that the estimate of success is fitted on
    # What it reads beside the stream's own numbers. "history": how often the prompt was solved in
    # earlier steps; "probe": how likely the policy itself finds the reference answer by now;
    # "critic": V of a critic server, or of value_head. The latter two are asked along the rollout
    sources: list[SourceName] = []
    # Folder of a head on the policy's hidden states (`pretrain_critic --head-only --layers N`): the
    # policy servers tell V by it, at no cost, and there is no critic server. Servers by URL are to
    # be started with it as --value-head
    value_head: Written | None = None
    value_every: Tokens = 16  # how far apart an estimate reads what value_head tells
    ask_every: Tokens = 96  # how far apart probe and critic server are asked
    # further apart as a rollout grows: by so much of its length
    ask_growth: Annotated[float, Field(ge=0, le=MOST_GROWTH)] = 0.25
    # The probe reads answers after it
    probe_phrase: Annotated[str, Field(min_length=1)] = "\n\nThe final answer is \\boxed{"
    probe_end: str = "}"  # and they end with this

    @property
    def asks(self) -> bool:
        """Whether an estimate reads a source that must be asked."""
        return not ASKED.isdisjoint(self.read)

    @property
    def schedule(self) -> tuple[int, float]:
        """Every how many tokens an estimate's sources are asked, 0 where it reads none, and by how
        much of a rollout further apart."""
        every = self.ask_every if self.head is None else self.value_every
        return every if self.asks else 0, self.ask_growth

    @property
    def reads_critic(self) -> bool:
        """Whether the rule takes V from a critic, or an estimate that reads it."""
        return value_source(self.rule, self.value) == "critic" or "critic" in self.read

    @property
    def head(self) -> Path | None:
        """The head by which policy servers tell V, if somebody reads it."""
        return self.value_head if self.reads_critic else None

    @property
    def read(self) -> list[SourceName]:
        """The sources that are read: none where the rule has no estimate that would."""
        return self.sources if value_source(self.rule, self.value) == "stream" else []

    @property
    def estimates(self) -> bool:
        """Whether success is estimated from the stream: it gates, or the warm-up waits for it."""
        source = value_source(self.rule, self.value)
        explained = self.warmup == "explained-variance" and source != "critic"
        return self.rule != "none" and (source == "stream" or explained)

    @property
    def limits(self) -> tuple[float, float]:
        """The strictest and the loosest threshold that a controller goes to by itself."""
        threshold = threshold_of(self.rule)
        if threshold is BETA:
            return self.beta_max, self.beta_min
        loosest = self.p_star_max if threshold is P_STAR else threshold.loosest
        return threshold.strictest, loosest

    @property
    def start(self) -> tuple[str, float | None]:
        """The key that gives the rule's threshold, and what it gives."""
        key = "p_star" if threshold_of(self.rule) is P_STAR else "beta"
        return key, getattr(self, key)

    @property
    def bounded(self) -> bool:
        """Whether the threshold keeps the bound."""
        return self.threshold == "audit" and self.rule not in ("none", "random")

    @property
    def bound(self) -> Bound:
        """What threshold = "audit" keeps."""
        return Bound.chosen(self.right_lost, self.false_positives, self.confidence)

    @model_validator(mode="after")
    def _together(self) -> Stopping:
        explained = self.warmup == "explained-variance" and self.rule != "none"
        source = value_source(self.rule, self.value)
        if self.audit_share == 0.0:
            for needed, what in (
                (source == "stream", "an estimator"),
                (self.bounded, 'threshold = "audit"'),
                (explained and source != "critic", 'warmup = "explained-variance"'),
            ):
                if needed:
                    raise ValueError(
                        f"audit_share = 0 with {what}: stopping hides the outcomes it learns from; "
                        "set audit_share above 0 (0.1 is usual)"
                    )
        if self.rule == "confidence":
            raise ValueError(
                'rule = "confidence" needs the logprobs of many alternatives, which rollouts do '
                'not record: set rule = "surprise", or try it on a gateway alone'
            )
        if self.head is not None and "probe" in self.read:
            raise ValueError(
                'value_head has the engine decide, which cannot ask: leave "probe" out of sources, '
                "or value_head"
            )
        if self.head is not None and self.warmup == "critic-loss":
            raise ValueError(
                'warmup = "critic-loss" is of a critic in training, and value_head is none: set '
                '"explained-variance", or "batches"'
            )
        if not self.beta_min < self.beta_max:
            raise ValueError(f"beta_min = {self.beta_min} must be below beta_max = {self.beta_max}")
        if self.threshold == "share" and self.rule not in ("none", "random"):
            (key, given), (low, high) = self.start, sorted(self.limits)
            if given is not None and not low <= given <= high:
                raise ValueError(
                    f'{key} = {given:g} with threshold = "share" must lie in {low:g} to {high:g}, '
                    'where the controller keeps it: change it or its bounds, or set "fixed"'
                )
        return self
