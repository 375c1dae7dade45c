"""One PPO update in plain torch, written out: what the engines are held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from espo_rl.config import Ppo
from espo_rl.ppo.parameters import gathered
from espo_rl.types import Rollout
from tests.helpers.trainer import (
    PPO,
    Paths,
)


def parameters(engine: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gathered(engine.module)}


class Reference:
    """One rollout at a time, no padding, no shared code: what PPO's equations say."""

    def __init__(self, paths: Paths, **ppo: Any) -> None:
        self.ppo = Ppo(**{**PPO, **ppo})
        assert self.ppo.critic_learning_rate is not None
        self.actor = AutoModelForCausalLM.from_pretrained(paths.actor, dtype=torch.float32)
        self.critic = AutoModelForSequenceClassification.from_pretrained(
            paths.critic, num_labels=1, dtype=torch.float32
        )
        self.frozen = AutoModelForCausalLM.from_pretrained(
            paths.reference or paths.actor, dtype=torch.float32
        )
        self.optimizers = [
            torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=self.ppo.weight_decay)
            for model, rate in (
                (self.actor, self.ppo.learning_rate),
                (self.critic, self.ppo.critic_learning_rate),
            )
        ]
        self.norms: dict[str, list[float]] = {"actor": [], "critic": []}

    @staticmethod
    def logprobs(model: Any, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the kept tokens at the sampling temperature, and the entropies there: [kept]."""
        ids = torch.tensor([rollout.prompt_ids + rollout.token_ids[: rollout.kept]])
        rows = model(ids, attention_mask=torch.ones_like(ids)).logits[0] / 0.7
        table = rows.log_softmax(-1)[len(rollout.prompt_ids) - 1 : -1]
        chosen = table[torch.arange(rollout.kept), ids[0, -rollout.kept :]]
        return chosen, -(table.exp() * table).sum(-1)

    def values(self, rollout: Rollout) -> torch.Tensor:
        """V of the state before each kept token, and of the one after the last: [kept + 1].

        Each from a forward pass over its own prefix, by the classifier as it is served.
        """
        ids = rollout.prompt_ids + rollout.token_ids[: rollout.kept]
        return torch.stack(
            [
                self.critic(torch.tensor([ids[:end]])).logits[0, 0]
                for end in range(len(rollout.prompt_ids), len(ids) + 1)
            ]
        )

    def kl(self, logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        difference = logprobs - reference
        if self.ppo.kl_estimator == "k1":
            return difference
        return (-difference).exp() - 1 + difference

    def update(self, rollouts: Sequence[Rollout]) -> None:
        ppo = self.ppo
        old_logprobs, references, old_values, returns, advantages = [], [], [], [], []
        with torch.no_grad():
            for rollout in rollouts:
                old_logprobs.append(self.logprobs(self.actor, rollout)[0])
                references.append(self.logprobs(self.frozen, rollout)[0])
                values = self.values(rollout).numpy()
                following = np.append(values[1:-1], 0.0)
                rewards = np.zeros(rollout.kept)
                if ppo.kl_place == "reward":
                    kl = self.kl(old_logprobs[-1], references[-1])
                    rewards -= ppo.kl_coefficient * kl.numpy()
                rewards[-1] += rollout.reward
                deltas = rewards + ppo.gamma * following - values[:-1]

                decay = ppo.gamma * ppo.lam
                gae = np.array(
                    [
                        sum(decay**k * delta for k, delta in enumerate(deltas[t:]))
                        for t in range(len(deltas))
                    ]
                )
                advantages.append(gae)
                old_values.append(torch.from_numpy(values[:-1]))
                returns.append(torch.from_numpy(gae + values[:-1]))
        flat = np.concatenate(advantages)
        normal = [
            torch.from_numpy((advantage - flat.mean()) / flat.std()) for advantage in advantages
        ]
        total = sum(rollout.kept for rollout in rollouts)
        for _ in range(ppo.epochs):
            loss = critic_loss = torch.zeros(())
            for i, rollout in enumerate(rollouts):
                logprobs, entropies = self.logprobs(self.actor, rollout)
                ratio = (logprobs - old_logprobs[i]).exp()
                clipped = ratio.clamp(1 - ppo.clip_low, 1 + ppo.clip_high)
                actor = -torch.minimum(ratio * normal[i], clipped * normal[i])
                if ppo.importance_cap:
                    served = torch.tensor(rollout.logprobs[: rollout.kept])
                    actor = actor * (old_logprobs[i] - served).exp().clamp(max=ppo.importance_cap)
                if ppo.kl_place == "loss":
                    actor = actor + ppo.kl_coefficient * self.kl(logprobs, references[i])
                actor = actor - ppo.entropy_bonus * entropies
                now = self.values(rollout)[:-1]
                assert ppo.value_clip is not None
                near = old_values[i] + (now - old_values[i]).clamp(-ppo.value_clip, ppo.value_clip)
                worse = torch.maximum((now - returns[i]) ** 2, (near - returns[i]) ** 2)
                if ppo.aggregation == "token-mean":
                    weight = 1 / total
                else:
                    weight = 1 / rollout.kept / len(rollouts)
                loss = loss + weight * actor.sum()
                critic_loss = critic_loss + 0.5 * weight * worse.sum()
            for model, one, optimizer in zip(
                (self.actor, self.critic), (loss, critic_loss), self.optimizers, strict=True
            ):
                optimizer.zero_grad()
                one.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), ppo.max_grad_norm)
                self.norms["actor" if model is self.actor else "critic"].append(float(norm))
                optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {
            f"{kind}.{name}": value.detach().clone()
            for kind, model in (("actor", self.actor), ("critic", self.critic))
            for name, value in model.named_parameters()
        }
