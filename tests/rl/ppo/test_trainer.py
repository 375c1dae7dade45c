"""PPO updates by real DeepSpeed engines against a plain torch step written out here."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from espo_rl.checkpoints import CheckpointError, CheckpointStore
from espo_rl.config import Ppo, Recipe
from espo_rl.ppo import trainer as ppo_trainer
from espo_rl.ppo.experience import Metrics, ModelOutputs, prepare
from espo_rl.ppo.losses import actor_loss, aggregation_weights
from espo_rl.ppo.parameters import gathered
from espo_rl.ppo.samples import Sample
from espo_rl.ppo.trainer import PpoTrainer
from espo_rl.record.metrics import METRICS
from espo_rl.servers.weight_files import write_safetensors
from espo_rl.types import EndReason, Rollout
from tests.helpers.trainer import (
    LEARNING_RATE,
    PPO,
    Paths,
    assert_same_update,
    make_models,
    make_rollouts,
    trainer,
    weights_of,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return make_models(tmp_path_factory.mktemp("models"))


def experience(
    ours: PpoTrainer, rollouts: Sequence[Rollout]
) -> tuple[Sequence[Sample], Sequence[ModelOutputs]]:
    """The samples that an update learns from, and what the models said of them before it."""
    seen: list[tuple[Sequence[Sample], Sequence[ModelOutputs]]] = []

    def listening(samples: Sequence[Sample], before: Sequence[ModelOutputs], ppo: Ppo) -> Metrics:
        seen.append((samples, before))
        return prepare(samples, before, ppo)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_trainer, "prepare", listening)
        ours.update(rollouts)
    (once,) = seen
    return once


def parameters(engine: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gathered(engine.module)}


# -- the reference ---------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def reference(paths: Paths) -> Reference:
    """After one update."""
    made = Reference(paths)
    made.update(make_rollouts())
    return made


# -- one step --------------------------------------------------------------------------------------


def test_an_update_equals_the_reference(paths: Paths, reference: Reference) -> None:
    ours = trainer(paths)
    before = weights_of(ours)
    metrics = ours.update(make_rollouts())
    after = weights_of(ours)
    assert_same_update(after, reference.weights())
    moved = [float((after[name] - value).abs().max()) for name, value in before.items()]
    assert min(moved) > LEARNING_RATE  # two optimizer steps reached every tensor
    assert metrics["clip_share"] > 0.1  # so the clip was in play
    assert metrics["grad_norm"] == pytest.approx(np.mean(reference.norms["actor"]), rel=1e-3)
    norms = reference.norms["critic"]
    assert metrics["critic_grad_norm"] == pytest.approx(np.mean(norms), rel=1e-3)
    assert min(reference.norms["actor"]) > PPO["max_grad_norm"]  # and so was the gradients'
    assert metrics["learning_rate"] == LEARNING_RATE


@pytest.mark.parametrize(
    "settings",
    [
        {
            "aggregation": "sequence-mean",
            "kl_coefficient": 0.2,
            "kl_place": "loss",
            "kl_estimator": "k3",
            "importance_cap": 1.3,
        },
        {"kl_coefficient": 0.2, "kl_place": "reward", "kl_estimator": "k1"},
    ],
)
def test_an_update_with_all_terms_equals_the_reference(
    paths: Paths, reference: Reference, settings: dict[str, Any]
) -> None:
    ours, expected = trainer(paths, **settings), Reference(paths, **settings)
    metrics = ours.update(make_rollouts())
    expected.update(make_rollouts())
    assert_same_update(weights_of(ours), expected.weights())
    assert metrics["kl_reference"] > 0.1
    if "importance_cap" in settings:
        assert 0.1 < metrics["importance_capped"] < 0.9
    with pytest.raises(AssertionError, match="weights differ"):  # so the terms do something
        assert_same_update(weights_of(ours), reference.weights())


def test_without_its_own_checkpoint_the_reference_is_the_initial_policy(paths: Paths) -> None:
    ours = trainer(replace(paths, reference=None), kl_coefficient=0.1)
    assert ours.update(make_rollouts())["kl_reference"] == pytest.approx(0.0, abs=1e-6)
    assert ours.update(make_rollouts())["kl_reference"] > 1e-4  # and stays where it was


def test_every_metric_is_documented(paths: Paths) -> None:
    ours = trainer(paths, kl_coefficient=0.1, importance_cap=2.0)
    documented = {name for name in METRICS if name.startswith("ppo/")}
    assert {f"ppo/{name}" for name in ours.update(make_rollouts())} == documented


def test_where_all_outcomes_are_the_same_none_of_their_variance_is_explained(paths: Paths) -> None:
    rollouts = make_rollouts()
    for rollout in rollouts:
        rollout.reward = -1.0
    ours = trainer(paths, gamma=1.0, lam=1.0)
    assert math.isnan(ours.update(rollouts)["critic_explained_variance"])


def test_group_advantages_train_no_critic(paths: Paths) -> None:
    ours = trainer(paths, advantage="group")
    assert ours.critic is None
    before = weights_of(ours)
    metrics = ours.update(make_rollouts())
    assert not any("critic" in name for name in metrics)
    after = weights_of(ours)
    assert all(float((after[name] - value).abs().max()) > 0 for name, value in before.items())
    with pytest.raises(ValueError, match="no critic"):
        ours.values([4, 5, 6])


def test_the_actor_stands_still_while_the_critic_starts(paths: Paths) -> None:
    ours = trainer(paths, critic_only_steps=1)
    states = [weights_of(ours)]
    for _ in range(2):
        metrics = ours.update(make_rollouts())
        states.append(weights_of(ours))
        assert ("policy_loss" in metrics) == (len(states) == 3)
        assert metrics["critic_loss"] > 0
    for name in states[0]:
        first, second = (float((b[name] - a[name]).abs().max()) for a, b in pairwise(states))
        assert (first > 0, second > 0) == (name.startswith("critic"), True), name


def test_an_update_without_tokens_is_refused(paths: Paths) -> None:
    with pytest.raises(ValueError, match="no rollout has a token"):
        trainer(paths).update([replace(make_rollouts()[0], kept=0)])


async def test_an_update_in_another_thread_is_the_same(paths: Paths, reference: Reference) -> None:
    """The loop stays free meanwhile, and calls of two threads do not meet."""
    ours = trainer(paths)
    update = asyncio.create_task(asyncio.to_thread(ours.update, make_rollouts()))
    turns = 0
    while not update.done():
        await asyncio.sleep(0)
        turns += 1
    assert (await update)["critic_loss"] > 0
    assert turns > 10
    assert_same_update(weights_of(ours), reference.weights())


@pytest.mark.parametrize("budget", [1, 40, 70])
def test_micro_batches_change_nothing(
    paths: Paths, reference: Reference, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at a time, a few, and all that fit: gradients add up to the same step."""
    ours = trainer(paths, micro_batch_tokens=budget)
    losses = Mock(wraps=actor_loss)
    monkeypatch.setattr(ppo_trainer, "actor_loss", losses)
    ours.update(make_rollouts())
    assert losses.call_count == PPO["epochs"] * {1: 5, 40: 3, 70: 2}[budget]
    assert_same_update(weights_of(ours), reference.weights())


def test_minibatches_are_steps_of_their_own(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rollout is in exactly one minibatch of an epoch; their mean is over their own tokens."""
    ours = trainer(paths, minibatches=2, epochs=3)
    weights = Mock(wraps=aggregation_weights)
    monkeypatch.setattr(ppo_trainer, "aggregation_weights", weights)
    rollouts = make_rollouts()
    ours.update(rollouts)
    seen = [call.args[0] for call in weights.call_args_list]
    assert [len(rows) for rows in seen] == [3, 2] * 3
    for epoch in range(0, 6, 2):
        assert sorted(seen[epoch] + seen[epoch + 1]) == sorted(r.kept for r in rollouts)
    assert len({tuple(sorted(rows)) for rows in seen[::2]}) > 1  # shuffled anew


@pytest.mark.parametrize("index", range(5))
def test_padding_never_leaks(paths: Paths, index: int) -> None:
    """What is said of a rollout in a padded batch is what is said of it alone."""
    rollouts = make_rollouts()
    _, (alone,) = experience(trainer(paths), [rollouts[index]])
    _, batch = experience(trainer(paths), rollouts)
    padded = batch[index]
    assert len(padded.logprobs) == rollouts[index].kept
    torch.testing.assert_close(padded.logprobs, alone.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.values, alone.values, atol=1e-5, rtol=0)


def test_the_shortest_rollout_keeps_its_reward(paths: Paths) -> None:
    """One token beside one of twenty: its reward is all that its return is made of."""
    ours, rollouts = trainer(paths, whiten=False, gamma=1.0, lam=1.0), make_rollouts()
    samples, _ = experience(ours, rollouts)
    shortest = samples[4].columns
    assert shortest["returns"].tolist() == pytest.approx([1.0], abs=1e-5)
    expected = 1.0 - float(shortest["old_values"][0])
    assert float(shortest["advantages"][0]) == pytest.approx(expected, abs=1e-5)
    # With γ = λ = 1 the return of every token is the reward.
    for sample, rollout in zip(samples, rollouts, strict=True):
        found = sample.columns["returns"].tolist()
        assert found == pytest.approx([rollout.reward] * rollout.kept, abs=1e-4)


@pytest.mark.parametrize("end", list(EndReason)[:3])
def test_no_end_bootstraps(paths: Paths, end: EndReason) -> None:
    ours = trainer(paths, whiten=False, gamma=1.0, lam=1.0)
    samples, _ = experience(
        ours, [replace(rollout, end=end, reward=0.25) for rollout in make_rollouts()]
    )
    afters = [ours.values(sample.tokens.tolist())[-1] for sample in samples]
    assert min(map(abs, afters)) > 1e-3  # a bootstrap would show
    for sample in samples:
        found = sample.columns["returns"].tolist()
        assert found == pytest.approx([0.25] * sample.kept, abs=1e-4)


def test_what_came_after_a_cut_is_not_trained_on(paths: Paths) -> None:
    """An audited rollout's tail must not matter: same update with another tail."""
    rollouts, others = make_rollouts(), make_rollouts()
    others[3].token_ids[9:] = [5] * 11
    updated = []
    for batch in (rollouts, others):
        ours = trainer(paths)
        ours.update(batch)
        updated.append(weights_of(ours))
    for name, value in updated[0].items():
        assert torch.equal(value, updated[1][name])


def test_mismatch_is_between_the_servers_logprobs_and_ours(
    paths: Paths, caplog: pytest.LogCaptureFixture
) -> None:
    ours, rollouts = trainer(paths, epochs=1, learning_rate=1e-9), make_rollouts()
    for rollout in rollouts:
        ids = rollout.prompt_ids + rollout.token_ids
        # Raw, as the server sends them by default, though training is at temperature 0.7.
        rollout.logprobs = np.array(ours.prompt_logprobs(ids)[len(rollout.prompt_ids) - 1 :])
    rollouts[0].logprobs[3] = math.nan  # a server may leave one out
    metrics = ours.update(rollouts)
    assert metrics["mismatch_max"] < 1e-5
    assert abs(metrics["mismatch_kl"]) < 1e-5
    assert not caplog.records
    rollouts[1].logprobs[2] += 4.5
    metrics = ours.update(rollouts)
    assert metrics["mismatch_max"] == pytest.approx(4.5, abs=1e-4)
    tokens = sum(rollout.kept for rollout in rollouts) - 1
    assert metrics["mismatch_kl"] == pytest.approx(4.5 / tokens, abs=1e-4)
    assert "servers.logprobs_mode" in caplog.text


def test_a_new_critic_values_nothing(paths: Paths) -> None:
    ours = PpoTrainer(Recipe.model_validate({"model": {"path": str(paths.actor)}}))
    for rollout in make_rollouts():
        assert not any(ours.values(rollout.prompt_ids + rollout.token_ids))


def test_values_are_the_classifiers_at_every_prefix(paths: Paths, reference: Reference) -> None:
    classifier = Reference(paths).critic
    ids = make_rollouts()[0].prompt_ids + make_rollouts()[0].token_ids
    with torch.no_grad():
        expected = [float(classifier(torch.tensor([ids[: n + 1]])).logits) for n in range(len(ids))]
    ours = trainer(paths)
    assert ours.values(ids) == pytest.approx(expected, abs=1e-5)
    assert dict(ours.weights("critic")).keys() == dict(classifier.named_parameters()).keys()
    # Of a cut rollout, past the cut too.
    rollouts = make_rollouts()
    rollouts[0].kept = 1
    found = ours.critic_values(rollouts)
    assert [len(of) for of in found] == [len(rollout.token_ids) for rollout in rollouts]
    assert found[0] == pytest.approx(expected[len(rollouts[0].prompt_ids) :], abs=1e-5)


def test_learning_rate_warms_up_from_nothing(paths: Paths) -> None:
    ours = trainer(paths, lr_warmup_steps=4, epochs=1, weight_decay=0.0)
    moved = []
    for _ in range(6):
        before = parameters(ours.actor)
        ours.update(make_rollouts())
        after = parameters(ours.actor)
        moved.append(max(float((after[n] - v).abs().max()) for n, v in before.items()))
    # The first step must be no larger than the full rate; Adam moves by at most about the rate.
    assert moved[0] <= 0.3 * LEARNING_RATE
    assert moved[5] > 0.5 * LEARNING_RATE


def test_the_warm_up_counts_training_steps_from_its_first_share(paths: Paths) -> None:
    """However many optimizer steps each has; the actor's begin after the critic's own."""
    ours = trainer(paths, lr_warmup_steps=3, epochs=2, minibatches=2, critic_only_steps=1)
    metrics = [ours.update(make_rollouts()) for _ in range(5)]
    rates = [one.get("learning_rate", 0.0) / LEARNING_RATE for one in metrics]
    assert rates == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0, 1.0])
    critics = [one["critic_learning_rate"] / (2 * LEARNING_RATE) for one in metrics]
    assert critics == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 1.0])


# -- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_optimizers_survive_a_detour(paths: Paths, tmp_path: Path, zero_stage: int) -> None:
    # With two minibatches the order in which rollouts are drawn must go on too.
    straight = trainer(paths, zero_stage=zero_stage, minibatches=2)
    straight.update(make_rollouts())
    straight.save(tmp_path)
    straight.update(make_rollouts())

    resumed = trainer(paths, zero_stage=zero_stage, minibatches=2)
    resumed.load(tmp_path)
    resumed.update(make_rollouts())
    expected = weights_of(straight)
    for name, value in weights_of(resumed).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=name)


def test_optimizer_state_matters(paths: Paths, tmp_path: Path) -> None:
    """The test above can fail: weights alone, with a new optimizer, take another step."""
    straight = trainer(paths)
    straight.update(make_rollouts())
    straight.save_models(tmp_path)
    straight.update(make_rollouts())
    fresh = trainer(Paths(tmp_path / "actor", tmp_path / "critic"))
    fresh.update(make_rollouts())
    found, expected = weights_of(fresh), weights_of(straight)
    off = [float((found[n] - v).abs().max()) for n, v in expected.items()]
    assert min(off) > 0.1 * LEARNING_RATE


def test_a_missing_engine_state_is_an_error(paths: Paths, tmp_path: Path) -> None:
    """DeepSpeed only warns: a run would go on from the base model."""
    ours = trainer(paths)
    store = CheckpointStore(tmp_path)
    checkpoint = store.save(1, "state", ours.save)
    for part in sorted((checkpoint / "critic").rglob("*"), reverse=True):
        part.unlink() if part.is_file() else part.rmdir()
    with pytest.raises(CheckpointError, match="critic"):
        store.load(checkpoint, ours.load)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_saved_models_are_the_trained_ones(paths: Paths, tmp_path: Path, zero_stage: int) -> None:
    ours = trainer(paths, zero_stage=zero_stage)
    ours.update(make_rollouts())
    ours.save_models(tmp_path)
    loaded = Reference(Paths(tmp_path / "actor", tmp_path / "critic"))
    found, expected = loaded.weights(), weights_of(ours)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    rollout = make_rollouts()[0]
    ids = rollout.prompt_ids + rollout.token_ids
    logits = loaded.actor(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected_logprobs = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert ours.prompt_logprobs(ids) == pytest.approx(expected_logprobs, abs=1e-5)


# -- ZeRO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero_stage", "offload"),
    [*((1, "none"), (2, "none"), (3, "none")), (1, "optimizer"), (2, "optimizer"), (3, "all")],
)
@pytest.mark.parametrize("budget", [40, 16384])
def test_zero_stages_agree(
    paths: Paths, reference: Reference, zero_stage: int, offload: str, budget: int
) -> None:
    ours = trainer(paths, zero_stage=zero_stage, offload=offload, micro_batch_tokens=budget)
    metrics = ours.update(make_rollouts())
    assert_same_update(weights_of(ours), reference.weights())
    assert metrics["grad_norm"] == pytest.approx(np.mean(reference.norms["actor"]), rel=1e-3)


def test_published_weights_are_whole_under_zero_3(paths: Paths, tmp_path: Path) -> None:
    sharded, plain = trainer(paths, zero_stage=3), trainer(paths)
    for ours in (sharded, plain):
        ours.update(make_rollouts())
    module = sharded.actor.module
    # Sharded indeed: what a module holds between uses is not its weights.
    assert any(value.numel() == 0 for value in module.parameters())
    specs = sharded.specs("actor")
    assert specs == plain.specs("actor")
    with (tmp_path / "weights").open("wb") as file:
        write_safetensors(file, specs, sharded.weights("actor"))
    published = load_file(tmp_path / "weights")
    expected = parameters(plain.actor)
    assert published.keys() == expected.keys()
    assert_same_update(published, expected)
    assert any(value.numel() == 0 for value in module.parameters())  # and sharded again


def test_the_reference_is_sharded_under_zero_3(paths: Paths) -> None:
    sharded = trainer(paths, zero_stage=3, kl_coefficient=0.1)
    plain = trainer(paths, kl_coefficient=0.1)
    found, expected = (ours.update(make_rollouts()) for ours in (sharded, plain))
    assert found["kl_reference"] == pytest.approx(expected["kl_reference"], rel=1e-4)
    assert all(value.numel() == 0 for value in sharded.reference.module.parameters())
