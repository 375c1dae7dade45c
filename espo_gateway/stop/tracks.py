"""What a rule follows in a stream beside z: an average of -log p, a windowed confidence, a draw.

Each is a `Track` of one live stream, and a function that gives the same for recorded rollouts, to
the last bit. Pure.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.regret import MISSING_LOGPROB, Array, token_blocks

_MASK = 2**64 - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_DOUBLE, _BITS = struct.Struct("<d"), struct.Struct("<Q")


class StreamChance:
    """Uniform numbers drawn from one live stream itself, for the random rule.

    A replay draws what the live stream drew, to the last bit: the "draw" at a token is a hash of
    the gate's version and the bits of all logprobs up to it.
    """

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        self._state = _seeded(seed)

    def push(self, logprob: float, confidence: float | None = None) -> float:
        """Take the next token's logprob and return its draw, uniform in [0, 1)."""
        (bits,) = _BITS.unpack(_DOUBLE.pack(logprob))
        self._state = _mixed(self._state ^ bits)
        return _uniform(self._state)


def stream_draws(seed: int, logprobs: Array, known: NDArray[np.bool_]) -> Array:
    """What `StreamChance` gives for many recorded rollouts, token for token.

    Args:
        logprobs: shape [rollouts, tokens].
        known: the same shape; elsewhere nothing is pushed and the last draw stands.

    Returns:
        shape [rollouts, tokens].
    """
    state = np.full(len(logprobs), _seeded(seed), dtype=np.uint64)
    draws = np.empty(logprobs.shape, order="F")
    mix = _Mixer(len(logprobs))
    for tokens in token_blocks(logprobs.shape):
        bits = np.ascontiguousarray(logprobs[:, tokens].T, dtype=np.float64).view(np.uint64)
        there = known[:, tokens].T
        whole = np.all(there, axis=1)
        states = np.empty_like(bits)
        for now, pushed, told, all_told in zip(states, bits, there, whole, strict=True):
            np.bitwise_xor(state, pushed, now)
            mix(now)
            if not all_told:
                np.copyto(now, state, where=~told)
            state = now
        draws[:, tokens] = _uniform(states).T
    return draws


def _seeded(seed: int) -> int:
    return seed * _GOLDEN & _MASK


def _mixed(state: int) -> int:
    """A step of the generator splitmix64."""
    state = state + _GOLDEN & _MASK
    state = (state ^ (state >> 30)) * _FIRST & _MASK
    state = (state ^ (state >> 27)) * _SECOND & _MASK
    return state ^ (state >> 31)


class _Mixer:
    """`_mixed` of each of so many, in its place."""

    def __init__(self, count: int) -> None:
        # Whole arrays: to make one of a number takes longer than the sum.
        self._constants = [
            np.full(count, number, dtype=np.uint64)
            for number in (_GOLDEN, 30, _FIRST, 27, _SECOND, 31)
        ]
        self._shifted = np.empty(count, dtype=np.uint64)

    def __call__(self, states: NDArray[np.uint64]) -> None:
        shift, xor, multiply = np.right_shift, np.bitwise_xor, np.multiply
        shifted = self._shifted
        golden, first_shift, first, second_shift, second, last_shift = self._constants
        np.add(states, golden, states)
        xor(states, shift(states, first_shift, shifted), states)
        multiply(states, first, states)
        xor(states, shift(states, second_shift, shifted), states)
        multiply(states, second, states)
        xor(states, shift(states, last_shift, shifted), states)


def _uniform(state: Any) -> Any:
    return (state >> 11) * 2.0**-53


class Track(Protocol):
    """What a rule follows in a live stream beside z."""

    def push(self, logprob: float, confidence: float | None) -> float:
        """Take the next token and return the score; NaN where there is nothing to decide by."""


class MeanSurprise:
    """Exponential average of -log p of the sampled tokens, from 0."""

    __slots__ = ("_decay", "_mean")

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._mean = 0.0

    def push(self, logprob: float, confidence: float | None) -> float:
        self._mean = self._decay * self._mean + (1.0 - self._decay) * -logprob
        return self._mean


class WindowedConfidence:
    """Mean of the last tokens' confidence (DeepConf, arXiv 2508.15260).

    Keeps running sums, so that a token costs the same whatever the window, and the rounding error
    does not build up.
    """

    __slots__ = ("_sums", "_total")

    def __init__(self, window: int) -> None:
        self._total = 0.0
        self._sums = deque([0.0], maxlen=window + 1)

    def push(self, logprob: float, confidence: float | None) -> float:
        if confidence is None or not -math.inf < confidence < math.inf:
            return math.nan
        self._total += confidence
        self._sums.append(self._total)
        return (self._total - self._sums[0]) / (len(self._sums) - 1)


def windowed_confidences(confidences: Array, usable: NDArray[np.bool_], window: int) -> Array:
    """What `WindowedConfidence` gives for many recorded rollouts, token for token.

    Args:
        confidences, usable: [rollouts, tokens]; where not usable there is nothing to decide by.

    Returns:
        [rollouts, tokens], NaN where not usable.
    """
    out = np.full(confidences.shape, np.nan)
    for row, values, there in zip(out, confidences, usable, strict=True):
        sums = np.concatenate([[0.0], np.cumsum(values[there])])
        ends = np.arange(1, len(sums))
        starts = np.maximum(ends - window, 0)
        row[there] = (sums[ends] - sums[starts]) / (ends - starts)
    return out


def token_confidence(alternatives: Sequence[float | None], top_k: int) -> float | None:
    """C_t = -(1/k) Σ log P of the k likeliest alternatives at a position, in nats (DeepConf).

    Args:
        alternatives: their logprobs in any order; the sampled token may be one of them.

    Returns:
        None when there are fewer than k, or one is missing, a placeholder or no number.
    """
    if len(alternatives) < top_k:
        return None
    numbers = []
    for logprob in alternatives:
        if logprob is None or not MISSING_LOGPROB < logprob < math.inf:
            return None
        numbers.append(logprob)
    numbers.sort(reverse=True)
    return -math.fsum(numbers[:top_k]) / top_k
