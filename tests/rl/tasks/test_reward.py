"""Scoring a batch: what a bad answer costs, and whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.stop.rules import Gate
from espo_rl.config import Recipe
from espo_rl.record.metrics import rollout_metrics
from espo_rl.rollouts.batch import Batch
from espo_rl.tasks.grader_pool import GraderPool
from espo_rl.tasks.reward import reward, score
from espo_rl.types import AuditedRight, EndReason, Problem, Rollout


def answered(text: str, seed: int, **fields: Any) -> Rollout:
    none = np.zeros(3)
    asked = Problem("1", "?", "fine")
    end = fields.pop("end", EndReason.COMPLETED)
    return Rollout(asked, [1], [1] * 3, none, none, text, end, kept=3, seed=seed, **fields)


async def scored(batch: list[Rollout], audited_right: AuditedRight = "whole", **task: Any) -> None:
    stopping = {"failure_reward": -3.0, "audited_right": audited_right}
    recipe = Recipe.model_validate({"model": {"path": "x"}, "task": task, "stopping": stopping})
    async with GraderPool(recipe.task) as graders:
        await score(batch, graders, recipe)


@pytest.mark.slow
async def test_an_answer_that_the_grader_hangs_over_is_wrong_and_counted() -> None:
    texts = ["fine", "hang", "raise", "wrong"]
    rollouts = [answered(text, seed) for seed, text in enumerate(texts)]
    rollouts.append(answered("hang", 4, end=EndReason.EARLY_STOP, audited=True))
    rollouts.append(answered("raise", 5, end=EndReason.EARLY_STOP, audited=True))
    await scored(rollouts, grader="tests.helpers.user_graders:as_told", grader_timeout=2.0)
    batch = Batch(1, 0, Gate())
    batch.ask([rollouts[0].problem], 6, ["enforce"] * 6)
    for rollout in rollouts:
        batch.put(rollout)
    assert [rollout.correct for rollout in rollouts] == [True, False, None, False, False, None]
    assert [rollout.reward for rollout in rollouts] == [1.0, -1.0, 0.0, -1.0, -3.0, 0.0]
    assert rollouts[4].audited
    # Only where the grader failed is another sampled; by hanging nothing can be gained.
    batch.ask_failed_again(2)
    assert batch.resampled == 2
    metrics = rollout_metrics(batch.all, tokens=15, audit_share=0.5, weights_version="step-0")
    assert metrics["grader_timeouts"] == 2


@pytest.mark.parametrize(("audited_right", "worth"), [("cut", 1.0), ("failed", -3.0)])
async def test_the_recipe_says_what_an_audited_right_one_is(
    audited_right: AuditedRight, worth: float
) -> None:
    stopped = answered("fine", 0, end=EndReason.EARLY_STOP, audited=True)
    stopped.kept = 2
    await scored([stopped], audited_right, grader="exact")
    assert (stopped.correct, stopped.reward, stopped.trained) == (True, worth, 2)


async def test_a_thought_that_the_prompt_opened_is_no_answer() -> None:
    texts = {r"so it is \boxed{6}": False, r"\boxed{5}</think>\boxed{6}": True}
    rollouts = [answered(text, seed, opened="<think>") for seed, text in enumerate(texts)]
    for rollout in rollouts:
        rollout.problem = Problem("1", "?", "6")
    await scored(rollouts, grader="math")
    assert [rollout.correct for rollout in rollouts] == list(texts.values())


# -- from a score to a reward ----------------------------------------------------------------------


def rollout(end: EndReason, tokens: int, **fields: Any) -> Rollout:
    none = np.zeros(tokens)
    return Rollout(
        Problem("1", "?", "18"), [1], [1] * tokens, none, none, "", end, kept=tokens, **fields
    )


def recipe(**ppo: Any) -> Recipe:
    settings = {"model": {"path": "x"}, "rollout": {"max_tokens": 100}, "ppo": ppo}
    return Recipe.model_validate({**settings, "stopping": {"failure_reward": -3.0}})


@pytest.mark.parametrize(("score", "worth"), [(1.0, 2.0), (0.0, -1.0), (0.5, 0.5)])
@pytest.mark.parametrize("end", [EndReason.COMPLETED, EndReason.LENGTH])
def test_a_score_lies_between_wrong_and_right(end: EndReason, score: float, worth: float) -> None:
    assert reward(rollout(end, 100), score, recipe(right_reward=2.0, wrong_reward=-1.0)) == worth


@pytest.mark.parametrize("score", [None, 0.0, 0.9])
def test_a_stopped_rollout_has_failed(score: float | None) -> None:
    stopped = rollout(EndReason.EARLY_STOP, 99, audited=score is not None, correct=False)
    assert reward(stopped, score, recipe(overlong_buffer=20)) == -3.0


def test_one_that_an_audit_found_right_is_worth_what_it_is_worth() -> None:
    """Whole, so that it is what its reward is of: no -1 for what is known to be right."""
    stopped = rollout(EndReason.EARLY_STOP, 95, audited=True, correct=True)
    stopped.kept = 50
    whole = rollout(EndReason.COMPLETED, 95, correct=True)
    settings = recipe(overlong_buffer=20, right_reward=2.0)
    assert reward(stopped, 1.0, settings) == reward(whole, 1.0, settings) == 2.0 - 15 / 20


@pytest.mark.parametrize(
    ("audited_right", "worth", "trained"),
    [("whole", 1.0, 95), ("cut", 1.0, 50), ("failed", -3.0, 50)],
)
def test_what_an_audit_found_right_can_be_cut_or_a_failure(
    audited_right: AuditedRight, worth: float, trained: int
) -> None:
    stopped = rollout(EndReason.EARLY_STOP, 95, audited=True, correct=True)
    stopped.kept, stopped.audited_right = 50, audited_right
    assert reward(stopped, 1.0, recipe()) == worth
    assert stopped.trained == trained


@given(
    length=st.integers(1, 100),
    buffer=st.integers(0, 100),
    score=st.floats(0, 1),
)
def test_the_overlong_penalty_is_dapos(length: int, buffer: int, score: float) -> None:
    """Equation 13 of arXiv 2503.14476, case by case."""
    penalty = 0.0 if length <= 100 - buffer else ((100 - buffer) - length) / buffer
    plain = reward(rollout(EndReason.COMPLETED, length), score, recipe())
    settings = recipe(overlong_buffer=buffer)
    end = EndReason.LENGTH if length == 100 else EndReason.COMPLETED
    found = reward(rollout(end, length), score, settings)
    assert found == pytest.approx(plain + penalty)
    assert found >= plain - 1.0


def test_a_rollout_cut_by_length_pays_the_whole_penalty() -> None:
    settings = recipe(overlong_buffer=20)
    assert reward(rollout(EndReason.LENGTH, 100), 0.0, settings) == -2.0
    assert reward(rollout(EndReason.COMPLETED, 90), 1.0, settings) == 0.5
    assert reward(rollout(EndReason.COMPLETED, 80), 1.0, settings) == 1.0
