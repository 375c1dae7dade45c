"""Whether tokens were sampled from the policy itself, and if not, which setting changed that.

Pure. Each token that a server sampled is one draw from the trainer's distribution at that place, so
what it should have been is known, and nothing about the text has to be. A setting that leaves
tokens out (top_k, top_p, min_p) leaves a set of them empty whose probability is known; a penalty
makes tokens rare that stood there before; a temperature makes them likelier, or less likely, than
they are on average; and anything else shows in a chi-square test of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, logsumexp
from scipy.stats import chisquare

Array = NDArray[np.float64]

#: −log of the chance that a healthy server fails one of the tests below: about one in ten million
FAILS_AT = 16.0
#: settings of each kind that are tried: each names the set of tokens that it would leave out
TOP_K = np.array([*range(1, 21), *range(25, 100, 5), *range(100, 1001, 50)])
TOP_P = np.array([*np.arange(0.05, 0.96, 0.05), 0.97, 0.98, 0.99, 0.995, 0.999])
MIN_P = np.array([0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, *np.arange(0.05, 0.96, 0.05)])
BINS = 20


class SamplingTest:
    """Collects tokens, rollout by rollout; `fault` says what is wrong with them.

    tokens: how many there are.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._ranks: list[Array] = []
        self._rng = np.random.default_rng(0)
        # By setting: whether a token of the set was sampled, and log of the chance that none is.
        self._sampled = {name: np.zeros(len(grid), bool) for name, grid in _GRIDS.items()}
        self._none = {name: np.zeros(len(grid)) for name, grid in _GRIDS.items()}
        self._off: dict[str, list[Array]] = {"raw_logprobs": [], "processed_logprobs": []}
        self._excess = {"penalty": np.zeros(2), "temperature": np.zeros(2)}  # sum, variance

    @property
    def tokens(self) -> int:
        return sum(map(len, self._ranks))

    def add(
        self, prompt: Sequence[int], response: Sequence[int], logits: Array, reported: Array
    ) -> None:
        """Take a rollout.

        Args:
            prompt, response: token ids.
            logits: the trainer's, or raw logprobs, before each token of the response,
                [tokens, vocabulary].
            reported: the server's logprobs of the response, [tokens].
        """
        raw = _logprobs(np.asarray(logits, np.float64))
        logprobs = _logprobs(raw / self._temperature)
        every = np.exp(logprobs)
        rows = np.arange(len(response))
        mine = every[rows, list(response)]
        above = (every * (every > mine[:, None])).sum(axis=1)
        # Of tokens that are equally likely any order is as good, so one is drawn.
        ties, drawn = (every == mine[:, None]).sum(axis=1), self._rng.random(len(mine))
        self._ranks.append(np.clip(above + drawn * ties * mine, 0.0, 1.0))

        most = min(int(TOP_K[-1]), every.shape[1])
        best = -np.sort(-np.partition(every, -most, axis=1)[:, -most:], axis=1)
        reached = np.cumsum(best, axis=1)
        place = (every > mine[:, None]).sum(axis=1) + (drawn * ties).astype(int)
        for index, k in enumerate(TOP_K):
            left = 1.0 - reached[:, min(k, most) - 1]
            self._left_out("top_k", index, place >= k, left)
        for index, p in enumerate(TOP_P):
            kept = (reached < p).sum(axis=1)  # and the one that reaches it
            left = 1.0 - reached[rows, np.minimum(kept, most - 1)]
            self._left_out("top_p", index, place > kept, left)
        for index, p in enumerate(MIN_P):
            kept = (best >= p * best[:, :1]).sum(axis=1)
            left = np.where(kept < most, 1.0 - reached[rows, np.maximum(kept, 1) - 1], 0.0)
            self._left_out("min_p", index, mine < p * best[:, 0], left)

        for mode, ours in (("raw_logprobs", raw), ("processed_logprobs", logprobs)):
            self._off[mode].append(np.abs(ours[rows, list(response)] - reported))
        surprise = logprobs[rows, list(response)]
        finite = np.where(np.isfinite(logprobs), logprobs, 0.0)
        mean = (every * finite).sum(axis=1)
        spread = (every * finite**2).sum(axis=1) - mean**2
        self._excess["temperature"] += (surprise - mean).sum(), spread.sum()
        seen = np.zeros(every.shape[1], bool)
        seen[list(prompt)] = True
        for row, token in zip(every, response, strict=True):
            repeated = float(np.clip(row[seen].sum(), 0.0, 1.0))
            self._excess["penalty"] += seen[token] - repeated, repeated * (1.0 - repeated)
            seen[token] = True

    def _left_out(self, name: str, index: int, sampled: NDArray[np.bool_], chance: Array) -> None:
        self._sampled[name][index] |= bool(sampled.any())
        # What rounding makes of a chance of nothing at all is no evidence.
        chance = np.where(chance > 1e-9, np.minimum(chance, 1.0 - 1e-12), 0.0)
        self._none[name][index] += np.log1p(-chance).sum()

    @property
    def off(self) -> dict[str, float]:
        """By `servers.logprobs_mode`: how far the reported logprobs are from it, at the median."""
        known = {
            mode: [one for one in np.concatenate([[], *parts]) if math.isfinite(one)]
            for mode, parts in self._off.items()
        }
        return {mode: float(np.median(one)) if one else math.nan for mode, one in known.items()}

    @property
    def p_value(self) -> float:
        """Of the chi-square test: where in the order of likelihood the tokens lie."""
        bins = min(BINS, self.tokens // 5)
        if bins < 2:
            return 1.0
        counts, _ = np.histogram(np.concatenate(self._ranks), bins=bins, range=(0.0, 1.0))
        return float(chisquare(counts).pvalue)

    @property
    def fault(self) -> str | None:
        """The setting that explains best why these are no samples of the policy; None: they are."""
        cuts: list[tuple[float, str]] = []
        for name, grid in _GRIDS.items():
            evidence = np.where(self._sampled[name], 0.0, -self._none[name])
            index = int(evidence.argmax())
            cuts.append((float(evidence[index]), f"{name} of about {grid[index]:.3g}"))
        most = max(cuts)[0]
        # Where the policy is much the same at all places, they are hard to tell apart.
        found = [(most, " or ".join(name for evidence, name in cuts if evidence >= 0.8 * most))]
        for name, (excess, variance) in self._excess.items():
            z = excess / math.sqrt(variance) if variance > 0.0 else 0.0
            found.append((-float(log_ndtr(-abs(z))) - math.log(2.0), _SAID[name](z)))
        strongest, setting = max(found)
        if strongest > FAILS_AT:
            return setting
        chance = max(self.p_value, 1e-300)
        return "another policy" if -math.log(chance) > FAILS_AT else None


def _logprobs(logits: Array) -> Array:
    return np.asarray(logits - logsumexp(logits, axis=1, keepdims=True))


_GRIDS: dict[str, Array] = {
    "top_k": TOP_K.astype(np.float64),
    "top_p": TOP_P,
    "min_p": MIN_P,
}
_SAID = {
    "penalty": lambda z: (
        "a repetition_penalty, presence_penalty or frequency_penalty: what stood there before is "
        + ("rarer" if z < 0 else "more frequent")
    ),
    "temperature": lambda z: (
        f"a {'lower' if z > 0 else 'higher'} temperature than rollout.temperature, or of another "
        "policy"
    ),
}
