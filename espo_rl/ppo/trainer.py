"""PPO updates of actor and critic, each a DeepSpeed engine of its own: `PpoTrainer.update`.

Knows rollouts with rewards; knows nothing of servers, gates or tasks. Started as several processes,
every rank makes a `PpoTrainer`; rank 0 uses it as if it were alone, the others follow (`ranks.py`).
Its methods may be called from any thread, one at a time.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from espo_rl.config import Recipe
from espo_rl.ppo.critic import Critic, load_classifier
from espo_rl.ppo.engine import Engine, frozen_engine, import_deepspeed
from espo_rl.ppo.experience import Metrics, ModelOutputs, prepare
from espo_rl.ppo.losses import actor_loss, aggregation_weights, entropy, token_logprobs, value_loss
from espo_rl.ppo.parameters import TensorSpec, gathered, tensor_specs
from espo_rl.ppo.ranks import Ranks, collective
from espo_rl.ppo.samples import MicroBatch, Sample, micro_batches
from espo_rl.types import Rollout

logger = logging.getLogger(__name__)

#: mean KL(server‖trainer) a token above which something is wrong, not merely rounded
MISMATCH_WARNING = 0.05

ModelName = Literal["actor", "critic"]
T = TypeVar("T")


class PpoTrainer:
    """Actor and critic with their optimizers, and a frozen reference where a KL term needs one.

    Raises:
        OSError: a model cannot be loaded; the message is transformers' own.
    """

    def __init__(self, recipe: Recipe) -> None:
        import_deepspeed()
        from transformers import AutoModelForCausalLM

        self._recipe, self._ppo = recipe, recipe.ppo
        self.ranks = Ranks()
        self._rng = np.random.default_rng(recipe.run.seed)
        self.updates = 0  # done so far; the weights' version
        model, rate = recipe.model, recipe.ppo.learning_rate
        dtype = getattr(torch, model.dtype)
        torch.manual_seed(recipe.run.seed)

        actor = AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype)
        if model.gradient_checkpointing:
            actor.gradient_checkpointing_enable()
        self.actor = Engine(recipe, actor, rate)

        self.critic: Engine | None = None
        if recipe.needs_critic:
            classifier = load_classifier(
                model.critic or model.path, fresh=model.critic is None, dtype=dtype
            )
            if model.gradient_checkpointing:
                classifier.gradient_checkpointing_enable()
            rate = self._ppo.critic_learning_rate or rate
            self.critic = Engine(recipe, Critic(classifier), rate)

        self.reference: Any = None
        if self._ppo.kl_coefficient:
            reference = AutoModelForCausalLM.from_pretrained(
                model.reference or model.path, dtype=dtype
            )
            self.reference = frozen_engine(recipe, reference, self.actor.device)

    # -- one step ------------------------------------------------------------------------------

    def update(self, rollouts: Sequence[Rollout]) -> Metrics:
        """One PPO step on scored rollouts: old logprobs and values, advantages, epochs.

        Args:
            rollouts: of every end but ERROR; those with the same `group` answered one prompt.

        Returns:
            what `experience.METRICS` lists.

        Raises:
            ValueError: no rollout has a token to train on.
        """
        usable = [rollout for rollout in rollouts if rollout.trained]
        if not usable:
            raise ValueError("no rollout has a token to train on")
        metrics = self._update([Sample.of(rollout) for rollout in usable])
        worst = max(metrics["mismatch_kl"], metrics["mismatch_k3"])
        if worst > MISMATCH_WARNING:
            logger.warning(
                "the server samples from another policy than the trainer computes: KL %.3g a token "
                "(largest difference %.3g) is above %g; check dtypes, servers.logprobs_mode, and "
                "whether the weights arrive",
                worst,
                metrics["mismatch_max"],
                MISMATCH_WARNING,
            )
        return metrics

    @collective
    def _update(self, samples: list[Sample]) -> Metrics:
        ppo = self._ppo
        metrics = prepare(samples, self._forward(samples), ppo)
        trains_actor = self.updates >= ppo.critic_only_steps
        if trains_actor:
            self.actor.begin(self.updates - ppo.critic_only_steps + 1)
            metrics["learning_rate"] = self.actor.learning_rate
        if self.critic is not None:
            self.critic.begin(self.updates + 1)
            metrics["critic_learning_rate"] = self.critic.learning_rate
        sums: Metrics = defaultdict(float)
        parts = min(ppo.minibatches, len(samples))
        for _ in range(ppo.epochs):
            for chosen in np.array_split(self._rng.permutation(len(samples)), parts):
                report = self._minibatch([samples[i] for i in chosen], trains_actor)
                for name, value in report.items():
                    sums[name] += value / (ppo.epochs * parts)
        self.updates += 1
        shares = self.ranks.gather(sums)
        return metrics | {name: sum(share[name] for share in shares) for name in sums}

    @torch.no_grad()
    def _forward(self, samples: list[Sample]) -> list[ModelOutputs]:
        """What the models say now; every rank asks for its share and knows all answers."""
        processed = self._recipe.servers.logprobs_mode == "processed_logprobs"
        mine: dict[int, ModelOutputs] = {}
        self._train(False)
        for batch in self._batches(samples):
            raw = self._logits(self.actor, batch)
            logits = raw / self._recipe.rollout.temperature
            flat = {
                "logprobs": token_logprobs(logits, batch.targets),
                "reported": token_logprobs(logits if processed else raw, batch.targets),
                "entropy": entropy(logits),
            }
            if self.reference is not None:
                reference = self._logits(self.reference, batch)
                reference /= self._recipe.rollout.temperature
                flat["reference"] = token_logprobs(reference, batch.targets)
            values = None
            if self.critic is not None:
                values = self.critic(batch.tokens).cpu()
            kept = [samples[i].kept for i in batch.indices]
            rows = zip(*(column.cpu().split(kept) for column in flat.values()), strict=True)
            for row, (index, parts) in enumerate(zip(batch.indices, rows, strict=True)):
                # Clones, as a pickled view takes all that it is a view of along.
                mine[index] = ModelOutputs(
                    **{k: v.clone() for k, v in zip(flat, parts, strict=True)}
                )
                if values is not None:
                    sample = samples[index]
                    states = slice(sample.prompt - 1, len(sample.tokens) - 1)
                    mine[index].values = values[row, states].clone()
        return self._everyones(mine)

    def _minibatch(self, samples: list[Sample], trains_actor: bool) -> Metrics:
        """One optimizer step of each engine; this rank's share of what there is to report."""
        ppo, ranks = self._ppo, self.ranks.size
        weights = aggregation_weights([sample.kept for sample in samples], ppo.aggregation)
        for sample, share in zip(samples, weights, strict=True):
            sample.columns["weights"] = torch.full((sample.kept,), share)
        sums: Metrics = defaultdict(float)
        self._train(True)
        for batch in self._batches(samples):
            weight = batch.columns["weights"]
            reports: dict[str, Tensor] = {}
            # Weights are shares of the whole minibatch, but DeepSpeed takes the mean over ranks.
            if trains_actor:
                logits = self._logits(self.actor, batch) / self._recipe.rollout.temperature
                loss, reports = actor_loss(logits, batch.targets, batch.columns, ppo)
                self.actor.backward((loss * weight).sum() * ranks)
            if self.critic is not None:
                values = self.critic(batch.tokens)[:, :-1][batch.response]
                old, returns = batch.columns["old_values"], batch.columns["returns"]
                reports["critic_loss"] = value_loss(values, old, returns, ppo.value_clip)
                self.critic.backward((reports["critic_loss"] * weight).sum() * ranks)
            for name, per_token in reports.items():
                sums[name] += float((per_token.detach() * weight).sum())
        if trains_actor:
            self.actor.step()
            sums["grad_norm"] = self.actor.grad_norm / ranks
        if self.critic is not None:
            self.critic.step()
            sums["critic_grad_norm"] = self.critic.grad_norm / ranks
        return sums

    # -- pieces --------------------------------------------------------------------------------

    def _everyones(self, mine: dict[int, T]) -> list[T]:
        """What all ranks found of their samples, in the samples' order."""
        found = {index: one for share in self.ranks.gather(mine) for index, one in share.items()}
        return [found[index] for index in sorted(found)]

    def _batches(self, samples: list[Sample]) -> Iterator[MicroBatch]:
        return micro_batches(
            samples,
            self._ppo.micro_batch_tokens,
            rank=self.ranks.rank,
            ranks=self.ranks.size,
            device=self.actor.device,
        )

    @staticmethod
    def _logits(model: Any, batch: MicroBatch) -> Tensor:
        """Raw logits from which the kept tokens were drawn, [kept tokens of all rows, vocabulary].

        Only these are turned into float32: logits are the largest tensor of a step.
        """
        logits = model(input_ids=batch.tokens, use_cache=False).logits
        return logits[:, :-1][batch.response].float()

    def _train(self, mode: bool) -> None:
        for engine in self._engines.values():
            engine.train(mode)

    @property
    def _engines(self) -> dict[ModelName, Engine]:
        engines: dict[ModelName, Engine | None] = {"actor": self.actor, "critic": self.critic}
        return {name: engine for name, engine in engines.items() if engine is not None}

    # -- what others need of the models --------------------------------------------------------

    def module(self, name: ModelName) -> Any:
        """The Hugging Face model: `...ForCausalLM` or `...ForSequenceClassification`."""
        if name == "actor":
            return self.actor.module
        if self.critic is None:
            raise ValueError("this recipe trains no critic")
        return self.critic.module.classifier

    def specs(self, name: ModelName) -> list[TensorSpec]:
        """What `weights` will give."""
        return tensor_specs(self.module(name))

    def weights(self, name: ModelName) -> Iterator[tuple[str, Tensor]]:
        """A model's parameters one by one, by their Hugging Face names, each whole while in use."""
        with self.ranks.command("_gather", name):
            parameters = gathered(self.module(name))
            try:
                for parameter in parameters:  # noqa: UP028, which would close them too early
                    yield parameter
            finally:
                deque(parameters, maxlen=0)  # the other ranks go through all of them

    def _gather(self, name: ModelName) -> None:
        deque(gathered(self.module(name)), maxlen=0)

    @collective
    @torch.no_grad()
    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Raw log π of each token given those before it, from the second on: [tokens - 1]."""
        self.actor.train(False)
        tokens = torch.tensor([list(token_ids)], device=self.actor.device)
        logits = self.actor(input_ids=tokens, use_cache=False).logits[:, :-1]
        return token_logprobs(logits, tokens[:, 1:])[0].tolist()

    @collective
    @torch.no_grad()
    def response_logits(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        """Raw logits before each token of a response, on the CPU: [tokens, vocabulary]."""
        self.actor.train(False)
        tokens = torch.tensor([[*prompt, *response]], device=self.actor.device)
        logits = self.actor(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
        return logits.float().cpu()

    @collective
    @torch.no_grad()
    def values(self, token_ids: Sequence[int]) -> list[float]:
        """V of the state after each token: [tokens]."""
        if self.critic is None:
            raise ValueError("this recipe trains no critic")
        self.critic.train(False)
        return self.critic(torch.tensor([list(token_ids)], device=self.critic.device))[0].tolist()

    def critic_values(self, rollouts: Sequence[Rollout]) -> list[NDArray[np.float64]]:
        """What the critic's server says now: V after each token, past a cut too, each [tokens]."""
        full = [replace(rollout, kept=len(rollout.token_ids)) for rollout in rollouts]
        return self._critic_values([Sample.of(rollout) for rollout in full])

    @collective
    @torch.no_grad()
    def _critic_values(self, samples: list[Sample]) -> list[NDArray[np.float64]]:
        assert self.critic is not None
        self.critic.train(False)
        mine: dict[int, NDArray[np.float64]] = {}
        for batch in self._batches(samples):
            values = self.critic(batch.tokens).double().cpu().numpy()
            for row, index in enumerate(batch.indices):
                sample = samples[index]
                mine[index] = values[row, sample.prompt : len(sample.tokens)].copy()
        return self._everyones(mine)

    @collective
    def save_models(self, folder: Path) -> None:
        """Write actor and critic as Hugging Face checkpoints."""
        for name in self._engines:
            model = self.module(name)
            weights = self._whole(model)
            if self.ranks.rank == 0:
                model.save_pretrained(folder / name, state_dict=weights)

    def _whole(self, model: nn.Module) -> dict[str, Tensor]:
        """Copies of all parameters, on rank 0 only: under ZeRO-3 the module holds no whole one."""
        return {
            name: tensor.cpu().clone() for name, tensor in gathered(model) if self.ranks.rank == 0
        }

    @collective
    def save(self, folder: Path) -> None:
        """Write all that the next update depends on, in DeepSpeed's format, for every rank."""
        state = {"rng": self._rng.bit_generator.state, "updates": self.updates}
        for name, engine in self._engines.items():
            engine.save(folder / name, state)

    @collective
    def load(self, folder: Path) -> None:
        """Read what `save` wrote, with the same number of ranks.

        Raises:
            FileNotFoundError: a model's state is missing.
        """
        for name, engine in self._engines.items():
            state = engine.load(folder / name)
        self._rng.bit_generator.state = state["rng"]
        self.updates = state["updates"]

    def close(self) -> None:
        """Let the other ranks go."""
        self.ranks.stop()
