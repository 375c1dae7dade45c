"""PPO updates by real DeepSpeed engines against a plain torch step written out here."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from espo_rl.config import Ppo, Recipe
from espo_rl.ppo import trainer as ppo_trainer
from espo_rl.ppo.experience import Metrics, ModelOutputs, prepare
from espo_rl.ppo.losses import actor_loss, aggregation_weights
from espo_rl.ppo.samples import Sample
from espo_rl.ppo.trainer import PpoTrainer
from espo_rl.record.metrics import METRICS
from espo_rl.types import EndReason, Rollout
from tests.helpers.reference import Reference, parameters
from tests.helpers.trainer import (
    LEARNING_RATE,
    PPO,
    Paths,
    assert_same_update,
    make_rollouts,
    trainer,
    weights_of,
)

pytestmark = pytest.mark.slow


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
