"""What a rollout is worth: from how it ended, and the grader's score, to its reward."""

from __future__ import annotations

from collections.abc import Sequence

from espo_rl.config import Recipe
from espo_rl.tasks.grader_pool import GraderPool
from espo_rl.types import EndReason, Rollout


async def score(rollouts: Sequence[Rollout], graders: GraderPool, recipe: Recipe) -> None:
    """Give rollouts their outcome, where it can be known, and their reward.

    One that cannot be graded becomes an error, an audited one too: as merely stopped it might leave
    its prompt without any that is finished. One that the grader hangs over is wrong, and so is one
    that a built-in grader fails over.
    """
    known = [rollout for rollout in rollouts if not rollout.stopped or rollout.audited]
    grades = await graders.grade([(rollout.answer, rollout.problem) for rollout in known])
    scores = {}
    for rollout, grade in zip(known, grades, strict=True):
        if grade.score is None:
            rollout.end, rollout.error = EndReason.ERROR, grade.error
        else:
            rollout.correct = grade.correct
            rollout.grader_timed_out = bool(grade.error)
            scores[rollout.seed] = grade.score
    for rollout in rollouts:
        rollout.audited_right = recipe.stopping.audited_right
        if rollout.end is not EndReason.ERROR:
            rollout.reward = reward(rollout, scores.get(rollout.seed), recipe)


def reward(rollout: Rollout, score: float | None, recipe: Recipe) -> float:
    """What a rollout is worth at its last token; all earlier rewards are 0.

    A stopped one gets r_fail (row 7), but for one that an audit found right, unless
    `stopping.audited_right` says so: what RL learns from is not punished once it is known. Else the
    score lies between wrong and right, less DAPO's penalty for overlong ones (arXiv 2503.14476,
    eq. 13), which over the last overlong_buffer tokens before max_tokens grows to 1.

    Args:
        score: in [0, 1]; None is for stopped ones alone.
    """
    if rollout.stopped and not rollout.spared:
        return recipe.failure_reward
    assert score is not None, f"a rollout that ended by {rollout.end} needs a score"
    ppo, buffer = recipe.ppo, recipe.ppo.overlong_buffer
    value = ppo.wrong_reward + (ppo.right_reward - ppo.wrong_reward) * score
    if buffer:
        excess = rollout.trained - (recipe.rollout.max_tokens - buffer)
        value -= min(max(excess / buffer, 0.0), 1.0)
    return value
