"""Does a run fit on a machine, and what makes it fit?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from espo_rl.config import Recipe
from espo_rl.dry_run.footprint import Machine
from espo_rl.dry_run.plan import RunPlan, make_plan
from tests.helpers.plans import EIGHT, LAPTOP, only_error, qwen_plan


def fit_error(plan: RunPlan) -> str:
    (error,) = (message for message in plan.errors if "does not fit" in message)
    return error


SMALL_ONES = Machine(cpus=64, ram=1e12, gpus=(24e9,) * 8)
ONE_GPU = 'servers.vllm_args=["--gpu-memory-utilization", "0.4"]'


class TestFit:
    @pytest.mark.parametrize(
        ("machine", "ranks", "overrides"),
        [
            # ZeRO-3 helps over ranks, offloading with one, the length of micro-batches always.
            (SMALL_ONES, 8, ["deepspeed.zero_stage=1", "ppo.micro_batch_tokens=65536"]),
            (Machine(16, 512e9, (80e9,)), 1, [ONE_GPU, "stopping.value=constant"]),
            (SMALL_ONES, 8, ["model.dtype=float32", "deepspeed.zero_stage=2"]),
        ],
    )
    def test_the_advice_holds(
        self, tmp_path: Path, machine: Machine, ranks: int, overrides: list[str]
    ) -> None:
        error = fit_error(qwen_plan(tmp_path, "espo-1.5b", machine, ranks, *overrides))
        assert "in a GPU" in error
        advice = error.partition("; set ")[2].split(", ")
        better = qwen_plan(tmp_path, "espo-1.5b", machine, ranks, *overrides, *advice)
        assert better.errors == []
        for i in range(len(advice)):
            fewer = advice[:i] + advice[i + 1 :]
            worse = qwen_plan(tmp_path, "espo-1.5b", machine, ranks, *overrides, *fewer)
            assert any("not fit" in said for said in worse.errors + worse.warnings)

    def test_more_ranks_are_advised(self, tmp_path: Path) -> None:
        error = fit_error(qwen_plan(tmp_path, "espo-7b", EIGHT, 1))
        assert "--num_gpus 8" in error

    def test_no_advice_for_what_cannot_be(self, tmp_path: Path) -> None:
        error = fit_error(qwen_plan(tmp_path, "espo-7b", Machine(8, 64e9, (24e9,)), 1, ONE_GPU))
        assert error.endswith("it takes more or larger GPUs, or a smaller model")

    def test_without_a_gpu_all_is_in_ram(self, tmp_path: Path) -> None:
        error = fit_error(qwen_plan(tmp_path, "espo-7b", LAPTOP, 2))
        assert "in RAM of 16.0 GB" in error

    def test_a_rough_estimate_only_warns(self, recipe_with: Callable[..., Recipe]) -> None:
        footprint = make_plan(recipe_with(), LAPTOP).footprint
        assert footprint is not None
        sure, all_of_it = (footprint.demand(sure=sure)[1] for sure in (True, False))
        assert sure < all_of_it
        plan = make_plan(recipe_with(), Machine(2, (sure + all_of_it) / 2))
        assert plan.errors == []
        (warning,) = plan.warnings
        assert warning.startswith("may not fit")
        assert "does not fit" in only_error(make_plan(recipe_with(), Machine(2, 0.99 * sure)))

    def test_a_server_without_room(self, tmp_path: Path) -> None:
        flags = '"--tensor-parallel-size", "4", "--gpu-memory-utilization"'
        for share, found in (("0.04", "errors"), ("0.08", "warnings"), ("0.15", None)):
            override = f'servers.vllm_args=[{flags}, "{share}"]'
            plan = qwen_plan(tmp_path, "espo-7b", EIGHT, 8, override)
            assert ["policy server" in said for said in plan.errors] == (
                [True] if found == "errors" else []
            )
            assert ["some will wait" in said for said in plan.warnings] == (
                [True] if found == "warnings" else []
            )
