"""Numbers that are not finite: what one costs, and when there are too many."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from espo_rl.ppo import trainer as ppo_trainer
from espo_rl.ppo.losses import actor_loss, value_loss
from espo_rl.ppo.trainer import PpoTrainer, UpdateError
from tests.helpers.trainer import Paths, make_rollouts, trainer, weights_of

pytestmark = pytest.mark.slow


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Which of actor and critic have other weights, or ones that are not finite."""
    return {
        name.partition(".")[0]
        for name, value in before.items()
        if not torch.equal(value, after[name])
    }


# -- rewards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", ["gae", "group"])
@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_costs_its_rollout(
    paths: Paths, reward: float, advantage: str, caplog: pytest.LogCaptureFixture
) -> None:
    rollouts = make_rollouts()
    rollouts[1].reward = reward
    ours, without = (trainer(paths, advantage=advantage) for _ in range(2))
    metrics = ours.update(rollouts)
    assert metrics["dropped_rewards"] == 1
    assert (
        f"1 of 5 rollouts have a reward that is not finite, and are left out; the first: {reward} "
        in (caplog.text)
    )
    expected = without.update([rollouts[0], *rollouts[2:]])
    assert expected["dropped_rewards"] == 0
    for name, value in expected.items():
        assert name == "dropped_rewards" or metrics[name] == pytest.approx(value, nan_ok=True)
    assert moved(weights_of(ours), weights_of(without)) == set()


def test_none_with_a_finite_reward_is_an_error(paths: Paths) -> None:
    rollouts = make_rollouts()
    for rollout in rollouts:
        rollout.reward = math.nan
    with pytest.raises(ValueError, match="no rollout has a token to train on and a finite reward"):
        trainer(paths).update(rollouts)


# -- losses and gradients --------------------------------------------------------------------------


class Spoilt:
    """Makes the losses of one model what is asked for, call by call."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str) -> None:
        self.kind = ""
        if name == "actor":
            patch.setattr(ppo_trainer, "actor_loss", self.actor)
        else:
            patch.setattr(ppo_trainer, "value_loss", self.critic)

    def actor(self, *args: Any) -> Any:
        loss, reports = actor_loss(*args)
        return self.spoil(loss), reports

    def critic(self, *args: Any) -> Any:
        return self.spoil(value_loss(*args))

    def spoil(self, loss: torch.Tensor) -> torch.Tensor:
        if self.kind == "gradient":  # of a root at 0
            return loss + (loss - loss.detach()).abs().sqrt()
        if self.kind:
            return loss + torch.tensor([float(self.kind)] + [0.0] * (len(loss) - 1))
        return loss


@pytest.mark.parametrize(
    ("name", "stage", "offload", "dtype"),
    [
        ("actor", 0, "none", "float32"),
        ("critic", 0, "none", "float32"),
        ("actor", 1, "none", "float32"),
        ("critic", 2, "none", "float32"),
        ("actor", 3, "none", "float32"),
        ("actor", 2, "optimizer", "float32"),
        ("critic", 3, "all", "float32"),
        ("actor", 0, "none", "bfloat16"),
        ("critic", 1, "none", "bfloat16"),
        ("actor", 2, "optimizer", "bfloat16"),
        ("critic", 3, "none", "bfloat16"),
    ],
)
def test_a_step_that_is_not_finite_is_not_taken(
    paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stage: int,
    offload: str,
    dtype: str,
) -> None:
    """Of the one model; the other learns on, and the next update goes as if nothing had been."""
    spoilt = Spoilt(monkeypatch, name)
    settings = {"zero_stage": stage, "offload": offload, "dtype": dtype, "lr_warmup_steps": 9}
    ours = trainer(paths, **settings)
    ours.update(make_rollouts())
    first = ours.actor.learning_rate
    for kind in ("nan", "-inf", "gradient"):
        before = weights_of(ours)
        spoilt.kind = kind
        metrics = ours.update(make_rollouts())
        assert metrics["skipped_steps"] == 2  # epochs
        assert moved(before, weights_of(ours)) == {"actor", "critic"} - {name}
        if name == "actor":
            # The warm-up counts training steps, taken or not.
            assert ours.actor.learning_rate == pytest.approx(ours.updates * first)
        spoilt.kind, before = "", weights_of(ours)
        metrics = ours.update(make_rollouts())
        assert metrics["skipped_steps"] == 0
        assert all(math.isfinite(value) for value in metrics.values())
        after = weights_of(ours)
        assert moved(before, after) == {"actor", "critic"}
        assert all(bool(value.isfinite().all()) for value in after.values())


def test_means_are_over_the_steps_that_were_taken(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([False, True, False, False])

    def spoilt(*args: Any) -> Any:
        loss, reports = actor_loss(*args)
        if next(calls):
            loss = loss * math.nan
            reports = {name: report * math.nan for name, report in reports.items()}
        return loss, reports

    monkeypatch.setattr(ppo_trainer, "actor_loss", spoilt)
    metrics = trainer(paths, epochs=2, minibatches=2).update(make_rollouts())
    assert metrics["skipped_steps"] == 1
    assert all(math.isfinite(value) for value in metrics.values())


def updates(ours: PpoTrainer, spoilt: Spoilt, kinds: list[str]) -> None:
    for kind in kinds:
        spoilt.kind = kind
        ours.update(make_rollouts())


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("nan", r"of the critic, not finite: critic_loss of 1 token"),
        ("gradient", r"of the critic, not finite: the gradient, though the loss is"),
    ],
)
def test_three_in_a_row_end_the_run_and_say_what_was_wrong(
    paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    why: str,
) -> None:
    spoilt = Spoilt(monkeypatch, "critic")
    ours = trainer(paths, epochs=1)
    updates(ours, spoilt, [kind, kind, "", kind, kind])
    assert caplog.text.count("a step was not taken") == 4
    with pytest.raises(UpdateError, match=rf"3 updates in a row .* {why}.*learning_rate"):
        updates(ours, spoilt, [kind])
    assert all(bool(value.isfinite().all()) for value in weights_of(ours).values())


def test_what_is_not_finite_before_the_update_is_named(
    paths: Paths, caplog: pytest.LogCaptureFixture
) -> None:
    """A critic whose weights are broken spoils the actor's advantages, too."""
    ours = trainer(paths)
    ours.module("critic").score.weight.data.fill_(math.inf)
    before = weights_of(ours)
    metrics = ours.update(make_rollouts())
    assert metrics["skipped_steps"] == 4
    assert "of the actor, not finite: " in caplog.text
    assert "advantages of" in caplog.text
    assert "of the critic, not finite: " in caplog.text
    assert "old_values of" in caplog.text
    assert moved(before, weights_of(ours)) == set()


def test_a_log_ratio_of_90_is_survived(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    def far(policy: Any, columns: Any, ppo: Any) -> Any:
        columns = {**columns, "old_logprobs": columns["old_logprobs"] - 90.0}
        return actor_loss(policy, columns, ppo)

    monkeypatch.setattr(ppo_trainer, "actor_loss", far)
    ours = trainer(paths, dual_clip=3.0)
    metrics = ours.update(make_rollouts())
    assert metrics["skipped_steps"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(bool(value.isfinite().all()) for value in weights_of(ours).values())
