"""A step's rollouts while they come in: nothing asked twice, nothing lost, order from the seeds."""

from __future__ import annotations

import pickle
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.stop.gate_json import Mode
from espo_gateway.stop.rules import Gate
from espo_rl.rollouts.batch import Batch
from espo_rl.types import EndReason, Problem, Rollout

PROBLEMS = [Problem(id=str(i), prompt=str(i), answer="0") for i in range(4)]


def batch_of(problems: int = 4, n: int = 2) -> Batch:
    batch = Batch(step=1, first_seed=100, gate=Gate())
    modes: list[Mode] = ["enforce"] * (problems * n)
    batch.ask(PROBLEMS[:problems], n, modes)
    return batch


def answer(batch: Batch, seed: int, *, reward: float = 0.0, failed: bool = False) -> Rollout:
    """Put a rollout for a waiting sample."""
    sample = batch.waiting[seed]
    rollout = Rollout(
        problem=sample.problem,
        prompt_ids=[1],
        token_ids=[2],
        logprobs=np.zeros(1),
        max_logprobs=np.zeros(1),
        text="",
        end=EndReason.ERROR if failed else EndReason.COMPLETED,
        kept=1,
        reward=reward,
        group=sample.group,
        seed=seed,
    )
    batch.put(rollout)
    return rollout


def test_samples_have_consecutive_seeds_their_prompts_group_and_their_mode() -> None:
    batch = Batch(step=1, first_seed=100, gate=Gate())
    batch.ask(PROBLEMS[:2], 2, ["enforce", "shadow", "enforce", "enforce"])
    samples = list(batch.waiting.values())
    assert [sample.seed for sample in samples] == [100, 101, 102, 103]
    assert [sample.group for sample in samples] == [0, 0, 1, 1]
    assert [sample.mode for sample in samples] == ["enforce", "shadow", "enforce", "enforce"]
    batch.ask(PROBLEMS[2:3], 1, ["enforce"])
    assert (batch.waiting[104].group, batch.rounds) == (2, 2)


@given(st.randoms(use_true_random=False))
def test_order_is_that_of_asking_whatever_came_first(rng: random.Random) -> None:
    batch = batch_of()
    seeds = list(batch.waiting)
    for seed in rng.sample(seeds, len(seeds)):
        answer(batch, seed)
    assert [rollout.seed for rollout in batch.usable] == seeds
    assert not batch.waiting


def test_an_error_is_replaced_by_another_sample_of_its_prompt_so_often_and_no_more() -> None:
    batch = batch_of(problems=2)
    for seed in list(batch.waiting):
        answer(batch, seed, failed=seed == 102)
    for attempt in (1, 2):
        batch.ask_failed_again(2)
        (sample,) = batch.waiting.values()
        assert (sample.problem, sample.group, sample.attempt) == (PROBLEMS[1], 1, attempt)
        assert sample.seed not in batch.rollouts
        answer(batch, sample.seed, failed=True)
    batch.ask_failed_again(2)
    assert not batch.waiting
    assert (len(batch.failed), len(batch.usable), batch.resampled) == (1, 3, 2)


def test_what_a_server_lost_is_asked_again_under_its_own_seed() -> None:
    batch = batch_of(problems=2)
    for seed in (100, 101):
        answer(batch, seed, failed=seed == 101)
    batch.recall_failed()
    assert sorted(batch.waiting) == [101, 102, 103]
    assert [rollout.seed for rollout in batch.usable] == [100]
    batch.ask_failed_again(2)  # it was no failure of the sample
    assert batch.resampled == 0


def test_what_comes_after_all_is_graded() -> None:
    """Though its error was, as one that nobody could grade."""
    batch = batch_of(problems=2)
    for seed in list(batch.waiting):
        answer(batch, seed, failed=seed == 101)
    batch.scored.update(batch.rollouts)
    batch.recall_failed()
    answer(batch, 101)
    assert [rollout.seed for rollout in batch.unscored] == [101]


def test_a_replacement_stands_with_its_prompts_rollouts() -> None:
    batch = batch_of(problems=2)
    for seed in list(batch.waiting):
        answer(batch, seed, failed=seed == 100)
    batch.ask_failed_again(1)
    answer(batch, 104)
    assert [rollout.seed for rollout in batch.usable] == [101, 104, 102, 103]


def test_prompts_whose_rewards_are_all_the_same_tell_nothing() -> None:
    batch = batch_of(problems=3)
    rewards = {100: 1.0, 101: 1.0, 102: -1.0, 103: 1.0, 104: -1.0, 105: -1.0}
    for seed, reward in rewards.items():
        answer(batch, seed, reward=reward)
    assert [rollout.seed for rollout in batch.informative()] == [102, 103]


def test_a_half_full_batch_survives_a_checkpoint() -> None:
    batch = batch_of()
    answer(batch, 103)
    answer(batch, 105, failed=True)
    again = pickle.loads(pickle.dumps(batch))
    assert list(again.waiting) == list(batch.waiting)
    assert sorted(again.rollouts) == [103, 105]
    again.ask_failed_again(1)
    assert again.waiting[108].problem == batch.rollouts[105].problem
