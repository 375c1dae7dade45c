"""What is saved of the engines, and ZeRO's stages: the same weights whichever way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from espo_rl.checkpoints import CheckpointError, CheckpointStore
from espo_rl.servers.weight_files import write_safetensors
from tests.helpers.reference import Reference, parameters
from tests.helpers.trainer import (
    LEARNING_RATE,
    Paths,
    assert_same_update,
    make_rollouts,
    trainer,
    weights_of,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_optimizers_survive_a_detour(paths: Paths, tmp_path: Path, zero_stage: int) -> None:
    # With two minibatches the order in which rollouts are drawn must go on too.
    straight = trainer(paths, zero_stage=zero_stage, minibatches=2)
    straight.update(make_rollouts())
    straight.save(tmp_path)
    straight.update(make_rollouts())

    resumed = trainer(paths, zero_stage=zero_stage, minibatches=2)
    resumed.load(tmp_path)
    resumed.update(make_rollouts())
    expected = weights_of(straight)
    for name, value in weights_of(resumed).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=name)


def test_optimizer_state_matters(paths: Paths, tmp_path: Path) -> None:
    """The test above can fail: weights alone, with a new optimizer, take another step."""
    straight = trainer(paths)
    straight.update(make_rollouts())
    straight.save_models(tmp_path)
    straight.update(make_rollouts())
    fresh = trainer(Paths(tmp_path / "actor", tmp_path / "critic"))
    fresh.update(make_rollouts())
    found, expected = weights_of(fresh), weights_of(straight)
    off = [float((found[n] - v).abs().max()) for n, v in expected.items()]
    assert min(off) > 0.1 * LEARNING_RATE


def test_a_missing_engine_state_is_an_error(paths: Paths, tmp_path: Path) -> None:
    """DeepSpeed only warns: a run would go on from the base model."""
    ours = trainer(paths)
    store = CheckpointStore(tmp_path)
    checkpoint = store.save(1, "state", ours.save)
    for part in sorted((checkpoint / "critic").rglob("*"), reverse=True):
        part.unlink() if part.is_file() else part.rmdir()
    with pytest.raises(CheckpointError, match="critic"):
        store.load(checkpoint, ours.load)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_saved_models_are_the_trained_ones(paths: Paths, tmp_path: Path, zero_stage: int) -> None:
    ours = trainer(paths, zero_stage=zero_stage)
    ours.update(make_rollouts())
    ours.save_models(tmp_path)
    loaded = Reference(Paths(tmp_path / "actor", tmp_path / "critic"))
    found, expected = loaded.weights(), weights_of(ours)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    rollout = make_rollouts()[0]
    ids = rollout.prompt_ids + rollout.token_ids
    logits = loaded.actor(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected_logprobs = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert ours.prompt_logprobs(ids) == pytest.approx(expected_logprobs, abs=1e-5)


# -- ZeRO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero_stage", "offload"),
    [*((1, "none"), (2, "none"), (3, "none")), (1, "optimizer"), (2, "optimizer"), (3, "all")],
)
@pytest.mark.parametrize("budget", [40, 16384])
def test_zero_stages_agree(
    paths: Paths, reference: Reference, zero_stage: int, offload: str, budget: int
) -> None:
    ours = trainer(paths, zero_stage=zero_stage, offload=offload, micro_batch_tokens=budget)
    metrics = ours.update(make_rollouts())
    assert_same_update(weights_of(ours), reference.weights())
    assert metrics["grad_norm"] == pytest.approx(np.mean(reference.norms["actor"]), rel=1e-3)


def test_published_weights_are_whole_under_zero_3(paths: Paths, tmp_path: Path) -> None:
    sharded, plain = trainer(paths, zero_stage=3), trainer(paths)
    for ours in (sharded, plain):
        ours.update(make_rollouts())
    module = sharded.actor.module
    # Sharded indeed: what a module holds between uses is not its weights.
    assert any(value.numel() == 0 for value in module.parameters())
    specs = sharded.specs("actor")
    assert specs == plain.specs("actor")
    with (tmp_path / "weights").open("wb") as file:
        write_safetensors(file, specs, sharded.weights("actor"))
    published = load_file(tmp_path / "weights")
    expected = parameters(plain.actor)
    assert published.keys() == expected.keys()
    assert_same_update(published, expected)
    assert any(value.numel() == 0 for value in module.parameters())  # and sharded again


def test_the_reference_is_sharded_under_zero_3(paths: Paths) -> None:
    sharded = trainer(paths, zero_stage=3, kl_coefficient=0.1)
    plain = trainer(paths, kl_coefficient=0.1)
    found, expected = (ours.update(make_rollouts()) for ours in (sharded, plain))
    assert found["kl_reference"] == pytest.approx(expected["kl_reference"], rel=1e-4)
    assert all(value.numel() == 0 for value in sharded.reference.module.parameters())
