"""Micro-batches: nothing lost, nothing twice, the same number on every rank."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from espo_rl.ppo.samples import Sample, micro_batches, share
from espo_rl.types import EndReason, Problem, Rollout

lengths = st.lists(st.integers(2, 60), min_size=1, max_size=20)


@given(lengths, st.integers(1, 200), st.integers(1, 4))
def test_every_sample_is_in_one_micro_batch_of_one_rank(
    lengths: list[int], budget: int, ranks: int
) -> None:
    shares = [share(lengths, budget, rank, ranks) for rank in range(ranks)]
    assert sorted(i for one in shares for batch in one for i in batch) == list(range(len(lengths)))
    assert len({len(one) for one in shares}) == 1  # dummies make up the number
    for batch in (batch for one in shares for batch in one if len(batch) > 1):
        assert len(batch) * max(lengths[i] for i in batch) <= budget
    # No rank is idle while another has rows to spare.
    rows = [sum(map(len, one)) for one in shares]
    assert max(rows) - min(rows) <= 1


@given(lengths, st.integers(1, 200), st.integers(1, 4), st.data())
def test_groups_stay_together_where_that_makes_no_more_micro_batches(
    lengths: list[int], budget: int, ranks: int, data: st.DataObject
) -> None:
    same = st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths))
    groups = data.draw(same)
    shares = [share(lengths, budget, rank, ranks, groups) for rank in range(ranks)]
    assert sorted(i for one in shares for batch in one for i in batch) == list(range(len(lengths)))
    for batch in (batch for one in shares for batch in one if len(batch) > 1):
        assert len(batch) * max(lengths[i] for i in batch) <= budget
    plain = share(lengths, budget, 0, ranks)
    assert len(shares[0]) <= len(plain)
    if len(set(lengths)) == 1 and ranks == 1:
        in_order = [groups[i] for batch in shares[0] for i in batch]
        assert len([1 for a, b in pairwise(in_order) if a != b]) == len(set(groups)) - 1


def sample(prompt: int, kept: int) -> Sample:
    tokens = torch.arange(1, prompt + kept + 1) + 100 * kept
    made = Sample(tokens, prompt, 0, 1.0)
    made.columns["x"] = made.tokens[prompt:].float()
    return made


def test_columns_line_up_with_the_tokens_they_belong_to() -> None:
    samples = [sample(2, 5), sample(4, 1)]
    (batch,) = micro_batches(samples, 100, rank=0, ranks=1, device="cpu")
    assert batch.tokens.shape == (2, 7)
    assert batch.targets.tolist() == batch.columns["x"].tolist()


def test_a_dummy_counts_for_nothing() -> None:
    samples = [sample(2, 5)]
    (batch,) = micro_batches(samples, 100, rank=1, ranks=2, device="cpu")
    assert batch.indices == []
    assert batch.tokens.shape == (1, 2)
    assert not batch.response.any()
    assert batch.columns["x"].shape == batch.targets.shape == (0,)


def made_rollout(logprobs: list[float], max_logprobs: list[float], kept: int) -> Rollout:
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


def test_a_stopped_rollout_that_an_audit_found_right_is_trained_on_whole() -> None:
    found = made_rollout([-0.5] * 4, [0.0] * 4, 3)
    found.correct = True
    assert Sample.of(found).tokens.tolist() == [7, 8, 1, 2, 3, 4]
    assert len(Sample.of(found).columns["served_logprobs"]) == 4


def test_a_sample_is_what_a_rollout_keeps() -> None:
    made = Sample.of(made_rollout([-0.5, -9999.0, math.nan, -2.0], [0.0] * 4, 3))
    assert made.tokens.tolist() == [7, 8, 1, 2, 3]
    assert (made.prompt, made.kept, made.group, made.reward) == (2, 3, 5, -1.0)
    # Placeholders of servers are no numbers.
    assert made.columns["served_logprobs"].tolist() == pytest.approx(
        [-0.5, math.nan, math.nan], nan_ok=True
    )
