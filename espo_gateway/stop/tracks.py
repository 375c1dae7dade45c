"""Uniform numbers drawn from a stream itself, for the random rule.

A replay draws what the live stream drew, to the last bit: the "draw" at a token is a hash of the
gate's version and the bits of all logprobs up to it. Pure.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.regret import Array

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_DOUBLE, _BITS = struct.Struct("<d"), struct.Struct("<Q")


class StreamChance:
    """The draws of one live stream."""

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
    bits = np.ascontiguousarray(logprobs, dtype=np.float64).view(np.uint64)
    state = np.full(len(logprobs), _seeded(seed), dtype=np.uint64)
    draws = np.empty(logprobs.shape)
    for t in range(logprobs.shape[1]):
        state = np.where(known[:, t], _mixed(state ^ bits[:, t]), state)
        draws[:, t] = _uniform(state)
    return draws


def _seeded(seed: int) -> int:
    return seed * _GOLDEN & _MASK


def _mixed(state: Any) -> Any:
    """A step of the generator splitmix64, of an int or of an array of uint64."""
    state = state + _GOLDEN & _MASK
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)


def _uniform(state: Any) -> Any:
    return (state >> 11) * 2.0**-53
