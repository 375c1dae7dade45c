"""Micro-batches: nothing lost, nothing twice, the same number on every rank."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from espo_rl.batching import Sample, micro_batches, share
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


def test_a_sample_is_what_a_rollout_keeps():
    rollout = Rollout(
        problem=Problem("p", "p", "1"),
        prompt_ids=[7, 8],
        token_ids=[1, 2, 3, 4],
        logprobs=np.array([-0.5, -9999.0, math.nan, -2.0]),
        max_logprobs=np.zeros(4),
        text="",
        end=EndReason.EARLY_STOP,
        kept=3,
        audited=True,
        reward=-1.0,
        group=5,
    )
    made = Sample.of(rollout)
    assert made.tokens.tolist() == [7, 8, 1, 2, 3]
    assert (made.prompt, made.kept, made.group, made.reward) == (2, 3, 5, -1.0)
    # Placeholders of servers are no numbers.
    assert made.columns["served_logprobs"].tolist() == pytest.approx(
        [-0.5, math.nan, math.nan], nan_ok=True
    )
