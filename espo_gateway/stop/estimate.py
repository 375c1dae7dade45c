"""Where V(s_t), the estimated probability of success, comes from.

A constant; or a logistic regression on some numbers of the stream known at token t, which needs
no forward pass, and on what sources tell beside (`told.py`). Pure; `fit.py` fits it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.regret import Array, recurrence, running_max, token_blocks
from espo_gateway.stop.told import ASKED, TOLD, SourceName, in_order

#: What `StreamStatistics.features` gives, in order. Roots, not logarithms, tame the growing ones:
#: a root is rounded alike by every library, so a replay equals the live decision to the last bit.
FEATURES = (
    "sqrt_prompt_tokens",
    "sqrt_position",
    "regret_ema_fast",
    "regret_ema_slow",
    "sqrt_regret_sum",
    "regret_max",
    "sqrt_count_regret_above_1",
    "sqrt_count_regret_above_3",
    "surprise_ema_fast",
    "surprise_ema_slow",
    "sqrt_surprise_sum",
    "surprise_max",
    "confident_ema_fast",
    "confident_ema_slow",
    "position",
)
#: The last of them, which estimates of earlier versions did not know.
_LATER = 3
_FAST, _SLOW = 0.9, 0.99

#: What is kept of a stream: first what is a recurrence, state ← decay · state + added, in which a
#: sum keeps all that was, then the largest ones and the position.
STATE = (
    *("regret_ema_fast", "regret_ema_slow", "regret_sum", "count_regret_above_1"),
    *("count_regret_above_3", "surprise_ema_fast", "surprise_ema_slow", "surprise_sum"),
    *("confident_ema_fast", "confident_ema_slow"),
    *("regret_max", "surprise_max", "position"),
)
#: of each recurrence, [recurrences, 1]
DECAYS = np.array([_FAST, _SLOW, 1.0, 1.0, 1.0, _FAST, _SLOW, 1.0, _FAST, _SLOW])[:, None]
#: -log π below which a token counts as confident, of a probability above 0.99: a text that repeats
#: itself consists of such, and regret does not see it (MiniMax-M1, arXiv 2506.13585, cuts there).
CONFIDENT = 0.01


def added(regrets: Array, surprises: Array, out: Array) -> None:
    """What tokens add to the recurrences of `STATE`.

    Args:
        regrets, surprises: g and -log π, [..., rollouts].
        out: is written, [..., len(DECAYS), rollouts].
    """
    out[..., 0, :] = (1.0 - _FAST) * regrets
    out[..., 1, :] = (1.0 - _SLOW) * regrets
    out[..., 2, :] = regrets
    out[..., 3, :] = regrets > 1.0
    out[..., 4, :] = regrets > 3.0
    out[..., 5, :] = (1.0 - _FAST) * surprises
    out[..., 6, :] = (1.0 - _SLOW) * surprises
    out[..., 7, :] = surprises
    out[..., 8, :] = (1.0 - _FAST) * (surprises < CONFIDENT)
    out[..., 9, :] = (1.0 - _SLOW) * (surprises < CONFIDENT)


class StreamStatistics:
    """Running statistics of one live stream: the inputs of a `SuccessEstimator`."""

    __slots__ = (
        "_above_1",
        "_above_3",
        "_confident_fast",
        "_confident_slow",
        "_position",
        "_prompt",
        "_regret_fast",
        "_regret_max",
        "_regret_slow",
        "_regret_sum",
        "_surprise_fast",
        "_surprise_max",
        "_surprise_slow",
        "_surprise_sum",
    )

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt = math.sqrt(max(prompt_tokens, 0))
        self._position = self._above_1 = self._above_3 = 0
        self._regret_fast = self._regret_slow = self._regret_sum = self._regret_max = 0.0
        self._surprise_fast = self._surprise_slow = self._surprise_sum = self._surprise_max = 0.0
        self._confident_fast = self._confident_slow = 0.0

    def push(self, regret: float | None, surprise: float | None) -> None:
        """Take the next token's g_t and -log π(a_t|s_t); a missing one moves only the position."""
        self._position += 1
        if regret is None or surprise is None:
            return
        if surprise < 0.0:  # some servers round a probability to above 1
            surprise = 0.0
        self._regret_fast = _FAST * self._regret_fast + (1.0 - _FAST) * regret
        self._regret_slow = _SLOW * self._regret_slow + (1.0 - _SLOW) * regret
        self._regret_sum += regret
        if regret > self._regret_max:
            self._regret_max = regret
        if regret > 1.0:
            self._above_1 += 1
            if regret > 3.0:
                self._above_3 += 1
        self._surprise_fast = _FAST * self._surprise_fast + (1.0 - _FAST) * surprise
        self._surprise_slow = _SLOW * self._surprise_slow + (1.0 - _SLOW) * surprise
        self._surprise_sum += surprise
        if surprise > self._surprise_max:
            self._surprise_max = surprise
        confident = surprise < CONFIDENT
        self._confident_fast = _FAST * self._confident_fast + (1.0 - _FAST) * confident
        self._confident_slow = _SLOW * self._confident_slow + (1.0 - _SLOW) * confident

    @property
    def state(self) -> tuple[float, ...]:
        """The numbers named in `STATE`; with the prompt's length, all that is to know."""
        return (
            *(self._regret_fast, self._regret_slow, self._regret_sum),
            *(self._above_1, self._above_3),
            *(self._surprise_fast, self._surprise_slow, self._surprise_sum),
            *(self._confident_fast, self._confident_slow),
            *(self._regret_max, self._surprise_max, self._position),
        )

    @state.setter
    def state(self, state: Sequence[float]) -> None:
        self._regret_fast, self._regret_slow, self._regret_sum = state[:3]
        self._above_1, self._above_3 = map(int, state[3:5])
        self._surprise_fast, self._surprise_slow, self._surprise_sum = state[5:8]
        self._confident_fast, self._confident_slow = state[8:10]
        self._regret_max, self._surprise_max, self._position = *state[10:12], int(state[12])

    def features(self) -> tuple[float, ...]:
        """The numbers named in `FEATURES`, after the last pushed token."""
        root = math.sqrt
        return (
            self._prompt,
            root(self._position),
            self._regret_fast,
            self._regret_slow,
            root(self._regret_sum),
            self._regret_max,
            root(self._above_1),
            root(self._above_3),
            self._surprise_fast,
            self._surprise_slow,
            root(self._surprise_sum),
            self._surprise_max,
            self._confident_fast,
            self._confident_slow,
            self._position,
        )


def feature_blocks(
    regrets: Array, logprobs: Array, prompt_tokens: Array
) -> Iterator[tuple[slice, Array]]:
    """What `StreamStatistics` gives for many recorded rollouts, token for token, in parts.

    A part lies feature by feature in memory, and each of these by token.

    Args:
        regrets, logprobs: g and log π, [rollouts, tokens], NaN where missing or past the end.
        prompt_tokens: [rollouts].

    Yields:
        which tokens, and theirs, [rollouts, tokens, len(FEATURES)]; after a rollout's last known
        token they may be anything.
    """
    decays = np.repeat(DECAYS, len(regrets), axis=1)
    state, largest = np.zeros(decays.shape), np.zeros((2, len(regrets)))
    unknown = np.isnan(regrets) | np.isnan(logprobs)
    # Only what is missing between others must leave all as it was, and that is rare.
    gaps = bool((unknown[:, :-1] & ~unknown[:, 1:]).any())
    for tokens in token_blocks(regrets.shape):
        regret, surprise = regrets[:, tokens].T, -logprobs[:, tokens].T
        missing = unknown[:, tokens].T
        regret, surprise = (np.where(missing, 0.0, np.maximum(x, 0.0)) for x in (regret, surprise))
        moved = np.empty((len(regret), *state.shape))
        added(regret, surprise, moved)
        keep: Iterable[Array] = repeat(decays)
        if gaps:
            keep = np.where(missing[:, None], 1.0, decays)
            moved[np.broadcast_to(missing[:, None], moved.shape)] = 0.0
        state = recurrence(keep, moved, state)
        out = np.empty((len(FEATURES), *regret.shape))
        out[0] = np.sqrt(np.maximum(prompt_tokens, 0.0))
        out[14] = np.arange(tokens.start + 1.0, tokens.stop + 1.0)[:, None]
        out[1] = np.sqrt(out[14])
        for place, k in ((2, 0), (3, 1), (8, 5), (9, 6), (12, 8), (13, 9)):
            out[place] = moved[:, k]
        for place, k in ((4, 2), (6, 3), (7, 4), (10, 7)):
            np.sqrt(moved[:, k], out[place])
        for place, numbers, most in ((5, regret, largest[0]), (11, surprise, largest[1])):
            np.maximum(numbers[0], most, numbers[0])
            out[place] = running_max(numbers.T).T
            most[:] = out[place, -1]
        yield tokens, out.T


@dataclass(frozen=True)
class SuccessEstimator:
    """P(success | s_t) = sigmoid(bias + weights · features).

    weights: one for each of `FEATURES`, then for each of what the `sources` tell (`told.TOLD`). Of
        an earlier version's, those that it did not know become 0.
    """

    weights: tuple[float, ...]
    bias: float
    sources: tuple[SourceName, ...] = ()

    def __post_init__(self) -> None:
        if self.sources != in_order(self.sources):
            raise ValueError(f"sources must be some of {tuple(TOLD)}, in this order")
        count = len(FEATURES) + sum(len(TOLD[source]) for source in self.sources)
        if len(self.weights) == count - _LATER:
            known = len(FEATURES) - _LATER
            weights = (*self.weights[:known], *[0.0] * _LATER, *self.weights[known:])
            object.__setattr__(self, "weights", weights)
        if len(self.weights) != count:
            raise ValueError(f"weights must have {count} entries, not {len(self.weights)}")
        if not all(map(math.isfinite, (self.bias, *self.weights))):
            raise ValueError("weights and bias must be finite")

    @property
    def asks(self) -> bool:
        """Whether it reads a source that must be asked, and so is known only where that was."""
        return not ASKED.isdisjoint(self.sources)

    def logit(self, features: Sequence[float], told: Sequence[float] = ()) -> float:
        """log P/(1-P) at one token. told: `told.told_features`; with NaN in it, the logit is."""
        w, f = self.weights, features
        # Written out, as it is done for every token; added up in one order, that of `logits`.
        total = self.bias + w[0] * f[0] + w[1] * f[1] + w[2] * f[2] + w[3] * f[3] + w[4] * f[4]
        total = total + w[5] * f[5] + w[6] * f[6] + w[7] * f[7] + w[8] * f[8] + w[9] * f[9]
        total = total + w[10] * f[10] + w[11] * f[11] + w[12] * f[12] + w[13] * f[13]
        total = total + w[14] * f[14]
        for k, number in enumerate(told, len(FEATURES)):
            total = total + w[k] * number
        return total

    def logits(self, features: Array, told: Array | None = None) -> Array:
        """The same for features of shape [..., len(FEATURES)]; added up in the same order."""
        total = np.full_like(features[..., 0], self.bias, dtype=float)
        for k, weight in enumerate(self.weights[: len(FEATURES)]):
            total += weight * features[..., k]
        if told is not None:
            for k, weight in enumerate(self.weights[len(FEATURES) :]):
                total += weight * told[..., k]
        return total


def logits_by(
    estimators: Sequence[SuccessEstimator],
    which: NDArray[np.integer[Any]],
    features: Array,
    told: Array | None = None,
) -> Array:
    """`SuccessEstimator.logits`, each rollout's by an estimator of its own.

    Args:
        which: index of each rollout's estimator, [rollouts].
        features: [rollouts, tokens, len(FEATURES)].
        told: [rollouts, tokens, features of the sources].
    """
    weights = np.array([estimator.weights for estimator in estimators])[which]
    bias = np.array([estimator.bias for estimator in estimators])[which]
    total = np.full_like(features[..., 0], 0.0)
    total += bias[:, None]
    for k in range(features.shape[-1]):
        total += weights[:, k, None] * features[..., k]
    if told is not None:
        for k in range(told.shape[-1]):
            total += weights[:, len(FEATURES) + k, None] * told[..., k]
    return total


def rough_probabilities(logits: Array) -> Array:
    """`probabilities` at a tenth of the time, off by some of the last bits."""
    return 1.0 / (1.0 + np.exp(-np.maximum(logits, -700.0)))


def probabilities(logits: Array) -> Array:
    """`sigmoid` of an array of any shape, equal to the last bit."""
    exponents = -np.maximum(logits, -700.0)
    # `math.exp` of each: numpy's own rounds differently on some processors.
    powers = np.fromiter(map(math.exp, exponents.ravel("F").tolist()), float, exponents.size)
    return 1.0 / (1.0 + powers.reshape(exponents.shape, order="F"))


def sigmoid(logit: float) -> float:
    """1/(1+exp(-logit)), safe against overflow."""
    return 1.0 / (1.0 + math.exp(-max(logit, -700.0)))
