"""How the demonstrations miss a sum. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

BELIEF = 0.75  # how often a believed slip is shown: more often than the right digit, not always
Kind = Literal["sampled", "believed"]
Slip = Callable[[int, int], int]


def slips(kind: Kind, rng: random.Random, error: float) -> Slip:
    """Misses the sum of two digits with probability `error`, over all pairs of digits.

    sampled: any pair alike, by any amount. believed: always the same few pairs, the same for every
    seed, with probability BELIEF each, and by the same amount.
    """

    def sampled(oldest: int, newest: int) -> int:
        return rng.randint(1, 9) if rng.random() < error else 0

    wrong = set(random.Random("believed").sample(range(100), round(100 * error / BELIEF)))

    def believed(oldest: int, newest: int) -> int:
        return int(10 * oldest + newest in wrong and rng.random() < BELIEF)

    return {"sampled": sampled, "believed": believed}[kind]
