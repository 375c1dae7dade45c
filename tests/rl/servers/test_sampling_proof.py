"""Samples of the policy are told from those of any other setting, and the setting is named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from espo_rl.servers.sampling_proof import SamplingTest

Array = NDArray[np.float64]
VOCABULARY = 200


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def sample(
    change: Callable[[Array, list[int], list[int]], Array],
    *,
    seed: int = 0,
    tokens: int = 2048,
    temperature: float = 1.0,
    spread: float = 2.0,
    noise: float = 0.0,
) -> SamplingTest:
    """What a server samples whose distribution is `change(logits, prompt, response)`.

    The policy's logits are new at each place; noise: between the trainer's and the server's.
    """
    rng = np.random.default_rng(seed)
    test = SamplingTest(temperature)
    for _ in range(tokens // 32):
        prompt, response = list(map(int, rng.integers(0, VOCABULARY, 8))), list[int]()
        logits = rng.normal(0.0, spread, (32, VOCABULARY))
        for row in logits:
            served = row + rng.normal(0.0, noise, VOCABULARY)
            chances = change(served / temperature, prompt, response)
            response.append(int(rng.choice(VOCABULARY, p=chances)))
        test.add(prompt, response, logits, np.full(32, np.nan))
    assert test.tokens == tokens
    return test


def plainly(logits: Array, prompt: list[int], response: list[int]) -> Array:
    return softmax(logits)


def top_k(k: int) -> Callable[[Array, list[int], list[int]], Array]:
    def change(logits: Array, prompt: list[int], response: list[int]) -> Array:
        return softmax(np.where(logits >= np.sort(logits)[-k], logits, -np.inf))

    return change


def top_p(p: float) -> Callable[[Array, list[int], list[int]], Array]:
    def change(logits: Array, prompt: list[int], response: list[int]) -> Array:
        chances = softmax(logits)
        order = np.argsort(-chances)
        kept = int((np.cumsum(chances[order]) < p).sum()) + 1
        result = np.zeros_like(chances)
        result[order[:kept]] = chances[order[:kept]]
        return np.asarray(result / result.sum())

    return change


def min_p(p: float) -> Callable[[Array, list[int], list[int]], Array]:
    def change(logits: Array, prompt: list[int], response: list[int]) -> Array:
        chances = softmax(logits)
        result = np.where(chances >= p * chances.max(), chances, 0.0)
        return np.asarray(result / result.sum())

    return change


def at(temperature: float) -> Callable[[Array, list[int], list[int]], Array]:
    return lambda logits, prompt, response: softmax(logits / temperature)


def repetition(penalty: float) -> Callable[[Array, list[int], list[int]], Array]:
    def change(logits: Array, prompt: list[int], response: list[int]) -> Array:
        seen = [*prompt, *response]
        logits = logits.copy()
        picked = logits[seen]
        logits[seen] = np.where(picked > 0, picked / penalty, picked * penalty)
        return softmax(logits)

    return change


def presence(penalty: float) -> Callable[[Array, list[int], list[int]], Array]:
    def change(logits: Array, prompt: list[int], response: list[int]) -> Array:
        logits = logits.copy()
        logits[list(set(response))] -= penalty
        return softmax(logits)

    return change


def biased(logits: Array, prompt: list[int], response: list[int]) -> Array:
    """Nothing a setting does: every other token, in the order of likelihood, is rarer."""
    logits = logits.copy()
    logits[np.argsort(-logits)[:64:2]] -= 1.0
    return softmax(logits)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.25])
@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 8.0])  # from uniform to nearly certain
@pytest.mark.parametrize("seed", range(3))
def test_samples_of_the_policy_are_taken(temperature: float, spread: float, seed: int) -> None:
    test = sample(plainly, seed=seed, temperature=temperature, spread=spread)
    assert test.fault is None
    assert test.p_value > 1e-4


def test_the_rounding_of_bfloat16_is_no_fault() -> None:
    assert sample(plainly, noise=0.05).fault is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (top_k(1), "top_k"),
        (top_k(5), "top_k of about 5"),
        (top_k(20), "top_k of about 20"),
        (top_k(50), "top_k"),
        (top_p(0.8), "top_p of about 0.8"),
        (top_p(0.95), "top_p of about 0.95"),
        (min_p(0.05), "min_p of about 0.05"),
        (min_p(0.3), "min_p"),
        (at(0.6), "lower"),
        (at(0.9), "lower"),
        (at(1.2), "higher"),
        (repetition(1.6), "repetition_penalty"),
        (repetition(0.6), "more frequent"),
        (presence(1.5), "presence_penalty"),
        (biased, "another policy"),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 1.25])
def test_another_setting_is_named(
    change: Callable[[Array, list[int], list[int]], Array], named: str, temperature: float
) -> None:
    fault = sample(change, temperature=temperature, spread=1.5).fault
    assert fault is not None
    assert named in fault


def test_a_temperature_that_a_server_ignores_is_named() -> None:
    fault = sample(at(1 / 1.25), temperature=1.25).fault
    assert fault is not None
    assert "rollout.temperature" in fault


def test_too_few_tokens_prove_nothing() -> None:
    test = SamplingTest(1.0)
    assert (test.fault, test.p_value, test.tokens) == (None, 1.0, 0)
    test.add([1], [2, 0], np.zeros((2, 5)), np.zeros(2))
    assert (test.fault, test.p_value, test.tokens) == (None, 1.0, 2)


def test_tokens_that_cannot_be_are_no_error() -> None:
    logits = np.zeros((64, 10))
    logits[:, 5:] = -np.inf
    test = SamplingTest(1.0)
    test.add([0], list(np.random.default_rng(0).integers(0, 5, 64)), logits, np.zeros(64))
    assert test.fault is None
