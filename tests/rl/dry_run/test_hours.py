"""How long a run takes, roughly."""

from __future__ import annotations

from pathlib import Path

import pytest

from espo_rl.config import load_recipe
from espo_rl.dry_run.hours import Hours, Speed
from espo_rl.dry_run.plan import RunPlan
from tests.helpers.plans import one_gpu_plan


def hours(plan: RunPlan, speed: Speed = Speed(flops=1e14, bandwidth=1e12)) -> Hours:  # noqa: B008
    return Hours.of(plan.recipe, plan.shapes, plan.longest_prompt, plan.ranks, speed)


def test_hours_are_those_of_the_arithmetic(tmp_path: Path) -> None:
    plan = one_gpu_plan(tmp_path, "0.5b", "model.gradient_checkpointing=false")
    found, parameters = hours(plan), plan.shapes["actor"].parameters
    # 200 steps of 128 rollouts at once: 512 decoding steps, by the matrix products.
    assert found.sampling == pytest.approx(
        200 * 512 * (0.005 + 2 * parameters * 128 / 0.4e14) / 3600
    )
    tokens = 200 * (128 * 512 + 16 * plan.longest_prompt)
    # Forward, backward twice as much, and a forward for the old logprobs.
    assert found.updates == pytest.approx(tokens * 8 * parameters / 0.4e14 / 3600)
    # Decoding one at a time is bound by the bandwidth.
    alone = one_gpu_plan(tmp_path, "0.5b", "rollout.concurrency=1")
    assert hours(alone).sampling == pytest.approx(
        200 * 512 * 128 * (0.005 + 2 * parameters / 1e12) / 3600
    )


def test_what_costs_hours(tmp_path: Path) -> None:
    plan = one_gpu_plan(tmp_path, "0.5b")
    for override, more in (
        ("model.lora_rank=8", False),
        ("model.gradient_checkpointing=false", False),
        ("ppo.minibatches=1", False),
        ("ppo.epochs=2", True),
        ("ppo.advantage=gae", True),
        ("ppo.kl_coefficient=0.1", True),
    ):
        other = one_gpu_plan(tmp_path, "0.5b", override)
        assert (hours(other).updates > hours(plan).updates) is more
        assert hours(other).sampling == pytest.approx(hours(plan).sampling, rel=0.01)
    assert "hours" in plan.text(Speed(1e14, 1e12))
    assert "hours" not in plan.text()


def test_the_speed_of_this_machine_is_measured() -> None:
    speed = Speed.here(load_recipe("arithmetic"))
    assert 1e9 < speed.flops < 1e16
    assert 1e8 < speed.bandwidth < 1e14
