"""Advantages and losses against brute force and against a PPO step written out in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from espo_rl.config import Ppo
from espo_rl.ppo.advantages import gae, group_advantages, whiten
from espo_rl.ppo.experience import ModelOutputs, mismatch, prepare
from espo_rl.ppo.losses import (
    Statistics,
    actor_loss,
    aggregation_weights,
    entropy,
    importance_weights,
    kl_estimate,
    policy_loss,
    token_logprobs,
    value_loss,
)
from espo_rl.ppo.samples import Sample

Floats = Sequence[float] | NDArray[np.floating]

values_of_a_rollout = st.integers(1, 12).flatmap(
    lambda n: arrays(np.float32, n, elements=st.floats(-1, 1, width=32))
)


def brute_force(values: Floats, rewards: Floats, gamma: float, lam: float) -> list[float]:
    """A_t = Σ_k (γλ)^k δ_{t+k}, summed term by term."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * v2 - v for r, v, v2 in zip(rewards, values, following, strict=True)]
    return [
        sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
        for t in range(len(values))
    ]


# -- advantages ------------------------------------------------------------------------------------


@given(values_of_a_rollout, st.floats(0.5, 1), st.floats(0, 1), st.data())
def test_gae_is_the_sum_of_td_errors(
    values: NDArray[np.float32], gamma: float, lam: float, data: st.DataObject
) -> None:
    rewards = data.draw(arrays(np.float32, len(values), elements=st.floats(-1, 1, width=32)))
    advantages = gae(values, rewards, gamma=gamma, lam=lam)
    expected = brute_force(values, rewards, gamma, lam)
    assert advantages == pytest.approx(expected, abs=1e-4)


def test_the_failure_reward_stands_at_the_stop_and_is_passed_back() -> None:
    rewards = np.array([0.0, 0.0, 0.0, -1.0], np.float32)
    advantages = gae(np.full(4, 0.5, np.float32), rewards, gamma=1.0, lam=0.5)
    # One negative TD error, -1 - V, at the stop; halved at each step before it.
    assert advantages == pytest.approx([-1.5 / 8, -1.5 / 4, -1.5 / 2, -1.5])


def test_whitening_is_over_all_tokens_of_the_batch() -> None:
    rows = whiten([np.array([1.0, 2.0], np.float32), np.array([6.0], np.float32)])
    flat = np.concatenate(rows)
    assert [len(row) for row in rows] == [2, 1]
    assert flat.mean() == pytest.approx(0.0, abs=1e-6)
    assert flat.std() == pytest.approx(1.0, abs=1e-5)


def made(
    kept: int, reward: float, group: int, rng: np.random.Generator, *, critic: bool = True
) -> tuple[Sample, ModelOutputs]:
    """A sample with a prompt of three tokens, and made-up answers of the models."""
    sample = Sample(torch.arange(3 + kept), 3, group, reward)
    sample.columns["served_logprobs"] = torch.full((kept,), -1.0)
    logprobs, reference = torch.tensor(rng.normal(-1, 0.5, (2, kept)), dtype=torch.float32)
    values = torch.tensor(rng.normal(0, 1, kept), dtype=torch.float32)
    answers = ModelOutputs(
        logprobs, logprobs, torch.ones(kept), reference, values if critic else None
    )
    return sample, answers


def batch_of_six(*, critic: bool = True) -> tuple[list[Sample], list[ModelOutputs]]:
    """Two groups of three; the last rollout has a single token."""
    rng = np.random.default_rng(11)
    rows = [
        (5, 1.0, 0),
        (3, -1.0, 0),
        (6, -0.5, 0),
        (4, 1.0, 7),
        (2, 0.25, 7),
        (1, -1.0, 7),
    ]
    pairs = [made(*row, rng, critic=critic) for row in rows]
    return [sample for sample, _ in pairs], [answers for _, answers in pairs]


def log_ratio(answers: ModelOutputs) -> torch.Tensor:
    """log π/π_reference of the sampled tokens, [tokens]."""
    assert answers.reference is not None
    return answers.logprobs - answers.reference


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_advantages_and_returns(coefficient: float) -> None:
    ppo = Ppo(
        gamma=0.9,
        lam=0.8,
        whiten=False,
        kl_coefficient=coefficient,
        kl_place="reward",
        kl_estimator="k1",
    )
    samples, before = batch_of_six()
    prepare(samples, before, ppo)
    for sample, answers in zip(samples, before, strict=True):
        assert answers.values is not None
        values = answers.values.double().numpy()
        kl = log_ratio(answers).double().numpy()
        rewards = -coefficient * kl
        rewards[-1] += sample.reward
        # However it ended, a rollout is over: nothing follows.
        expected = brute_force(values, rewards, 0.9, 0.8)
        assert sample.columns["advantages"].tolist() == pytest.approx(expected, abs=1e-5)
        assert sample.columns["returns"].tolist() == pytest.approx(expected + values, abs=1e-5)
        assert sample.columns["old_values"].tolist() == pytest.approx(values)


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@pytest.mark.parametrize("critic", [True, False])
def test_group_advantages_compare_the_rollouts_of_a_prompt(
    coefficient: float, critic: bool
) -> None:
    ppo = Ppo(
        advantage="group",
        kl_coefficient=coefficient,
        kl_place="reward",
        kl_estimator="k2",
    )
    samples, before = batch_of_six(critic=critic)
    prepare(samples, before, ppo)
    returns = [
        sample.reward - coefficient * float((0.5 * log_ratio(b) ** 2).sum())
        for sample, b in zip(samples, before, strict=True)
    ]
    for members in ((0, 1, 2), (3, 4, 5)):
        of_group = [returns[i] for i in members]
        mean = sum(of_group) / 3
        deviation = math.sqrt(sum((one - mean) ** 2 for one in of_group) / 3)
        for i in members:
            expected = (returns[i] - mean) / deviation
            found = samples[i].columns["advantages"].tolist()
            assert found == pytest.approx([expected] * samples[i].kept, rel=1e-4)
    assert all(("returns" in sample.columns) == critic for sample in samples)


def test_a_group_of_equals_says_nothing() -> None:
    assert group_advantages([0.1] * 3 + [1.0, 0.0], [0] * 3 + [1] * 2) == pytest.approx(
        [0, 0, 0, 1, -1], abs=1e-5
    )


@pytest.mark.parametrize("value", [0.0, 0.1, -1.0, 1 / 3, 1000.1, 1e6])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_what_differs_by_rounding_alone_has_no_advantage(value: float, noise: float) -> None:
    """Scaled by its own deviation, noise would be as loud as the best of signals."""
    rng = np.random.default_rng(0)
    values = (value * (1.0 + noise * rng.normal(0, 1, 300))).astype(np.float32)
    for advantages in (
        np.concatenate(whiten(np.split(values, 10))),
        group_advantages(values.tolist(), [0] * 100 + [1] * 200),
    ):
        assert np.abs(advantages).max() < 0.01


def test_values_that_are_right_up_to_rounding_leave_no_advantage() -> None:
    """As of a critic that knows all, by GAE and against the group, KL in the reward or not."""
    rng = np.random.default_rng(1)
    for advantage in ("gae", "group"):
        pairs = [made(5, 0.7, i // 3, rng) for i in range(6)]
        for _, answers in pairs:
            answers.values = torch.full((5,), 0.7) + 1e-7 * torch.tensor(rng.normal(0, 1, 5))
            assert answers.reference is not None
            answers.reference = answers.logprobs + 1e-7 * torch.tensor(rng.normal(0, 1, 5)).float()
        ppo = Ppo(advantage=advantage, kl_coefficient=0.1, kl_place="reward", kl_estimator="k1")
        samples, before = [one for one, _ in pairs], [answers for _, answers in pairs]
        metrics = prepare(samples, before, ppo)
        assert math.isnan(metrics["critic_explained_variance"])
        for sample in samples:
            assert sample.columns["advantages"].abs().max() < 0.01


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_whitening_tells_values_from_their_rounding(size: float) -> None:
    noise = 1e-7 * np.random.default_rng(3).normal(0, 1, 300)
    returns = np.full(300, size, np.float32)
    values = (size * (1.0 + noise)).astype(np.float32)
    [advantages] = whiten([returns - values], [returns])
    assert np.abs(advantages).max() < 0.01


def test_what_differs_is_scaled_as_verl_scales_it() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(0.3, 0.5, 40)
    expected = (values - values.mean()) / np.sqrt(values.var() + 1e-8)
    assert whiten([values.astype(np.float32)])[0] == pytest.approx(expected, abs=1e-5)


# -- server against trainer ------------------------------------------------------------------------


def test_mismatch_is_the_kl_from_server_to_trainer() -> None:
    rng = np.random.default_rng(3)
    server, trainer = rng.dirichlet(np.ones(5), 2)
    tokens = rng.choice(5, 200_000, p=server)
    found = mismatch(*(torch.tensor(np.log(p)[tokens]) for p in (server, trainer)))
    exact = float((server * np.log(server / trainer)).sum())
    assert exact > 0.3
    assert found["mismatch_kl"] == pytest.approx(exact, rel=0.02)
    assert found["mismatch_k3"] == pytest.approx(exact, rel=0.02)
    assert found["mismatch_max"] == pytest.approx(np.abs(np.log(server / trainer)).max())


def test_missing_numbers_are_no_mismatch() -> None:
    served = torch.tensor([math.nan, -1.0, -math.inf])
    assert mismatch(served, torch.tensor([-5.0, -1.5, -1.0])) == pytest.approx(
        {"mismatch_kl": 0.5, "mismatch_k3": math.exp(-0.5) - 0.5, "mismatch_max": 0.5}
    )
    assert all(math.isnan(one) for one in mismatch(served[:1], served[1:2]).values())


def test_importance_weights_are_capped_ratios() -> None:
    ours = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    served = torch.tensor([-2.0, -1.2, 0.0, math.nan])
    weights, capped = importance_weights(ours, served, 1.5)
    assert weights.tolist() == pytest.approx([1.5, math.exp(0.2), math.exp(-1.0), 1.0])
    assert capped.tolist() == [1.0, 0.0, 0.0, 0.0]


# -- losses ----------------------------------------------------------------------------------------


@given(st.integers(0, 2**31 - 1))
def test_policy_loss_is_the_clipped_surrogate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    new, old = rng.normal(-1, 0.4, (2, 5)), rng.normal(-1, 0.4, (2, 5))
    advantages = rng.normal(0, 1, (2, 5))
    got = policy_loss(torch.tensor(new), torch.tensor(old), torch.tensor(advantages), 0.2, 0.3)
    ratio = np.exp(new - old)
    unclipped, clipped = ratio * advantages, np.clip(ratio, 0.8, 1.3) * advantages
    assert got.loss.numpy() == pytest.approx(-np.minimum(unclipped, clipped))
    assert got.clipped.numpy().tolist() == (clipped < unclipped).astype(float).tolist()
    assert (got.kl >= 0).all()


def test_a_clipped_ratio_has_no_gradient_in_the_direction_of_its_advantage() -> None:
    new = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    policy_loss(new, torch.zeros(4), advantages, 0.2, 0.2).loss.sum().backward()
    assert new.grad is not None
    assert new.grad.sign().abs().tolist() == [False, True, True, False]


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_dual_clip_bounds_the_ratio_of_what_was_bad(advantage: float) -> None:
    """Equation 5 of arXiv 1912.09729: max(min(r A, clip(r) A), c A) where A < 0."""
    new = torch.linspace(-2.0, 3.0, 60, requires_grad=True)
    advantages = torch.full((60,), advantage)
    got = policy_loss(new, torch.zeros(60), advantages, 0.2, 0.3, 3.0)
    ratio = np.exp(new.detach().numpy())
    usual = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.3) * advantage)
    expected = np.maximum(usual, 3.0 * advantage) if advantage < 0 else usual
    assert got.loss.detach().numpy() == pytest.approx(-expected, rel=1e-6)
    assert got.clipped.numpy().tolist() == (expected != ratio * advantage).tolist()
    got.loss.sum().backward()
    assert new.grad is not None
    flat = (ratio > 3.0) | (ratio < 0.8) if advantage < 0 else ratio > 1.3
    assert (new.grad.numpy() == 0.0).tolist() == flat.tolist()


@pytest.mark.parametrize("log_ratio", [90.0, -90.0, 1e4, -1e4, math.inf, -math.inf])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_log_ratios_of_any_size_leave_loss_and_gradient_finite(
    log_ratio: float, advantage: float
) -> None:
    new = torch.tensor([log_ratio], requires_grad=True)
    zero, ppo = torch.zeros(1), {"clip_low": 0.2, "clip_high": 0.2}
    result = policy_loss(new, zero, torch.tensor([advantage]), **ppo)
    loss = result.loss + result.kl + kl_estimate(new, zero, "k3") + kl_estimate(zero, new, "k3")
    loss.sum().backward()
    assert new.grad is not None
    assert bool(loss.isfinite() & new.grad.isfinite())
    weights, capped = importance_weights(new.detach(), zero, 2.0)
    assert bool(weights.isfinite())
    assert bool(capped) == (log_ratio > 0)
    assert math.isfinite(mismatch(new.detach().clamp(-1e4, 1e4), zero)["mismatch_k3"])


def test_value_loss_takes_the_worse_of_clipped_and_unclipped() -> None:
    values, old, returns = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0])
    assert value_loss(values, old, returns, None).item() == 0.0
    assert value_loss(values, old, returns, 0.2).item() == pytest.approx(0.5 * 0.8**2)


def test_token_logprobs_and_entropy_are_those_of_the_softmax() -> None:
    logits = torch.randn(2, 3, 7)
    tokens = torch.randint(0, 7, (2, 3))
    distribution = torch.distributions.Categorical(logits=logits)
    assert torch.allclose(token_logprobs(logits, tokens), distribution.log_prob(tokens), atol=1e-6)
    assert torch.allclose(entropy(logits), distribution.entropy(), atol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates(kind: Literal["k1", "k2", "k3"]) -> None:
    rng = np.random.default_rng(4)
    p, q = 0.9 * rng.dirichlet(np.full(6, 9.0), 2) + 0.1 / 6
    tokens = rng.choice(6, 400_000, p=p)
    sampled, other = (torch.tensor(np.log(x)[tokens]) for x in (p, q))
    found = kl_estimate(sampled, other, kind)
    exact = float((p * np.log(p / q)).sum())
    # k2 is biased, by little while the two are close.
    assert float(found.mean()) == pytest.approx(exact, rel=0.25 if kind == "k2" else 0.03)
    assert bool((found >= 0).all()) == (kind != "k1")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_aggregation_weights_are_means(kept: list[int]) -> None:
    by_token = aggregation_weights(kept, "token-mean")
    assert len(set(by_token)) == 1
    by_sequence = aggregation_weights(kept, "sequence-mean")
    for tokens, weight in zip(kept, by_sequence, strict=True):
        assert tokens * weight == pytest.approx(1 / len(kept))
    assert sum(np.multiply(kept, by_token)) == pytest.approx(1.0)


# -- a whole step, in numpy ------------------------------------------------------------------------


class NumpyStep:
    """Loss and gradient of a linear policy and critic on eight tokens of three rollouts.

    logits = states @ policy, V = states @ critic; every derivative is written out.
    """

    KEPT = (4, 1, 3)

    def __init__(self, ppo: Ppo) -> None:
        rng = np.random.default_rng(9)
        self.ppo = ppo
        self.states = rng.normal(0, 1, (8, 5))
        self.policy, self.critic = rng.normal(0, 0.7, (5, 6)), rng.normal(0, 1, 5)
        self.tokens = rng.integers(0, 6, 8)
        self.columns = {
            "old_logprobs": self.logprobs() + rng.normal(0, 0.3, 8),
            "reference_logprobs": self.logprobs() + rng.normal(0, 0.5, 8),
            "advantages": rng.normal(0, 1, 8),
            "old_values": self.states @ self.critic + rng.normal(0, 0.4, 8),
            "returns": rng.normal(0, 1, 8),
        }
        served = self.columns["old_logprobs"] + rng.normal(0, 0.4, 8)
        served[2] = math.nan
        if ppo.importance_cap is not None:
            ratio = np.exp(self.columns["old_logprobs"] - served)
            self.columns["importance"] = np.minimum(np.nan_to_num(ratio, nan=1.0), 1.2)
        if ppo.aggregation == "token-mean":
            self.weights = np.full(8, 1 / 8)
        else:
            self.weights = np.repeat([1 / (3 * n) for n in self.KEPT], self.KEPT)

    def table(self) -> np.ndarray:
        logits = self.states @ self.policy
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def logprobs(self) -> np.ndarray:
        return self.table()[np.arange(8), self.tokens]

    def actor(self) -> tuple[float, np.ndarray]:
        """Loss and its gradient with respect to `policy`."""
        ppo, columns = self.ppo, self.columns
        table = self.table()
        new, advantages = self.logprobs(), columns["advantages"]
        ratio = np.exp(new - columns["old_logprobs"])
        low, high = 1 - ppo.clip_low, 1 + ppo.clip_high
        clipped = np.clip(ratio, low, high) * advantages < ratio * advantages
        # 1 where the server gave no number or no cap is set
        importance = columns.get("importance", np.ones(8))
        loss = -importance * np.where(clipped, np.clip(ratio, low, high), ratio) * advantages
        if ppo.dual_clip is not None:
            most = (advantages < 0) & (ratio > ppo.dual_clip)
            loss = np.where(most, -importance * ppo.dual_clip * advantages, loss)
            clipped |= most
        slope = -importance * np.where(clipped, 0.0, ratio) * advantages  # d loss / d logprob
        if ppo.kl_place == "loss":
            difference = new - columns["reference_logprobs"]
            estimate, derivative = {
                "k1": (difference, np.ones(8)),
                "k2": (difference**2 / 2, difference),
                "k3": (np.exp(-difference) - 1 + difference, 1 - np.exp(-difference)),
            }[ppo.kl_estimator]
            loss = loss + ppo.kl_coefficient * estimate
            slope = slope + ppo.kl_coefficient * derivative
        spread = -(np.exp(table) * table).sum(1)
        loss = loss - ppo.entropy_bonus * spread
        one_hot = np.eye(6)[self.tokens]
        by_logits = slope[:, None] * (one_hot - np.exp(table))
        by_logits += ppo.entropy_bonus * np.exp(table) * (table + spread[:, None])
        return float(self.weights @ loss), self.states.T @ (self.weights[:, None] * by_logits)

    def value(self) -> tuple[float, np.ndarray]:
        """Loss and its gradient with respect to `critic`."""
        clip, old, returns = (
            self.ppo.value_clip,
            self.columns["old_values"],
            self.columns["returns"],
        )
        values = self.states @ self.critic
        loss, slope = (values - returns) ** 2 / 2, values - returns
        if clip is not None:
            near = old + np.clip(values - old, -clip, clip)
            worse = (near - returns) ** 2 / 2 > loss
            inside = np.abs(values - old) < clip
            loss = np.where(worse, (near - returns) ** 2 / 2, loss)
            slope = np.where(worse, np.where(inside, near - returns, 0.0), slope)
        return float(self.weights @ loss), self.states.T @ (self.weights * slope)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_low": 0.05, "clip_high": 0.5},
        {"dual_clip": 1.05},
        {"value_clip": 0.2},
        {"aggregation": "sequence-mean"},
        {"entropy_bonus": 0.3},
        {"kl_coefficient": 0.5, "kl_estimator": "k1"},
        {"kl_coefficient": 0.5, "kl_estimator": "k2"},
        {"kl_coefficient": 0.5, "kl_estimator": "k3", "aggregation": "sequence-mean"},
        {"kl_coefficient": 0.5, "kl_place": "reward"},
        {"importance_cap": 1.2},
        {"importance_cap": 1.2, "kl_coefficient": 0.5, "entropy_bonus": 0.1, "value_clip": 0.1},
    ],
    ids=str,
)
def test_a_step_equals_one_in_numpy(settings: dict[str, Any]) -> None:
    ppo = Ppo(**settings)
    expected = NumpyStep(ppo)
    states = torch.tensor(expected.states)
    policy = torch.tensor(expected.policy, requires_grad=True)
    critic = torch.tensor(expected.critic, requires_grad=True)
    columns = {name: torch.tensor(column) for name, column in expected.columns.items()}
    per_rollout = aggregation_weights(list(NumpyStep.KEPT), ppo.aggregation)
    weights = torch.tensor(np.repeat(per_rollout, NumpyStep.KEPT))

    logits = states @ policy
    said = Statistics(token_logprobs(logits, torch.tensor(expected.tokens)), entropy(logits))
    losses, _ = actor_loss(said, columns, ppo)
    loss = (losses * weights).sum()
    loss.backward()
    expected_loss, expected_gradient = expected.actor()
    assert loss.item() == pytest.approx(expected_loss, abs=1e-5)
    assert policy.grad is not None
    assert policy.grad.numpy() == pytest.approx(expected_gradient, abs=1e-5)

    errors = value_loss(states @ critic, columns["old_values"], columns["returns"], ppo.value_clip)
    loss = (errors * weights).sum()
    loss.backward()
    expected_loss, expected_gradient = expected.value()
    assert loss.item() == pytest.approx(expected_loss)
    assert critic.grad is not None
    assert critic.grad.numpy() == pytest.approx(expected_gradient)


def test_the_numpy_step_exercises_what_it_tests() -> None:
    """Clips active on some tokens only, the cap too."""
    step = NumpyStep(Ppo(value_clip=0.2, importance_cap=1.2))
    ratio = np.exp(step.logprobs() - step.columns["old_logprobs"])
    assert 0 < (np.abs(ratio - 1) > 0.2).sum() < 8
    assert 0 < (step.columns["importance"] == 1.2).sum() < 8
    moved = np.abs(step.states @ step.critic - step.columns["old_values"])
    assert 0 < (moved > 0.2).sum() < 8


def test_a_baseline_stands_in_the_place_of_a_critic() -> None:
    rng = np.random.default_rng(3)
    made_up = [made(kept, -1.0, 0, rng, critic=False) for kept in (4, 6)]
    samples, before = map(list, zip(*made_up, strict=True))
    fallen = torch.tensor([0.8, 0.8, -0.9, -0.9])
    samples[0].columns["baseline"] = fallen
    samples[1].columns["baseline"] = torch.zeros(6)
    prepare(samples, before, Ppo(lam=0.0, whiten=False, baseline="probe"))
    # λ = 0: each token's own TD error; the failure is where V fell.
    advantages = samples[0].columns["advantages"].tolist()
    assert advantages == pytest.approx([0.0, -1.7, 0.0, -0.1], abs=1e-6)
    assert samples[1].columns["advantages"].tolist() == [0.0] * 5 + [-1.0]
    assert "returns" not in samples[0].columns
