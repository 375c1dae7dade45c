"""Micro-batches: nothing lost, nothing twice, the same number on every rank."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.stop.estimate import FEATURES, StreamStatistics
from espo_gateway.stop.regret import surrogate_regret
from espo_rl.ppo.critic import Scaler, state_statistics
from espo_rl.ppo.samples import Sample, micro_batches, share
from espo_rl.types import EndReason, Problem, Rollout

lengths = st.lists(st.integers(2, 60), min_size=1, max_size=20)


@given(lengths, st.integers(1, 200), st.integers(1, 4))
def test_every_sample_is_in_one_micro_batch_of_one_rank(lengths, budget, ranks):
    shares = [share(lengths, budget, rank, ranks) for rank in range(ranks)]
    assert sorted(i for one in shares for batch in one for i in batch) == list(range(len(lengths)))
    assert len({len(one) for one in shares}) == 1  # dummies make up the number
    for batch in (batch for one in shares for batch in one if len(batch) > 1):
        assert len(batch) * max(lengths[i] for i in batch) <= budget
    # No rank is idle while another has rows to spare.
    rows = [sum(map(len, one)) for one in shares]
    assert max(rows) - min(rows) <= 1


def sample(prompt, kept, *, statistics=False):
    tokens = torch.arange(1, prompt + kept + 1) + 100 * kept
    states = torch.full((kept + 1, 3), float(kept)) if statistics else None
    made = Sample(tokens, prompt, EndReason.COMPLETED, 0, 1.0, states)
    made.columns["x"] = made.tokens[prompt:].float()
    return made


def test_columns_line_up_with_the_tokens_they_belong_to():
    samples = [sample(2, 5, statistics=True), sample(4, 1, statistics=True)]
    (batch,) = micro_batches(samples, 100, rank=0, ranks=1, device="cpu")
    assert batch.tokens.shape == (2, 7)
    assert batch.targets.tolist() == batch.columns["x"].tolist()
    # A state's statistics stand where its value is read: from the prompt's last token on.
    expected = torch.zeros(2, 7)
    expected[0, 1:7], expected[1, 3:5] = 5.0, 1.0
    assert torch.equal(batch.statistics[..., 0], expected)


def test_a_dummy_counts_for_nothing():
    samples = [sample(2, 5, statistics=True)]
    (batch,) = micro_batches(samples, 100, rank=1, ranks=2, device="cpu")
    assert batch.indices == []
    assert batch.tokens.shape == (1, 2)
    assert not batch.response.any()
    assert batch.columns["x"].shape == batch.targets.shape == (0,)


def made_rollout(logprobs, max_logprobs, kept):
    return Rollout(
        problem=Problem("p", "p", "1"),
        prompt_ids=[7, 8],
        token_ids=list(range(1, len(logprobs) + 1)),
        logprobs=np.array(logprobs),
        max_logprobs=np.array(max_logprobs),
        text="",
        end=EndReason.EARLY_STOP,
        kept=kept,
        audited=True,
        reward=-1.0,
        group=5,
    )


def test_a_sample_is_what_a_rollout_keeps():
    made = Sample.of(made_rollout([-0.5, -9999.0, math.nan, -2.0], [0.0] * 4, 3))
    assert made.tokens.tolist() == [7, 8, 1, 2, 3]
    assert (made.prompt, made.kept, made.group, made.reward) == (2, 3, 5, -1.0)
    # Placeholders of servers are no numbers.
    assert made.columns["served_logprobs"].tolist() == pytest.approx(
        [-0.5, math.nan, math.nan], nan_ok=True
    )


# -- the critic's statistics -----------------------------------------------------------------------


def test_a_state_is_described_by_what_was_known_there():
    """What a live stream knows before it samples token t; nothing of the token itself."""
    rollouts = [
        made_rollout([-3.0, -0.5, math.nan, -2.0], [-0.1, -0.5, -0.2, -0.1], 3),
        made_rollout([-1.0], [-0.9], 1),
    ]
    for rollout, found in zip(rollouts, state_statistics(rollouts), strict=True):
        live = StreamStatistics(2)
        expected = [live.features()]
        for chosen, best in zip(rollout.logprobs, rollout.max_logprobs, strict=True):
            live.push(surrogate_regret(chosen, best), -chosen)
            expected.append(live.features())
        np.testing.assert_allclose(found, expected[: rollout.kept + 1])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**31))
def test_the_scaler_runs_over_all_that_it_has_seen(sizes, seed):
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.1, 10.0, len(FEATURES))
    batches = [rng.normal(3, 2, (size, len(FEATURES))) * scale for size in sizes]
    scaler = Scaler()
    for batch in batches:
        scaler.update(batch)
    seen = np.concatenate(batches)
    np.testing.assert_allclose(scaler.mean, seen.mean(0))
    np.testing.assert_allclose(scaler.variance, seen.var(0), atol=1e-9)
    scaled = scaler.scaled(seen)
    assert np.abs(scaled).max() <= 5.0
    if len(seen) > 20:
        assert np.abs(scaled.std(0) - 1.0).max() < 0.2


def test_a_statistic_that_never_moved_stays_bounded():
    scaler = Scaler()
    scaler.update(np.zeros((4, len(FEATURES))))
    assert np.all(scaler.scaled(np.ones((1, len(FEATURES)))) == 5.0)
