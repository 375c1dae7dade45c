"""Numbers of a recipe: none is without bounds, and none that is taken fails later."""

from __future__ import annotations

import random
import re
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np
import pytest
import torch

from espo_gateway.stop.rules import Gate
from espo_rl.config import Recipe, RecipeError, Stopping, load_recipe
from espo_rl.evaluate.results import Sampling
from espo_rl.gate.audits import Audits
from espo_rl.gate.batch_gates import StopController
from espo_rl.types import Problem, first_seed


def kinds(annotation: Any) -> set[Any]:
    """The types in a field's annotation, but for those in a list."""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return kinds(parts[0])
    if get_origin(annotation) in (Union, UnionType):
        return set[Any]().union(*map(kinds, parts))
    return {annotation}


def numbers() -> list[tuple[str, bool]]:
    """Every number of the recipe, and whether it is whole."""
    found = []
    for section, field in Recipe.model_fields.items():
        assert field.annotation is not None
        for key, one in field.annotation.model_fields.items():
            types = kinds(one.annotation)
            if types & {int, float}:
                found.append((f"{section}.{key}", int in types))
    assert len(found) > 60
    return found


@pytest.mark.parametrize("key", [key for key, _ in numbers()])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300", "-1e300", "1e39", f"{10**30}"])
def test_no_number_is_without_bounds(key: str, value: str) -> None:
    """float32 has none above 3.4e38, Parquet's and vLLM's whole numbers end at 2^31 and 2^63."""
    with pytest.raises(RecipeError) as error:
        load_recipe("arithmetic", [f"{key}={value}"])
    assert f"  {key}: " in str(error.value)


@pytest.mark.parametrize("key", [key for key, whole in numbers() if whole])
def test_no_whole_number_is_negative(key: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"  {key}: ")):
        load_recipe("arithmetic", [f"{key}=-1"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"run.seed={2**63}", "run.seed"),
        ("run.steps=100000000", "run.steps"),  # a folder's name has eight digits
        ("rollout.temperature=2.1", "rollout.temperature"),
        ("rollout.temperature=0.001", "rollout.temperature"),  # vLLM would sample at 0.01
        ("evaluation.temperature=0.001", "evaluation.temperature"),
        ("evaluation.temperature=2.1", "evaluation.temperature"),
        ("evaluation.samples=65537", "evaluation.samples"),
        (f"rollout.max_tokens={2**31}", "rollout.max_tokens"),
        (f"rollout.timeout={1e10}", "rollout.timeout"),  # no timer waits for so long
        ("ppo.weight_decay=-0.1", "ppo.weight_decay"),
        ("stopping.right_lost=1e-320", "stopping.right_lost"),
        ("stopping.p_star_max=1e-6", "stopping.p_star_max"),  # the strictest: nothing lies below
        # What another type could be read as.
        ("rollout.n=true", "rollout.n"),
        ("rollout.n='8'", "rollout.n"),
        ("rollout.temperature=true", "rollout.temperature"),
        ("run.seed=false", "run.seed"),
        ("task.steps=[true]", "task.steps"),
        ("model.liger='yes'", "model.liger"),
        ("model.liger=1", "model.liger"),
        ("servers.policy_servers=100000", "servers.policy_servers"),
        ("servers.policy_urls=['http://127.0.0.1:99999']", "servers.policy_urls"),
        ("servers.policy_urls=['http://127.0.0.1:0']", "servers.policy_urls"),
        ("servers.policy_urls=['http://127.0.0.1:x']", "servers.policy_urls"),
        ("servers.policy_urls=['127.0.0.1:8000']", "servers.policy_urls"),
        ("servers.policy_urls=['']", "servers.policy_urls"),
        ("servers.policy_urls=['http://127.0.0.1:8000/v1']", "servers.policy_urls"),
        ("servers.critic_url=http://127.0.0.1:65536", "servers.critic_url"),
    ],
)
def test_a_number_that_would_fail_later_is_refused_by_its_name(override: str, key: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("arithmetic", [override])
    assert f"  {key}" in str(error.value)


def edges() -> list[str]:
    """What sets each number of [stopping] to the ends of what it may be."""
    found = []
    for key, _ in numbers():
        section, _, name = key.partition(".")
        if section == "stopping":
            for bound in Stopping.model_fields[name].metadata:
                ends = (getattr(bound, end, None) for end in ("ge", "le"))
                found += [f"{key}={end}" for end in ends if end is not None]
    assert len(found) > 30
    return found


@pytest.mark.parametrize("edge", edges())
@pytest.mark.parametrize("rule", ["success-probability", "value-gated"])
def test_a_gate_takes_every_number_of_its_recipe(edge: str, rule: str) -> None:
    """It is first made when servers run and an evaluation is done."""
    given = [f"stopping.rule={rule}", "stopping.threshold=share", "rollout.max_tokens=2147483647"]
    probe = ["stopping.sources=['probe']"] if rule == "success-probability" else []
    try:
        recipe = load_recipe("arithmetic", [*given, *probe, edge])
    except RecipeError:
        return  # refused before anything runs
    audits = Audits.of(recipe.stopping.audit_share, recipe.rollout.n)
    stopping = StopController(recipe.stopping, 9, random.Random(0), audits=audits)
    assert stopping.gate("step-0").rule == "none"  # nothing is known yet


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_every_seed_that_is_taken_works(seed: int) -> None:
    assert load_recipe("arithmetic", [f"run.seed={seed}"]).run.seed == seed
    torch.manual_seed(seed)
    np.random.default_rng(seed)
    for number in (0, 1, 99_999_999):
        assert 0 <= first_seed(seed, number) < 2**63 - 9 * 65_536
    request = Sampling(k=2, temperature=1.0, seed=seed).request(Problem("p", "p", "1"), 7, 1)
    assert 0 <= request.seed < 2**63


def test_small_seeds_stand_for_what_they_always_did() -> None:
    assert first_seed(3, 7) == (3 * 1_000_003 + 7) * 65_536
    assert len({first_seed(seed, step) for seed in range(50) for step in range(50)}) == 2500


@pytest.mark.parametrize("edge", [1e9, -1e9])
def test_rewards_at_the_edge_fit_a_gate(edge: float) -> None:
    worth = (edge, edge + 1.0) if edge < 0 else (edge - 1.0, edge)
    assert np.float32(worth[0]) != np.inf
    assert Gate(critic_wrong=worth[0], critic_right=worth[1])
