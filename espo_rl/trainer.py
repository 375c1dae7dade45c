"""PPO updates of actor and critic, each a DeepSpeed engine of its own.

Knows rollouts with rewards; knows nothing of servers, gates or tasks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espo_rl.advantages import gae, whiten
from espo_rl.config import Recipe
from espo_rl.losses import entropy, policy_loss, token_logprobs, value_loss
from espo_rl.types import EndReason, Rollout
from espo_rl.weights import gathered

Metrics = dict[str, float]


class Critic(nn.Module):
    """V(s_t) for every prefix: a sequence classifier with one label, read at each position.

    It is saved as the Hugging Face checkpoint `...ForSequenceClassification`, which vLLM's pooling
    runner serves.
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, time] -> values of the state after each token [batch, time]."""
        body = getattr(self.classifier, self.classifier.base_model_prefix)
        hidden = body(input_ids=tokens, use_cache=False).last_hidden_state
        return self.classifier.score(hidden).squeeze(-1).float()


@dataclass
class Experience:
    """A rollout's training sample, prepared for several passes. All arrays [kept]."""

    tokens: Tensor  # [prompt + kept]
    prompt: int
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def kept(self) -> int:
        return len(self.tokens) - self.prompt


@dataclass
class Forward:
    """What actor and critic say of a rollout's sample before the update; arrays are [kept]."""

    tokens: Tensor  # [prompt + kept]
    logprobs: Tensor  # at the sampling temperature
    values: Tensor
    value_after: float  # V of the state after the last token
    mismatch: Tensor  # |log π here - log π on the server|


class PpoTrainer:
    """Actor and critic with their optimizers.

    Raises:
        OSError: a model cannot be loaded; the message is transformers' own.
    """

    def __init__(self, recipe: Recipe) -> None:
        deepspeed = _deepspeed()
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        self._recipe, self._ppo = recipe, recipe.ppo
        dtype = getattr(torch, recipe.model.dtype)
        torch.manual_seed(recipe.run.seed)
        actor = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=dtype)
        critic = AutoModelForSequenceClassification.from_pretrained(
            recipe.model.critic or recipe.model.path, num_labels=1, dtype=dtype
        )
        if recipe.model.critic is None:
            nn.init.zeros_(critic.score.weight)  # V starts at 0, not at noise
        if recipe.model.gradient_checkpointing:
            actor.gradient_checkpointing_enable()
            critic.gradient_checkpointing_enable()

        def engine(model: nn.Module, learning_rate: float) -> Any:
            config = _engine_config(recipe, learning_rate)
            engine = deepspeed.initialize(
                model=model, model_parameters=list(model.parameters()), config=config
            )[0]
            _keep_grad_norm(engine)
            return engine

        self.actor = engine(actor, self._ppo.learning_rate)
        self.critic = engine(
            Critic(critic), self._ppo.critic_learning_rate or self._ppo.learning_rate
        )
        self._rng = np.random.default_rng(recipe.run.seed)

    # -- one step ------------------------------------------------------------------------------

    def update(self, rollouts: Sequence[Rollout]) -> Metrics:
        """One PPO step on scored rollouts: old logprobs and values, advantages, epochs."""
        usable = [rollout for rollout in rollouts if rollout.kept]
        experience, metrics = self._experience(usable)
        size = -(-len(experience) // self._ppo.minibatches)
        sums: dict[str, float] = {}
        passes = 0
        for _ in range(self._ppo.epochs):
            order = self._rng.permutation(len(experience))
            for start in range(0, len(order), size):
                minibatch = [experience[i] for i in order[start : start + size]]
                for name, value in self._minibatch(minibatch).items():
                    sums[name] = sums.get(name, 0.0) + value
                passes += 1
        return metrics | {name: value / passes for name, value in sums.items()}

    def _experience(self, rollouts: Sequence[Rollout]) -> tuple[list[Experience], Metrics]:
        ppo = self._ppo
        forward = self._forward(rollouts)
        estimates = []
        for rollout, before in zip(rollouts, forward, strict=True):
            bootstrap = rollout.end is EndReason.LENGTH and ppo.bootstrap_length
            estimates.append(
                gae(
                    before.values.numpy(),
                    rollout.reward,
                    gamma=ppo.gamma,
                    lam=ppo.lam,
                    bootstrap=before.value_after if bootstrap else 0.0,
                )
            )
        advantages = [advantage for advantage, _ in estimates]
        if ppo.whiten:
            advantages = whiten(advantages)
        experience = [
            Experience(
                tokens=before.tokens,
                prompt=len(rollout.prompt_ids),
                old_logprobs=before.logprobs,
                old_values=before.values,
                advantages=torch.from_numpy(advantage),
                returns=torch.from_numpy(returns),
            )
            for rollout, before, advantage, (_, returns) in zip(
                rollouts, forward, advantages, estimates, strict=True
            )
        ]
        targets = torch.cat([item.returns for item in experience])
        errors = targets - torch.cat([item.old_values for item in experience])
        mismatch = torch.cat([before.mismatch for before in forward])
        return experience, {
            "mismatch_max": float(mismatch.max()),
            "mismatch_mean": float(mismatch.mean()),
            "critic_explained_variance": 1.0 - float(errors.var() / targets.var().clamp_min(1e-8)),
        }

    @torch.no_grad()
    def _forward(self, rollouts: Sequence[Rollout]) -> list[Forward]:
        """Logprobs and values before the update, in the order of the rollouts."""
        temperature = self._recipe.rollout.temperature
        served_processed = self._recipe.servers.logprobs_mode == "processed_logprobs"
        samples = [
            torch.tensor(rollout.prompt_ids + rollout.token_ids[: rollout.kept])
            for rollout in rollouts
        ]
        results: dict[int, Forward] = {}
        self.actor.eval()
        self.critic.eval()
        for indices, tokens in self._micro_batches(samples):
            logits = self._logits(tokens)
            raw = token_logprobs(logits, tokens[:, 1:]).cpu()
            sampled = token_logprobs(logits / temperature, tokens[:, 1:]).cpu()
            values = self.critic(tokens).cpu()
            for row, index in enumerate(indices):
                rollout, length = rollouts[index], len(samples[index])
                window = slice(len(rollout.prompt_ids) - 1, length - 1)
                ours = (sampled if served_processed else raw)[row, window]
                served = torch.from_numpy(rollout.logprobs[: rollout.kept])
                results[index] = Forward(
                    tokens=samples[index],
                    logprobs=sampled[row, window],
                    values=values[row, window],
                    value_after=float(values[row, length - 1]),
                    mismatch=(ours - served).abs().nan_to_num(0.0),
                )
        return [results[index] for index in range(len(rollouts))]

    def _minibatch(self, minibatch: Sequence[Experience]) -> Metrics:
        """One optimizer step of each engine; losses are means over the minibatch's tokens."""
        ppo = self._ppo
        total = sum(item.kept for item in minibatch)
        sums: dict[str, float] = {}
        self.actor.train()
        self.critic.train()
        for indices, tokens in self._micro_batches([item.tokens for item in minibatch]):
            rows = [minibatch[i] for i in indices]
            mask = torch.zeros_like(tokens[:, 1:], dtype=torch.float32)
            columns: dict[str, Tensor] = {
                name: torch.zeros_like(mask)
                for name in ("old_logprobs", "old_values", "advantages", "returns")
            }
            for row, item in enumerate(rows):
                window = slice(item.prompt - 1, len(item.tokens) - 1)
                mask[row, window] = 1.0
                for name, column in columns.items():
                    column[row, window] = getattr(item, name).to(column)

            logits = self._logits(tokens) / self._recipe.rollout.temperature
            policy = policy_loss(
                token_logprobs(logits, tokens[:, 1:]),
                columns["old_logprobs"],
                columns["advantages"],
                ppo.clip_low,
                ppo.clip_high,
            )
            spread = entropy(logits)
            loss = ((policy.loss - ppo.entropy_bonus * spread) * mask).sum() / total
            self.actor.backward(loss)

            values = self.critic(tokens)[:, :-1]
            errors = value_loss(values, columns["old_values"], columns["returns"], ppo.value_clip)
            critic_loss = (errors * mask).sum() / total
            self.critic.backward(critic_loss)

            for name, per_token in {
                "policy_loss": policy.loss,
                "entropy": spread,
                "clip_share": policy.clipped,
                "kl": policy.kl,
                "critic_loss": errors,
            }.items():
                share = float((per_token.detach() * mask).sum()) / total
                sums[name] = sums.get(name, 0.0) + share
        self.actor.step()
        self.critic.step()
        norm = self.actor.get_global_grad_norm()
        sums["grad_norm"] = math.nan if norm is None else float(norm)
        return sums

    # -- pieces --------------------------------------------------------------------------------

    def _logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits at each position but the last: [batch, time - 1, vocabulary]."""
        return self.actor(input_ids=tokens, use_cache=False).logits[:, :-1].float()

    def _micro_batches(self, samples: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
        """Indices and right-padded tokens; rows of like length together, within the token budget.

        Padding on the right needs no attention mask in a causal model: no real token sees it.
        """
        order = sorted(range(len(samples)), key=lambda i: -len(samples[i]))
        while order:
            longest = len(samples[order[0]])
            rows = max(1, self._ppo.micro_batch_tokens // longest)
            indices, order = order[:rows], order[rows:]
            yield (
                indices,
                nn.utils.rnn.pad_sequence([samples[i] for i in indices], batch_first=True).to(
                    self.actor.device
                ),
            )

    # -- what others need of the models --------------------------------------------------------

    @torch.no_grad()
    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Raw log π of each token given those before it, from the second on: [tokens - 1]."""
        self.actor.eval()
        tokens = torch.tensor([list(token_ids)], device=self.actor.device)
        return token_logprobs(self._logits(tokens), tokens[:, 1:])[0].tolist()

    def save_models(self, folder: Path) -> None:
        """Write actor and critic as Hugging Face checkpoints."""
        for name, model in (
            ("actor", self.actor.module),
            ("critic", self.critic.module.classifier),
        ):
            # Under ZeRO-3 the module itself holds no whole tensor.
            weights = {key: tensor.cpu().clone() for key, tensor in gathered(model)}
            model.save_pretrained(folder / name, state_dict=weights)

    def save(self, folder: Path) -> None:
        """Write models and optimizers in DeepSpeed's format."""
        self.actor.save_checkpoint(str(folder / "actor"), tag="state")
        self.critic.save_checkpoint(str(folder / "critic"), tag="state")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        for name, engine in (("actor", self.actor), ("critic", self.critic)):
            state = folder / name / "state"
            # DeepSpeed goes on without a state that is missing, or trips over it later.
            if not state.is_dir() or not engine.load_checkpoint(str(state.parent), tag="state")[0]:
                raise FileNotFoundError(f"no DeepSpeed state in {state}")

    @property
    def rng_state(self) -> Any:
        return self._rng.bit_generator.state

    @rng_state.setter
    def rng_state(self, state: Any) -> None:
        self._rng.bit_generator.state = state


def _keep_grad_norm(engine: Any) -> None:
    """Have `get_global_grad_norm` answer without ZeRO too: there DeepSpeed clips and forgets."""
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip() -> None:
        engine._global_grad_norm = clip_grad_norm_(
            parameters=engine.module.parameters(),
            max_norm=engine.gradient_clipping(),
            mpu=engine.mpu,
        )

    engine.clip_fp32_gradients = clip


def _engine_config(recipe: Recipe, learning_rate: float) -> dict[str, Any]:
    ppo = recipe.ppo
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        # Minibatches hold as many micro-batches as their tokens need: reduction and the optimizer
        # step happen in step(), however many backward() came before.
        "managed_gradient_accumulation": False,
        "gradient_clipping": ppo.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": learning_rate,
                "weight_decay": ppo.weight_decay,
                "torch_adam": True,
            },
        },
        "zero_optimization": {"stage": recipe.deepspeed.zero_stage},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "steps_per_print": 2**31,
    }
    if ppo.lr_warmup_steps:
        config["scheduler"] = {
            "type": "WarmupLR",
            "params": {
                "warmup_min_lr": 0.0,
                "warmup_max_lr": learning_rate,
                "warmup_num_steps": ppo.lr_warmup_steps,
                "warmup_type": "linear",
            },
        }
    return config | recipe.deepspeed.extra


def _deepspeed() -> Any:
    """Import DeepSpeed with a process group: its launcher's, or one of this process alone."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    if not torch.distributed.is_initialized():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in alone.items():
            os.environ.setdefault(name, value)
        if "MASTER_PORT" not in os.environ:
            from espo_gateway.supervisor import free_port

            os.environ["MASTER_PORT"] = str(free_port())
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    return deepspeed
