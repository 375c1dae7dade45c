"""What else than its tokens tells of a stream: numbers that an estimate of success may read.

The prompt's history is known before the first token. The others are asked while the stream goes on,
at the tokens of the gate's `Schedule`; what is not answered decides nothing. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.regret import MOST_TOKENS, Array

SourceName = Literal["history", "critic", "probe"]

#: The features made of what each source tells, in the order of an estimator's weights.
#:   history: log odds that the prompt is solved, by earlier rollouts of it.
#:   critic: what a critic server says, in its own units.
#:   probe: log-likelihoods, asked of the policy itself (`Probe`): of the reference answer's first
#:       token, of as much of it as the policy would have said, and of the first token that it would
#:       have said; each also by position, as it tells more the further a stream has come.
TOLD: dict[SourceName, tuple[str, ...]] = {
    "history": ("history",),
    "critic": ("critic",),
    "probe": (
        *("probe_first", "probe_answer", "probe_best"),
        *("probe_first_by_position", "probe_answer_by_position", "probe_best_by_position"),
    ),
}
#: Those that must be asked; an estimate that reads one is known only where it was.
ASKED: frozenset[SourceName] = frozenset({"critic", "probe"})
#: Numbers that a probe gives.
PROBED = 3

Answers = Mapping[SourceName, Sequence[float]]


def in_order(sources: Sequence[SourceName]) -> tuple[SourceName, ...]:
    """Each once, in the order of `TOLD`: those that cost nothing first."""
    return tuple(name for name in TOLD if name in sources)


def told_features(sources: Sequence[SourceName], answers: Answers, token: int) -> list[float]:
    """The features of one token; NaN where a source has not answered."""
    features: list[float] = []
    for source in sources:
        answer = answers.get(source)
        if answer is None:
            features += [math.nan] * len(TOLD[source])
        elif source == "probe":
            features += [*answer, *(number * token for number in answer)]
        else:
            features += answer
    return features


def told_arrays(sources: Sequence[SourceName], answers: Mapping[SourceName, Array]) -> Array:
    """The same for recorded rollouts, to the last bit.

    Args:
        answers: [rollouts, tokens, numbers] of each source, NaN where it has not answered.

    Returns:
        [rollouts, tokens, features].
    """
    parts = []
    for source in sources:
        answer = answers[source]
        if source == "probe":
            tokens = np.arange(1.0, answer.shape[1] + 1.0)[:, None]
            answer = np.concatenate([answer, answer * tokens], axis=-1)
        parts.append(answer)
    return np.concatenate(parts, axis=-1)


#: a source that is asked at one token is asked again before a hundred times as many
MOST_GROWTH = 100.0


@dataclass(frozen=True)
class Schedule:
    """At which tokens sources are asked: multiples of `every`, sparser as a stream grows.

    every: tokens; 0 asks never. growth: of its position, a stream is asked again after at least
    this share. below: asked only where the estimate without them lies below; else that one stands.
    """

    every: int = 0
    growth: float = 0.25
    below: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.every <= MOST_TOKENS:
            raise ValueError(f"every must lie between 0 and {MOST_TOKENS}, not {self.every}")
        if not 0.0 <= self.growth <= MOST_GROWTH:
            raise ValueError(f"growth must lie between 0 and {MOST_GROWTH:g}, not {self.growth}")
        if not 0.0 < self.below <= 1.0:
            raise ValueError(f"below must lie in (0, 1], not {self.below}")

    def after(self, token: int) -> int:
        """The next token at which they are asked; 0: never."""
        if not self.every:
            return 0
        gap = max(self.every, math.ceil(self.growth * token))
        return -(-(token + gap) // self.every) * self.every

    def tokens(self, length: int) -> NDArray[np.int64]:
        """All of them in a stream of so many tokens."""
        found = []
        token = self.after(0)
        while 0 < token <= length:
            found.append(token)
            token = self.after(token)
        return np.array(found, dtype=np.int64)


#: Of the states that would be stopped, the share that lies below where sources are asked.
KEPT = 0.95


def asked_below(free: Array, stopped: NDArray[np.bool_], weights: Array | None = None) -> float:
    """`Schedule.below`, so that of what an estimate that asks would stop `KEPT` is asked about.

    Args:
        free: V by the estimate that asks nobody, of any shape. stopped, weights: of the same.
    """
    weight = None if weights is None else weights[stopped]
    below = np.quantile(free[stopped], KEPT, weights=weight, method="inverted_cdf")
    return max(float(below), 1e-6)


@dataclass(frozen=True)
class Probe:
    """What an answer probe says after a stream's tokens, and what it then listens for; token ids.

    phrase: leads to the answer, such as that of "\\n\\nThe final answer is \\\\boxed{".
    answer: the reference answer, with what ends it.
    """

    phrase: list[int]
    answer: list[int]

    def __post_init__(self) -> None:
        for name in ("phrase", "answer"):
            ids = getattr(self, name)
            if not ids or min(ids) < 0:
                raise ValueError(f"{name} must be token ids, at least one")
