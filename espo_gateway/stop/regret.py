"""The maths of early stopping: statistics of the surrogate regret, and z.

Rows 2-4 of the method (arXiv 2605.29860) for many recorded rollouts at once (`smoothed_regret`).
`watch.Watch` has rows 1, 3 and 4 for one live stream, a token at a time, with equal results to the
last bit. Pure: no I/O, no asyncio. The stop rules built on it are in `rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: A logprob below this is a placeholder, not a number: servers send -9999 for a missing entry.
MISSING_LOGPROB = -9000.0

#: Longer than any stream: a larger number of tokens in a gate is a mistake.
MOST_TOKENS = 2**31 - 1

#: Numbers of an array that are worked on at once: a few such arrays stay in a processor's cache.
BLOCK = 2**14


@dataclass(frozen=True)
class RegretStatistics:
    """Running mean and variance of g over batches (row 2); frozen while a batch is generated.

    The first batch sets them outright: a mean that starts at 0 and moves by 1 % a batch would
    leave z meaningless for a hundred batches.
    """

    mean: float = 0.0
    variance: float = 1.0
    decay: float = 0.99
    batches: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), not {self.decay}")
        if self.variance < 0.0:
            raise ValueError(f"variance must not be negative, not {self.variance}")

    def updated(self, regrets: Array) -> RegretStatistics:
        """The statistics after a batch; `regrets` holds g of all its tokens, NaN where missing."""
        seen = regrets[np.isfinite(regrets)]
        if seen.size == 0:
            return self
        return self.moved(float(seen.mean()), float(seen.var()))

    def moved(self, mean: float, variance: float) -> RegretStatistics:
        """The statistics after a batch of that mean and variance."""
        decay = self.decay if self.batches else 0.0
        return replace(
            self,
            mean=decay * self.mean + (1.0 - decay) * mean,
            variance=decay * self.variance + (1.0 - decay) * variance,
            batches=self.batches + 1,
        )

    def moved_by(self, count: int, total: float, squares: float) -> RegretStatistics:
        """The statistics after a batch of so many g, given their sum and that of their squares."""
        mean = total / count
        return self.moved(mean, max(squares / count - mean * mean, 0.0))


@dataclass(frozen=True)
class MonitorConfig:
    """Constants of rows 3 and 4. The paper publishes the smoothing (0.9), not the other two."""

    smoothing: float = 0.9
    clip: float = 10.0
    delta: float = 1e-6

    def __post_init__(self) -> None:
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"smoothing must lie in [0, 1), not {self.smoothing}")
        if not self.clip > 0.0:
            raise ValueError(f"clip must be positive, not {self.clip}")
        if not self.delta > 0.0:
            raise ValueError(f"delta must be positive, not {self.delta}")


def smoothed_regret(regrets: Array, statistics: RegretStatistics, config: MonitorConfig) -> Array:
    """z of many recorded rollouts at once: what `Watch` gives, token for token.

    Args:
        regrets: g, shape [rollouts, tokens], NaN where a token is missing or past the end.

    Returns:
        z, shape [rollouts, tokens]; past the end of a rollout it stays at its last value.
    """
    inverse_deviation = 1.0 / math.sqrt(statistics.variance + config.delta)

    def normalised(regrets: Array) -> Array:
        steps = (regrets - statistics.mean) * inverse_deviation
        return np.clip(steps, -config.clip, config.clip)

    return moving_average(regrets, config.smoothing, normalised)


def moving_average(rows: Array, decay: float, of: Callable[[Array], Array] | None = None) -> Array:
    """Exponential moving average along axis 1 from 0, shape kept; a NaN leaves it unchanged.

    of: averaged in the place of each number, block by block.
    """
    out = np.empty(rows.shape, order="F")
    state: Array = np.zeros(len(rows))
    for tokens in token_blocks(rows.shape):
        part, moved = rows[:, tokens].T, out[:, tokens].T
        part = part if of is None else of(part)
        missing = np.isnan(part)
        moved[:] = np.where(missing, 0.0, (1.0 - decay) * part)
        # A missing number is a step that keeps all and adds nothing, to the last bit.
        state = recurrence(np.where(missing, 1.0, decay), moved, state)
    return out


def recurrence(keep: Iterable[Array], moved: Array, state: Array) -> Array:
    """state ← keep · state + moved, token after token.

    Args:
        keep: for each token, or more, [...].
        moved: [tokens, ...]; becomes the states after each token.
        state: that before the first token, [...].

    Returns:
        the state after the last token.
    """
    multiply, add, rest = np.multiply, np.add, np.empty_like(state)
    for kept, now in zip(keep, moved, strict=False):
        multiply(kept, state, rest)
        state = add(rest, now, now)
    return state


def running_max(rows: Array) -> Array:
    """`np.maximum.accumulate` along axis 1, at a third of its time."""
    out, shift = rows, 1
    while shift < rows.shape[1]:
        out, before = np.empty_like(out), out
        out[:, :shift] = before[:, :shift]
        np.maximum(before[:, shift:], before[:, :-shift], out[:, shift:])
        shift *= 2
    return out


def token_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Axis 1 of arrays [rollouts, tokens] in parts of about `BLOCK` numbers.

    Such arrays lie by token in memory, so that each part is one run of it.
    """
    step = max(1, BLOCK // max(shape[0], 1))
    for start in range(0, shape[1], step):
        yield slice(start, min(start + step, shape[1]))
