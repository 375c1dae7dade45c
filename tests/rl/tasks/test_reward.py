"""Scoring a batch: what a bad answer costs, and whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from espo_gateway.stop.rules import Gate
from espo_rl.config import Recipe
from espo_rl.record.metrics import rollout_metrics
from espo_rl.rollouts.batch import Batch
from espo_rl.tasks.grader_pool import GraderPool
from espo_rl.tasks.reward import score
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
