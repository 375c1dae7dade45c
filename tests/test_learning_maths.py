"""GAE against brute force for each end of a rollout; PPO's losses against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from espo_rl.advantages import gae, whiten
from espo_rl.losses import entropy, policy_loss, token_logprobs, value_loss

values_of_a_rollout = st.integers(1, 12).flatmap(
    lambda n: arrays(np.float32, n, elements=st.floats(-1, 1, width=32))
)


def brute_force(values, rewards, last_value, gamma, lam):
    """A_t = Σ_k (γλ)^k δ_{t+k}, summed term by term."""
    following = [*values[1:], last_value]
    deltas = [r + gamma * v2 - v for r, v, v2 in zip(rewards, values, following, strict=True)]
    return [
        sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
        for t in range(len(values))
    ]


@given(values_of_a_rollout, st.floats(0.5, 1), st.floats(0, 1), st.sampled_from([-1.0, 0.0, 1.0]))
def test_gae_of_a_terminal_rollout(values, gamma, lam, reward):
    rewards = [0.0] * (len(values) - 1) + [reward]
    advantages, returns = gae(values, reward, gamma=gamma, lam=lam)
    assert advantages == pytest.approx(brute_force(values, rewards, 0.0, gamma, lam), abs=1e-4)
    assert returns == pytest.approx(advantages + values, abs=1e-5)


@given(values_of_a_rollout, st.floats(0.5, 1), st.floats(0, 1), st.floats(-1, 1))
def test_gae_bootstraps_a_rollout_cut_by_length(values, gamma, lam, last_value):
    rewards = [0.0] * len(values)
    advantages, _ = gae(values, 0.0, gamma=gamma, lam=lam, bootstrap=last_value)
    expected = brute_force(values, rewards, last_value, gamma, lam)
    assert advantages == pytest.approx(expected, abs=1e-4)


def test_the_failure_reward_stands_at_the_stop_and_is_passed_back():
    advantages, _ = gae(np.full(4, 0.5, np.float32), -1.0, gamma=1.0, lam=0.5)
    # One negative TD error, -1 - V, at the stop; halved at each step before it.
    assert advantages == pytest.approx([-1.5 / 8, -1.5 / 4, -1.5 / 2, -1.5])


def test_whitening_is_over_all_tokens_of_the_batch():
    rows = whiten([np.array([1.0, 2.0], np.float32), np.array([6.0], np.float32)])
    flat = np.concatenate(rows)
    assert [len(row) for row in rows] == [2, 1]
    assert flat.mean() == pytest.approx(0.0, abs=1e-6)
    assert flat.std() == pytest.approx(1.0, abs=1e-5)


@given(st.integers(0, 2**31 - 1))
def test_policy_loss_is_the_clipped_surrogate(seed):
    rng = np.random.default_rng(seed)
    new, old = rng.normal(-1, 0.4, (2, 5)), rng.normal(-1, 0.4, (2, 5))
    advantages = rng.normal(0, 1, (2, 5))
    got = policy_loss(*map(torch.tensor, (new, old, advantages)), 0.2, 0.3)
    ratio = np.exp(new - old)
    unclipped, clipped = ratio * advantages, np.clip(ratio, 0.8, 1.3) * advantages
    assert got.loss.numpy() == pytest.approx(-np.minimum(unclipped, clipped))
    assert got.clipped.numpy().tolist() == (clipped < unclipped).astype(float).tolist()
    assert (got.kl >= 0).all()


def test_a_clipped_ratio_has_no_gradient_in_the_direction_of_its_advantage():
    new = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    policy_loss(new, torch.zeros(4), advantages, 0.2, 0.2).loss.sum().backward()
    assert (new.grad != 0).tolist() == [False, True, True, False]


def test_value_loss_takes_the_worse_of_clipped_and_unclipped():
    values, old, returns = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0])
    assert value_loss(values, old, returns, None).item() == 0.0
    assert value_loss(values, old, returns, 0.2).item() == pytest.approx(0.5 * 0.8**2)


def test_token_logprobs_and_entropy_are_those_of_the_softmax():
    logits = torch.randn(2, 3, 7)
    tokens = torch.randint(0, 7, (2, 3))
    distribution = torch.distributions.Categorical(logits=logits)
    assert torch.allclose(token_logprobs(logits, tokens), distribution.log_prob(tokens), atol=1e-6)
    assert torch.allclose(entropy(logits), distribution.entropy(), atol=1e-6)
