"""Liger's kernels: when they are refused, and what is asked of the library, which needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from espo_rl.config import Model, load_recipe
from espo_rl.dry_run.footprint import Machine
from espo_rl.dry_run.plan import make_plan
from espo_rl.ppo.kernels import KernelError, check_liger, fuse
from tests.helpers.models import random_checkpoint, random_model


def test_without_a_gpu_or_the_package_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Model(path="m", liger=True)
    check_liger(Model(path="m"), on_gpu=False)
    with pytest.raises(KernelError, match=r"model\.liger = true: .* GPUs alone; leave it out"):
        check_liger(asked, on_gpu=False)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(KernelError, match=r"model\.liger: .*pip install '\.\[gpu\]'"):
        check_liger(asked, on_gpu=True)
    # Before anything starts.
    model = random_checkpoint(tmp_path / "model", 0)
    given = [f"model.path={model}", f"run.output={tmp_path / 'run'}", "model.liger=true"]
    plan = make_plan(load_recipe("arithmetic", given), Machine(2, 16e9))
    assert [error for error in plan.errors if "model.liger" in error]


def test_all_but_the_loss_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Liger's function for one instance of a model takes it."""
    asked: dict[str, Any] = {}
    library = SimpleNamespace(
        _apply_liger_kernel_to_instance=lambda model, **fused: asked.update(fused, model=model)
    )
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", library)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    model = random_model(0)
    fuse(model, Model(path="m"))
    assert not asked
    fuse(model, Model(path="m", liger=True))
    assert asked.pop("model") is model
    assert asked == {
        **{"rope": True, "rms_norm": True, "swiglu": True},
        **{"cross_entropy": False, "fused_linear_cross_entropy": False},
    }
