"""PPO updates of actor and critic, each a DeepSpeed engine of its own: `PpoTrainer.update`.

Knows rollouts with rewards; knows nothing of servers, gates or tasks. Started as several processes,
every rank makes a `PpoTrainer`; rank 0 uses it as if it were alone, the others follow (`ranks.py`).
Its methods may be called from any thread, one at a time.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from espo_gateway.files import written_whole
from espo_rl.config import Recipe
from espo_rl.ppo.adapters import adapt, save_adapter, without_adapters
from espo_rl.ppo.critic import Critic, load_classifier
from espo_rl.ppo.engine import Engine, frozen_engine, import_deepspeed
from espo_rl.ppo.experience import Metrics, ModelOutputs, compare, prepare, unusable
from espo_rl.ppo.kernels import fuse
from espo_rl.ppo.losses import (
    Statistics,
    actor_loss,
    aggregation_weights,
    importance_weights,
    token_logprobs,
    value_loss,
)
from espo_rl.ppo.parameters import TensorSpec, adapters, gathered, tensor_specs
from espo_rl.ppo.policy import Policy
from espo_rl.ppo.ranks import Ranks, collective
from espo_rl.ppo.samples import MicroBatch, Sample, micro_batches
from espo_rl.ppo.value_head import ValueHead
from espo_rl.types import Rollout

logger = logging.getLogger(__name__)

#: mean KL(server‖trainer) a token above which something is wrong, not merely rounded
MISMATCH_WARNING = 0.05

#: updates in a row with a gradient that is not finite, after which the run cannot be right
FAULTY_UPDATES = 3

ModelName = Literal["actor", "critic"]
T = TypeVar("T")


class UpdateError(RuntimeError):
    """Update after update has a gradient that is not finite; the message says what else is not."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: this rank's share of the means to report; why it was not taken, if so."""

    report: Metrics
    fault: str


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
        self._faulty = 0  # updates in a row with a step that was not taken
        model, rate = recipe.model, recipe.ppo.learning_rate
        dtype = getattr(torch, model.dtype)
        torch.manual_seed(recipe.run.seed)

        actor = AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype)
        if model.gradient_checkpointing:
            actor.gradient_checkpointing_enable()
        temperature = recipe.rollout.temperature
        self._policies = {"actor": Policy(actor, temperature)}
        self._value_head: ValueHead | None = None
        if (head := recipe.stopping.head) is not None:
            self._value_head = ValueHead(actor, self._policies["actor"], head)
        models = [actor]
        adapt(actor, model)
        self.actor = Engine(recipe, actor, rate)

        self.critic: Engine | None = None
        if recipe.needs_critic:
            classifier = load_classifier(
                model.critic or model.path, fresh=model.critic is None, dtype=dtype
            )
            if model.gradient_checkpointing:
                classifier.gradient_checkpointing_enable()
            adapt(classifier, model)
            models.append(classifier)
            rate = self._ppo.critic_learning_rate or rate
            self.critic = Engine(recipe, Critic(classifier), rate)

        self.reference: Any = None
        if recipe.needs_reference:
            reference = AutoModelForCausalLM.from_pretrained(
                model.reference or model.path, dtype=dtype
            )
            self._policies["reference"] = Policy(reference, temperature)
            models.append(reference)
            self.reference = frozen_engine(recipe, reference, self.actor.device)
        elif self._ppo.kl_coefficient:
            self.reference, self._policies["reference"] = self.actor, self._policies["actor"]
        # Once all are where they train: some of it holds for every model of a kind.
        for one in models:
            fuse(one, model)

    # -- one step ------------------------------------------------------------------------------

    def update(
        self,
        rollouts: Sequence[Rollout],
        baselines: Sequence[NDArray[np.float32]] | None = None,
    ) -> Metrics:
        """One PPO step on scored rollouts: old logprobs and values, advantages, epochs.

        A rollout whose reward is not finite is left out, and a step whose gradient is not finite is
        not taken; both are logged and counted.

        Args:
            rollouts: of every end but ERROR; those with the same `group` answered one prompt.
            baselines: V before each of their tokens that is trained on, where no critic says it.

        Returns:
            what `record.metrics.METRICS` lists.

        Raises:
            ValueError: no rollout has a token to train on.
            UpdateError: in FAULTY_UPDATES updates in a row a step was not taken.
        """
        trained = [rollout for rollout in rollouts if rollout.trained]
        usable = [rollout for rollout in trained if math.isfinite(rollout.reward)]
        valued = dict(zip(map(id, rollouts), baselines or [], strict=False))
        dropped = len(trained) - len(usable)
        if dropped:
            first = next(one for one in trained if not math.isfinite(one.reward))
            logger.warning(
                "%d of %d rollouts have a reward that is not finite, and are left out; the first: "
                "%s for problem %s",
                dropped,
                len(trained),
                first.reward,
                first.problem.id,
            )
        if not usable:
            raise ValueError(
                "no rollout has a token to train on" + (" and a finite reward" if dropped else "")
            )
        version = f"step-{self.updates}"
        samples = [Sample.of(one, valued.get(id(one)), version) for one in usable]
        metrics = self._update(samples)
        metrics["dropped_rewards"] = dropped
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
        trains_actor = self.updates >= ppo.critic_only_steps
        parts = min(ppo.minibatches, len(samples))
        single = trains_actor and self._in_one_pass(parts)
        before = self._forward(samples, actor=not single)
        metrics = prepare(samples, before, ppo)
        said: dict[int, ModelOutputs] | None = {} if single else None
        if trains_actor:
            self.actor.begin(self.updates - ppo.critic_only_steps + 1)
            metrics["learning_rate"] = self.actor.learning_rate
        if self.critic is not None:
            self.critic.begin(self.updates + 1)
            metrics["critic_learning_rate"] = self.critic.learning_rate
        steps: dict[ModelName, list[Step]] = defaultdict(list)
        idle = self._idle(samples) if single else np.zeros(len(samples), dtype=bool)
        others = np.flatnonzero(idle)
        unmoved = self._forward([samples[i] for i in others], actor=True) if others.size else []
        for _ in range(ppo.epochs):
            for chosen in np.array_split(self._rng.permutation(len(samples)), parts):
                self._weigh([samples[i] for i in chosen])
                learning = chosen[~idle[chosen]]
                of_minibatch = [samples[i] for i in learning]
                for name, step in self._minibatch(of_minibatch, trains_actor, said):
                    steps[name].append(step)
        if said is not None:
            now = [*self._everyones(said), *unmoved]
            for i, of_sample in zip([*learning, *others], now, strict=True):
                of_sample.reference, of_sample.values = before[i].reference, before[i].values
                before[i] = of_sample
            metrics |= compare(samples, before, ppo)[1]
        self.updates += 1
        faults = [step.fault for of in steps.values() for step in of if step.fault]
        metrics["skipped_steps"] = len(faults)
        self._judge(faults)
        sums: Metrics = defaultdict(float)
        for of in steps.values():
            counted = [step for step in of if not step.fault] or of
            for step in counted:
                for metric, value in step.report.items():
                    sums[metric] += value / len(counted)
        shares = self.ranks.gather(sums)
        return metrics | {name: sum(share[name] for share in shares) for name in sums}

    def _in_one_pass(self, parts: int) -> bool:
        """Whether nothing moves before the actor is trained, nor has to be known of it: then what
        it says in its only pass is what it would have said before."""
        return self._ppo.epochs == parts == 1 and not self._ppo.kl_in_reward

    def _idle(self, samples: Sequence[Sample]) -> NDArray[np.bool_]:
        """Which have no part in the gradient, as all rewards of their group are alike: a forward
        pass without one tells all that there is to report of them."""
        ppo = self._ppo
        idle = np.array([not one.columns["advantages"].any() for one in samples])
        moved_by_more = self.critic is not None or ppo.entropy_bonus or ppo.kl_coefficient
        return np.zeros_like(idle) if moved_by_more or idle.all() else idle

    def _weigh(self, samples: Sequence[Sample]) -> None:
        """Give each token its share of a minibatch: the column `weights`."""
        weights = aggregation_weights([one.kept for one in samples], self._ppo.aggregation)
        for sample, share in zip(samples, weights, strict=True):
            sample.columns["weights"] = torch.full((sample.kept,), share)

    def _judge(self, faults: list[str]) -> None:
        """Say which steps were not taken; end it all when that has become a habit."""
        self._faulty = self._faulty + 1 if faults else 0
        for fault in faults:
            logger.warning("update %d: a step was not taken: %s", self.updates, fault)
        if self._faulty == FAULTY_UPDATES:
            raise UpdateError(
                f"{FAULTY_UPDATES} updates in a row had steps that could not be taken; in the last "
                f"one: {faults[0]}. Lower ppo.learning_rate or ppo.max_grad_norm, and look at the "
                "rewards; what the last checkpoint holds is finite"
            )

    @torch.no_grad()
    def _forward(self, samples: list[Sample], *, actor: bool) -> list[ModelOutputs]:
        """What the models say now, the actor if wanted; every rank asks for its share and knows all
        answers."""
        mine: dict[int, ModelOutputs] = {}
        for batch in self._batches(samples):
            flat = self._said(self._ask_actor(batch, entropy=True)) if actor else {}
            if self.reference is not None:
                adapted = self.reference is self.actor
                with without_adapters(self.actor.module) if adapted else nullcontext():
                    asked = self._policies["reference"](self.reference, batch)
                flat["reference"] = asked.logprobs
            if self.critic is not None:
                flat["values"] = self._values(batch)
            for index, parts in self._by_sample(samples, batch, flat):
                mine[index] = ModelOutputs(**parts)
        return self._everyones(mine)

    def _ask_actor(self, batch: MicroBatch, *, entropy: bool) -> Statistics:
        processed = self._recipe.servers.logprobs_mode == "processed_logprobs"
        raw = not processed and self._recipe.rollout.temperature != 1.0
        return self._policies["actor"](self.actor, batch, entropy=entropy, raw=raw)

    @staticmethod
    def _said(asked: Statistics) -> dict[str, Tensor]:
        """The actor's part of ModelOutputs: what servers report is raw where that was asked for."""
        reported = asked.logprobs if asked.raw is None else asked.raw
        assert asked.entropy is not None
        columns = {"logprobs": asked.logprobs, "reported": reported, "entropy": asked.entropy}
        return {name: column.detach() for name, column in columns.items()}

    @staticmethod
    def _by_sample(
        samples: list[Sample], batch: MicroBatch, flat: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """What is known of each row of a micro-batch, by its sample's number."""
        kept = [samples[i].kept for i in batch.indices]
        columns = {name: column.cpu().split(kept) for name, column in flat.items()}
        for row, index in enumerate(batch.indices):
            # Clones, as a pickled view takes all that it is a view of along.
            yield index, {name: parts[row].clone() for name, parts in columns.items()}

    def _minibatch(
        self, samples: list[Sample], trains_actor: bool, said: dict[int, ModelOutputs] | None
    ) -> Iterator[tuple[ModelName, Step]]:
        """One optimizer step of each engine, with this rank's share of what there is to report.

        samples: with the column `weights`, shares of the whole minibatch.
        said: where the actor has not been asked before, what it says now goes there.
        """
        engines = {
            name: engine
            for name, engine in self._engines.items()
            if trains_actor or name == "critic"
        }
        reports: dict[ModelName, Metrics] = {name: defaultdict(float) for name in engines}
        wrong: dict[ModelName, Counter[str]] = {name: Counter() for name in engines}
        for batch in self._batches(samples):
            weight = batch.columns["weights"]
            for name, engine in engines.items():
                if name == "actor":
                    per_token, report = self._actor_loss(samples, batch, said)
                else:
                    per_token, report = self._critic_loss(batch)
                loss = (per_token * weight).sum()
                # Weights are shares of the whole minibatch, but DeepSpeed takes the mean over the
                # ranks, who are to know by it of a loss that is not finite on one of them.
                factor = torch.where(loss.isfinite(), self.ranks.size, torch.nan)
                engine.backward(loss * factor)
                for metric, values in report.items():
                    reports[name][metric] += float((values.detach() * weight).sum())
                if not loss.isfinite():
                    wrong[name] += unusable({**batch.columns, **report}) or Counter(["loss"])
        for name, engine in engines.items():
            taken = engine.step()
            norm = "grad_norm" if name == "actor" else "critic_grad_norm"
            reports[name][norm] = engine.grad_norm / self.ranks.size
            yield name, Step(reports[name], "" if taken else self._fault(name, wrong[name]))

    def _actor_loss(
        self, samples: list[Sample], batch: MicroBatch, said: dict[int, ModelOutputs] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the actor minimises and what there is to report, each [kept tokens]."""
        ppo, columns = self._ppo, batch.columns
        wants_entropy = bool(ppo.entropy_bonus) or said is not None
        asked = self._ask_actor(batch, entropy=wants_entropy)
        if said is not None:
            now = self._said(asked)
            said |= {i: ModelOutputs(**of) for i, of in self._by_sample(samples, batch, now)}
            old = columns["old_logprobs"] = now["logprobs"]
            if ppo.importance_cap is not None:
                served, cap = columns["served_logprobs"], ppo.importance_cap
                columns["importance"], _ = importance_weights(old, served, cap)
        return actor_loss(asked, columns, ppo)

    def _values(self, batch: MicroBatch, *, after: bool = False) -> Tensor:
        """V of the state before each kept token, or of the one after it, [kept tokens]."""
        assert self.critic is not None
        view = batch.view(packs=self.critic.module.packs)
        values: Tensor = self.critic(**view.inputs)
        return values.flatten().index_select(0, view.kept if after else view.before)

    def _critic_loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of the critic."""
        values = self._values(batch)
        old, returns = batch.columns["old_values"], batch.columns["returns"]
        loss = value_loss(values, old, returns, self._ppo.value_clip)
        return loss, {"critic_loss": loss}

    def _fault(self, name: ModelName, wrong: Counter[str]) -> str:
        total = sum(self.ranks.gather(wrong), Counter[str]())
        where = ", ".join(f"{column} of {tokens} token(s)" for column, tokens in total.items())
        return f"of the {name}, not finite: " + (where or "the gradient, though the loss is")

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
        tokens = torch.tensor([list(token_ids)], device=self.actor.device)
        logits = self.actor(input_ids=tokens, use_cache=False).logits[:, :-1]
        return token_logprobs(logits, tokens[:, 1:])[0].tolist()

    @collective
    @torch.no_grad()
    def response_logits(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        """Raw logits before each token of a response, on the CPU: [tokens, vocabulary]."""
        tokens = torch.tensor([[*prompt, *response]], device=self.actor.device)
        logits = self.actor(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
        return logits.float().cpu()

    @collective
    @torch.no_grad()
    def values(self, token_ids: Sequence[int]) -> list[float]:
        """V of the state after each token: [tokens]."""
        if self.critic is None:
            raise ValueError("this recipe trains no critic")
        return self.critic(torch.tensor([list(token_ids)], device=self.critic.device))[0].tolist()

    def critic_values(self, rollouts: Sequence[Rollout]) -> list[NDArray[np.float64]]:
        """V of each token as servers tell it now, past a cut too, each [tokens]: the critic's has
        read the token, and a head's is of the state that it was sampled in."""
        full = [replace(rollout, kept=len(rollout.token_ids)) for rollout in rollouts]
        return self._critic_values([Sample.of(rollout) for rollout in full])

    @collective
    @torch.no_grad()
    def _critic_values(self, samples: list[Sample]) -> list[NDArray[np.float64]]:
        mine: dict[int, NDArray[np.float64]] = {}
        for batch in self._batches(samples):
            if self._value_head is None:
                values = self._values(batch, after=True)
            else:
                values = self._value_head(self.actor, batch)
            flat = {"values": values.double()}
            for index, parts in self._by_sample(samples, batch, flat):
                mine[index] = parts["values"].numpy()
        return self._everyones(mine)

    @collective
    def save_models(self, folder: Path) -> None:
        """Write actor and critic as Hugging Face checkpoints, and adapters by themselves too.

        Raises:
            OSError: one cannot be written; what was there before is there still.
        """
        for name in self._engines:
            model = self.module(name)
            weights, factors = self._whole(gathered(model)), self._whole(adapters(model))
            if self.ranks.rank:
                continue
            with written_whole(folder / name) as scratch:
                try:
                    model.save_pretrained(scratch, state_dict=weights)
                    if factors:
                        save_adapter(scratch / "adapter", factors, self._recipe.model)
                except SafetensorError as error:  # of a full disk, too
                    raise OSError(str(error)) from error

    def _whole(self, parameters: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copies of parameters, on rank 0 only: under ZeRO-3 the module holds no whole one."""
        return {name: tensor.cpu().clone() for name, tensor in parameters if self.ranks.rank == 0}

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
