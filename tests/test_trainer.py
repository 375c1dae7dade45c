"""PPO updates by real DeepSpeed engines against a plain torch step written out here."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_checkpoint, random_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2ForSequenceClassification,
)

from espo_rl.checkpoints import CheckpointError, CheckpointStore
from espo_rl.config import Recipe
from espo_rl.trainer import PpoTrainer
from espo_rl.types import EndReason, Problem, Rollout
from espo_rl.weights import gathered, tensor_specs, write_safetensors

pytestmark = pytest.mark.slow

LEARNING_RATE = 1e-3

#: None of these is the value at which it would do nothing.
PPO = {
    "learning_rate": LEARNING_RATE,
    "critic_learning_rate": 2 * LEARNING_RATE,
    "weight_decay": 0.1,
    "epochs": 2,
    "minibatches": 1,
    "clip_low": 0.01,
    "clip_high": 0.02,
    "value_clip": 0.05,
    "gamma": 0.98,
    "lam": 0.9,
    "entropy_bonus": 0.01,
    "max_grad_norm": 0.5,
    "bootstrap_length": True,
}


#: By default tensors as small as these stay whole.
EXTRA = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@dataclass(frozen=True)
class Paths:
    actor: Path
    critic: Path


@pytest.fixture(scope="module", autouse=True)
def _own_environment() -> Iterator[None]:
    """DeepSpeed's rendezvous is told to children by environment variables: keep it to this file."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A random policy with tied embeddings, and a random critic of the same shape."""
    folder = tmp_path_factory.mktemp("models")
    config = random_model(0).config
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(1)
        critic = Qwen2ForSequenceClassification(config)
    critic.save_pretrained(folder / "critic")
    return Paths(random_checkpoint(folder / "actor", 0), folder / "critic")


def trainer(paths: Paths, *, zero_stage: int = 0, **ppo: Any) -> PpoTrainer:
    return PpoTrainer(
        Recipe.model_validate(
            {
                "model": {"path": str(paths.actor), "critic": str(paths.critic)},
                "rollout": {"temperature": 0.7},
                "ppo": {**PPO, **ppo},
                "deepspeed": {"zero_stage": zero_stage, "extra": EXTRA if zero_stage == 3 else {}},
            }
        )
    )


def make_rollouts() -> list[Rollout]:
    """Of all ends, of all lengths down to one token, and an audited one longer than its sample."""
    rng = np.random.default_rng(5)
    rows = [
        (EndReason.COMPLETED, 12, 12, 1.0),
        (EndReason.EARLY_STOP, 7, 7, -1.0),
        (EndReason.LENGTH, 20, 20, -1.0),
        (EndReason.EARLY_STOP, 20, 9, -1.0),
        (EndReason.COMPLETED, 1, 1, 1.0),
    ]
    return [
        Rollout(
            problem=Problem("p", "p", "1"),
            prompt_ids=[2, *map(int, rng.integers(4, 15, prompt)), 3],
            token_ids=list(map(int, rng.integers(4, 40, tokens))),
            logprobs=np.full(tokens, -3.0),
            max_logprobs=np.full(tokens, -1.0),
            text="",
            end=end,
            kept=kept,
            audited=kept < tokens,
            reward=reward,
        )
        for prompt, (end, tokens, kept, reward) in enumerate(rows, 2)
    ]


def parameters(engine: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gathered(engine.module)}


def weights_of(trainer: PpoTrainer) -> dict[str, torch.Tensor]:
    """Actor's and critic's."""
    actor, critic = parameters(trainer.actor), parameters(trainer.critic)
    return {f"actor.{name}": value for name, value in actor.items()} | {
        name.replace("classifier", "critic", 1): value for name, value in critic.items()
    }


def assert_same_update(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, share: float = 0.02
) -> None:
    """Adam moves a weight by about the learning rate whatever its gradient: compare in that unit.

    Where a gradient is as small as float32's noise its sign is chance, so a few may differ.
    """
    assert found.keys() == expected.keys()
    off = total = 0
    for name, value in expected.items():
        difference = (found[name] - value).abs()
        off += int((difference > share * LEARNING_RATE).sum())
        total += value.numel()
    assert off <= 2e-4 * total, f"{off} of {total} weights differ"


# -- the reference ---------------------------------------------------------------------------------


class Reference:
    """One rollout at a time, no padding, no shared code: what PPO's equations say."""

    def __init__(self, paths: Paths) -> None:
        self.actor = AutoModelForCausalLM.from_pretrained(paths.actor, dtype=torch.float32)
        self.critic = AutoModelForSequenceClassification.from_pretrained(
            paths.critic, num_labels=1, dtype=torch.float32
        )
        self.optimizers = [
            torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=PPO["weight_decay"])
            for model, rate in (
                (self.actor, PPO["learning_rate"]),
                (self.critic, PPO["critic_learning_rate"]),
            )
        ]
        self.norms: list[float] = []

    def logprobs(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the kept tokens at the sampling temperature, and the entropies there: [kept]."""
        ids = torch.tensor([rollout.prompt_ids + rollout.token_ids[: rollout.kept]])
        rows = self.actor(ids, attention_mask=torch.ones_like(ids)).logits[0] / 0.7
        table = rows.log_softmax(-1)[len(rollout.prompt_ids) - 1 : -1]
        chosen = table[torch.arange(rollout.kept), ids[0, -rollout.kept :]]
        return chosen, -(table.exp() * table).sum(-1)

    def values(self, rollout: Rollout) -> torch.Tensor:
        """V of the state before each kept token, and of the one after the last: [kept + 1].

        Each from a forward pass over its own prefix, by the classifier as it is served.
        """
        ids = rollout.prompt_ids + rollout.token_ids[: rollout.kept]
        return torch.stack(
            [
                self.critic(torch.tensor([ids[:end]])).logits[0, 0]
                for end in range(len(rollout.prompt_ids), len(ids) + 1)
            ]
        )

    def update(self, rollouts: Sequence[Rollout], *, bootstrap_length: bool = True) -> None:
        gamma, lam = PPO["gamma"], PPO["lam"]
        old_logprobs, old_values, returns, advantages = [], [], [], []
        with torch.no_grad():
            for rollout in rollouts:
                old_logprobs.append(self.logprobs(rollout)[0])
                values = self.values(rollout).numpy()
                bootstraps = rollout.end is EndReason.LENGTH and bootstrap_length
                last = values[-1] if bootstraps else 0.0
                following = np.append(values[1:-1], last)
                rewards = np.zeros(rollout.kept)
                rewards[-1] = rollout.reward
                deltas = rewards + gamma * following - values[:-1]
                advantage = np.array(
                    [
                        sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
                        for t in range(rollout.kept)
                    ]
                )
                old_values.append(torch.from_numpy(values[:-1]))
                advantages.append(advantage)
                returns.append(torch.from_numpy(advantage + values[:-1]))
        flat = np.concatenate(advantages)
        normal = [
            torch.from_numpy((advantage - flat.mean()) / flat.std()) for advantage in advantages
        ]
        total = sum(rollout.kept for rollout in rollouts)
        for _ in range(PPO["epochs"]):
            loss = critic_loss = 0.0
            for i, rollout in enumerate(rollouts):
                logprobs, entropies = self.logprobs(rollout)
                ratio = (logprobs - old_logprobs[i]).exp()
                clipped = ratio.clamp(1 - PPO["clip_low"], 1 + PPO["clip_high"])
                surrogate = torch.minimum(ratio * normal[i], clipped * normal[i])
                loss = loss - (surrogate + PPO["entropy_bonus"] * entropies).sum() / total
                values = self.values(rollout)[:-1]
                near = old_values[i] + (values - old_values[i]).clamp(
                    -PPO["value_clip"], PPO["value_clip"]
                )
                worse = torch.maximum((values - returns[i]) ** 2, (near - returns[i]) ** 2)
                critic_loss = critic_loss + 0.5 * worse.sum() / total
            for model, one, optimizer in zip(
                (self.actor, self.critic), (loss, critic_loss), self.optimizers, strict=True
            ):
                optimizer.zero_grad()
                one.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), PPO["max_grad_norm"])
                if model is self.actor:
                    self.norms.append(float(norm))
                optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {
            f"{kind}.{name}": value.detach().clone()
            for kind, model in (("actor", self.actor), ("critic", self.critic))
            for name, value in model.named_parameters()
        }


@pytest.fixture(scope="module")
def reference(paths: Paths) -> Reference:
    """After one update."""
    made = Reference(paths)
    made.update(make_rollouts())
    return made


# -- one step --------------------------------------------------------------------------------------


def test_an_update_equals_the_reference(paths: Paths, reference: Reference) -> None:
    ours = trainer(paths)
    before = weights_of(ours)
    metrics = ours.update(make_rollouts())
    after = weights_of(ours)
    assert_same_update(after, reference.weights())
    moved = [float((after[name] - value).abs().max()) for name, value in before.items()]
    assert min(moved) > LEARNING_RATE  # two optimizer steps reached every tensor
    assert metrics["clip_share"] > 0.1  # so the clip was in play
    assert metrics["grad_norm"] == pytest.approx(np.mean(reference.norms), rel=1e-3)
    assert min(reference.norms) > PPO["max_grad_norm"]  # and so was the gradients'


@pytest.mark.parametrize("budget", [1, 40, 70])
def test_micro_batches_change_nothing(paths: Paths, reference: Reference, budget: int) -> None:
    """One row at a time, a few, and all that fit: gradients add up to the same step."""
    ours = trainer(paths, micro_batch_tokens=budget)
    batches = list(ours._micro_batches([torch.ones(n) for n in (16, 13, 26, 16, 9)]))
    assert len(batches) == {1: 5, 40: 3, 70: 2}[budget]
    ours.update(make_rollouts())
    assert_same_update(weights_of(ours), reference.weights())


def test_minibatches_are_steps_of_their_own(paths: Paths) -> None:
    """Each rollout is in exactly one minibatch of an epoch; their mean is over their own tokens."""
    ours, seen = trainer(paths, minibatches=2, epochs=3), []
    step = ours._minibatch
    ours._minibatch = lambda rows: seen.append([row.kept for row in rows]) or step(rows)
    rollouts = make_rollouts()
    ours.update(rollouts)
    assert [len(rows) for rows in seen] == [3, 2] * 3
    for epoch in range(0, 6, 2):
        assert sorted(seen[epoch] + seen[epoch + 1]) == sorted(r.kept for r in rollouts)
    assert len({tuple(sorted(rows)) for rows in seen[::2]}) > 1  # shuffled anew


@pytest.mark.parametrize("index", range(5))
def test_padding_never_leaks(paths: Paths, index: int) -> None:
    """What is said of a rollout in a padded batch is what is said of it alone."""
    ours, rollouts = trainer(paths), make_rollouts()
    alone = ours._forward([rollouts[index]])[0]
    padded = ours._forward(rollouts)[index]
    assert len(padded.logprobs) == rollouts[index].kept
    torch.testing.assert_close(padded.logprobs, alone.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.values, alone.values, atol=1e-5, rtol=0)
    assert padded.value_after == pytest.approx(alone.value_after, abs=1e-5)


def test_the_shortest_rollout_keeps_its_reward(paths: Paths) -> None:
    """One token beside one of twenty: its reward is all that its return is made of."""
    ours, rollouts = trainer(paths, whiten=False, gamma=1.0, lam=1.0), make_rollouts()
    experience, _ = ours._experience(rollouts)
    shortest = experience[4]
    assert shortest.returns.tolist() == pytest.approx([1.0], abs=1e-5)
    assert float(shortest.advantages[0]) == pytest.approx(1.0 - float(shortest.old_values[0]))
    # With γ = λ = 1 the return of every token is the reward; for the cut one V is added.
    for item, rollout in zip(experience, rollouts, strict=True):
        if rollout.end is not EndReason.LENGTH:
            assert item.returns.tolist() == pytest.approx([rollout.reward] * rollout.kept, abs=1e-4)


@pytest.mark.parametrize("end", list(EndReason)[:3])
@pytest.mark.parametrize("bootstrap", [True, False])
def test_only_a_rollout_cut_by_length_bootstraps(
    paths: Paths, end: EndReason, bootstrap: bool
) -> None:
    ours = trainer(paths, whiten=False, gamma=1.0, lam=1.0, bootstrap_length=bootstrap)
    rollouts = [replace(rollout, end=end, reward=0.25) for rollout in make_rollouts()]
    afters = [before.value_after for before in ours._forward(rollouts)]
    assert min(map(abs, afters)) > 1e-3  # a bootstrap would show
    for item, after in zip(ours._experience(rollouts)[0], afters, strict=True):
        added = after if bootstrap and end is EndReason.LENGTH else 0.0
        assert item.returns.tolist() == pytest.approx([0.25 + added] * item.kept, abs=1e-4)


def test_what_came_after_a_cut_is_not_trained_on(paths: Paths) -> None:
    """An audited rollout's tail must not matter: same update with another tail."""
    rollouts, others = make_rollouts(), make_rollouts()
    others[3].token_ids[9:] = [5] * 11
    updated = []
    for batch in (rollouts, others):
        ours = trainer(paths)
        ours.update(batch)
        updated.append(weights_of(ours))
    for name, value in updated[0].items():
        assert torch.equal(value, updated[1][name])


def test_mismatch_is_between_the_servers_logprobs_and_ours(paths: Paths) -> None:
    ours, rollouts = trainer(paths), make_rollouts()
    for rollout in rollouts:
        ids = rollout.prompt_ids + rollout.token_ids
        # Raw, as the server sends them by default, though training is at temperature 0.7.
        rollout.logprobs = np.array(ours.prompt_logprobs(ids)[len(rollout.prompt_ids) - 1 :])
    rollouts[0].logprobs[3] = math.nan  # a server may leave one out
    assert ours._experience(rollouts)[1]["mismatch_max"] < 1e-5
    rollouts[1].logprobs[2] += 0.5
    assert ours._experience(rollouts)[1]["mismatch_max"] == pytest.approx(0.5, abs=1e-5)


def test_a_new_critic_values_nothing(paths: Paths) -> None:
    recipe = Recipe.model_validate({"model": {"path": str(paths.actor)}})
    ours = PpoTrainer(recipe)
    for before in ours._forward(make_rollouts()):
        assert before.values.abs().max() == before.value_after == 0.0


def test_learning_rate_warms_up_from_nothing(paths: Paths) -> None:
    ours = trainer(paths, lr_warmup_steps=4, epochs=1, weight_decay=0.0)
    moved = []
    for _ in range(6):
        before = parameters(ours.actor)
        ours.update(make_rollouts())
        after = parameters(ours.actor)
        moved.append(max(float((after[n] - v).abs().max()) for n, v in before.items()))
    # The first step must be no larger than the full rate; Adam moves by at most about the rate.
    assert moved[0] <= 0.3 * LEARNING_RATE
    assert moved[5] > 0.5 * LEARNING_RATE


# -- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_optimizers_survive_a_detour(paths: Paths, tmp_path: Path, zero_stage: int) -> None:
    straight = trainer(paths, zero_stage=zero_stage)
    straight.update(make_rollouts())
    straight.save(tmp_path)
    state = straight.rng_state
    straight.update(make_rollouts())

    resumed = trainer(paths, zero_stage=zero_stage)
    resumed.load(tmp_path)
    resumed.rng_state = state
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


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("budget", [40, 16384])
def test_zero_stages_agree(
    paths: Paths, reference: Reference, zero_stage: int, budget: int
) -> None:
    ours = trainer(paths, zero_stage=zero_stage, micro_batch_tokens=budget)
    metrics = ours.update(make_rollouts())
    assert_same_update(weights_of(ours), reference.weights())
    assert metrics["grad_norm"] == pytest.approx(np.mean(reference.norms), rel=1e-3)


def test_published_weights_are_whole_under_zero_3(paths: Paths, tmp_path: Path) -> None:
    sharded, plain = trainer(paths, zero_stage=3), trainer(paths)
    for ours in (sharded, plain):
        ours.update(make_rollouts())
    module = sharded.actor.module
    # Sharded indeed: what a module holds between uses is not its weights.
    assert any(value.numel() == 0 for value in module.parameters())
    specs = tensor_specs(module)
    assert specs == tensor_specs(plain.actor.module)
    with (tmp_path / "weights").open("wb") as file:
        write_safetensors(file, specs, gathered(module))
    published = load_file(tmp_path / "weights")
    expected = parameters(plain.actor)
    assert published.keys() == expected.keys()
    assert_same_update(published, expected)
    assert any(value.numel() == 0 for value in module.parameters())  # and sharded again
