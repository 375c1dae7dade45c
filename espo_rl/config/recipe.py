"""A whole recipe: its sections, and what they must be together."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, get_type_hints

from pydantic import model_validator

from espo_rl.config.bounds import Section
from espo_rl.config.sections import (
    Checkpoints,
    DeepSpeed,
    Evaluation,
    Logs,
    Model,
    Ppo,
    RolloutSection,
    Run,
    Servers,
    TaskSection,
    with_schedule,
)
from espo_rl.config.stopping import Stopping

#: of importance weights, where tokens are of older weights
USUAL_CAP = 2.0


class Recipe(Section):
    """A whole run."""

    run: Run = Run()
    model: Model
    task: TaskSection = TaskSection()
    rollout: RolloutSection = RolloutSection()
    stopping: Stopping = Stopping()
    ppo: Ppo = Ppo()
    deepspeed: DeepSpeed = DeepSpeed()
    servers: Servers = Servers()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    logs: Logs = Logs()

    @property
    def failure_reward(self) -> float:
        """What a stopped rollout is worth."""
        given = self.stopping.failure_reward
        return self.ppo.wrong_reward if given is None else given

    @property
    def asks_critic(self) -> bool:
        """Whether the gate takes V from a critic server, or an estimate that reads it."""
        return self.stopping.reads_critic and self.stopping.head is None

    @property
    def needs_critic(self) -> bool:
        """Whether a critic is trained: for GAE, or for a stop rule that asks a critic server."""
        gae = self.ppo.advantage == "gae" and self.ppo.baseline == "critic"
        return gae or self.asks_critic

    @property
    def needs_reference(self) -> bool:
        """Whether a model is loaded for the KL: with LoRA, unless another is given, the policy
        without its adapters is there already."""
        own = self.model.lora_rank is not None and self.model.reference is None
        return bool(self.ppo.kl_coefficient) and not own

    @model_validator(mode="before")
    @classmethod
    def _corrected(cls, given: Any) -> Any:
        """Tokens of older weights are weighted, where it is known how likely they were."""
        if not isinstance(given, dict):
            return given
        rollout, ppo, servers = (given.get(name, {}) for name in ("rollout", "ppo", "servers"))
        if not all(isinstance(part, dict) for part in (rollout, ppo, servers)):
            return given
        processed = servers.get("logprobs_mode") == "processed_logprobs"
        known = processed or rollout.get("temperature", 1.0) == 1.0
        if not known or with_schedule(rollout).get("schedule") != "refill":
            return given
        return {**given, "ppo": {"importance_cap": USUAL_CAP} | ppo}

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        rollouts = self.rollout.prompts_per_step * self.rollout.n
        if rollouts < self.ppo.minibatches:
            raise ValueError(
                f"ppo.minibatches = {self.ppo.minibatches} but a step has only {rollouts} rollouts "
                "(rollout.prompts_per_step × rollout.n)"
            )
        if self.ppo.baseline == "probe":
            if "probe" not in self.stopping.read:
                raise ValueError(
                    'ppo.baseline = "probe" needs an estimate that reads what probes say: set '
                    'stopping.sources = ["probe"], and a rule that estimates'
                )
            if self.needs_critic or self.ppo.advantage != "gae":
                raise ValueError(
                    'ppo.baseline = "probe" stands in the place of a critic: set ppo.advantage = '
                    '"gae", and no stopping.value or sources that ask a critic'
                )
        if self.servers.sleep and self.rollout.ahead:
            raise ValueError(
                "servers.sleep has the servers sleep while the trainer updates, and "
                'rollout.schedule = "refill" has them sample: leave one of them out'
            )
        if self.ppo.advantage == "group" and self.rollout.n < 2:
            raise ValueError("ppo.advantage = 'group' needs rollout.n of at least 2")
        if self.rollout.dynamic_sampling and self.rollout.n < 2:
            raise ValueError(
                "rollout.dynamic_sampling compares the rollouts of a prompt: set rollout.n to at "
                "least 2, or leave it out"
            )
        if self.ppo.overlong_buffer > self.rollout.max_tokens:
            raise ValueError(
                f"ppo.overlong_buffer = {self.ppo.overlong_buffer} must not be above "
                f"rollout.max_tokens = {self.rollout.max_tokens}"
            )
        stopping = self.stopping
        for key, tokens in (
            ("min_tokens", stopping.min_tokens * (stopping.rule != "none")),
            ("value_every" if stopping.head else "ask_every", stopping.schedule[0]),
        ):
            if tokens > self.rollout.max_tokens:
                raise ValueError(
                    f"stopping.{key} = {tokens} must not be above rollout.max_tokens = "
                    f"{self.rollout.max_tokens}: no rollout comes so far"
                )
        if self.ppo.lr_warmup_steps and "scheduler" in self.deepspeed.extra:
            raise ValueError(
                "ppo.lr_warmup_steps has no effect with deepspeed.extra.scheduler: leave one out"
            )
        if (
            self.ppo.importance_cap is not None
            and self.rollout.temperature != 1.0
            and self.servers.logprobs_mode == "raw_logprobs"
        ):
            raise ValueError(
                "ppo.importance_cap needs the logprobs that were sampled from; at a temperature "
                "other than 1 raw ones are not: servers.logprobs_mode = 'processed_logprobs'"
            )
        if not self.needs_critic:
            for key, used in (
                ("ppo.critic_only_steps", self.ppo.critic_only_steps),
                ("stopping.warmup = 'critic-loss'", self.stopping.warmup == "critic-loss"),
            ):
                if used:
                    raise ValueError(
                        f"{key} needs a critic, and none is trained: leave it out, or set "
                        "ppo.advantage = 'gae' and ppo.baseline = 'critic'"
                    )
        return self


def nearest(key: str) -> str | None:
    """The section or key (`section.key`) that is probably meant by one that does not exist."""
    sections = get_type_hints(Recipe)
    known = {
        f"{section}.{name}": name
        for section in Recipe.model_fields
        for name in sections[section].model_fields
    }
    _, _, last = key.rpartition(".")
    # The key in another section, or one that is written alike.
    same = [dotted for dotted, name in known.items() if name == last]
    close = get_close_matches(key, [*known, *Recipe.model_fields], 1, cutoff=0.7)
    return next(iter(close + same), None)


def differences(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, dotted; with both values."""
    pairs = {}
    for section in Recipe.model_fields:
        part, old = getattr(now, section), getattr(before, section)
        for key in type(part).model_fields:
            pairs[f"{section}.{key}"] = (getattr(old, key), getattr(part, key))
    return {key: values for key, values in pairs.items() if values[0] != values[1]}
