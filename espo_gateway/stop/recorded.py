"""Many recorded rollouts, as arrays: what was known of each token when it was sampled. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.estimate import FEATURES, feature_blocks
from espo_gateway.stop.regret import (
    MISSING_LOGPROB,
    Array,
    MonitorConfig,
    RegretStatistics,
    smoothed_regret,
    token_blocks,
)
from espo_gateway.stop.told import PROBED, SourceName, told_arrays

Counts = NDArray[np.int64]


@dataclass(eq=False)
class Recorded:
    """Recorded rollouts; what gates share of them is worked out once, when it is asked for.

    Arrays are of shape [rollouts] or [rollouts, tokens], the latter NaN where a number is missing
    or past the end (`pad` makes them).

    logprobs, max_logprobs: of the sampled token, and the largest at its position, [.., tokens].
    prompt_tokens: length of the prompts.
    completed_at: length in tokens of each rollout that ended by itself, whose last token is exempt
        from a stop; 0 for the others. None: nobody knows, so none is exempt. Of rollouts of several
        turns where each of these ended, [rollouts, turns].
    critic: what a critic said after each token, in its own units (`Gate.success`), [.., tokens].
    confidences: of each position (`tracks.token_confidence`), [.., tokens].
    history, probes: what these sources told (`told.TOLD`); probes are [rollouts, tokens, `PROBED`],
        NaN where none was asked.
    """

    logprobs: Array
    max_logprobs: Array
    prompt_tokens: Array
    completed_at: Counts | None = None
    critic: Array | None = None
    confidences: Array | None = None
    history: Array | None = None
    probes: Array | None = None
    _z: dict[tuple[RegretStatistics, MonitorConfig], Array] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        # By token in memory, which is how averages run along them.
        self.logprobs = np.asfortranarray(self.logprobs)
        self.max_logprobs = np.asfortranarray(self.max_logprobs)

    def __len__(self) -> int:
        return len(self.logprobs)

    def where(self, rows: NDArray[Any]) -> Recorded:
        """Some of the rollouts, by a mask or by their numbers."""
        arrays = {
            each.name: value[rows]
            for each in dataclasses.fields(self)
            if each.init and (value := getattr(self, each.name)) is not None
        }
        return Recorded(**arrays)

    @cached_property
    def regrets(self) -> Array:
        """g_t = max_a log π(a|s_t) - log π(a_t|s_t) ≥ 0 (row 1), [rollouts, tokens].

        NaN where either is missing, a placeholder, or not finite: a bad number carries no evidence
        and must never stop a rollout.
        """
        out = np.empty(self.logprobs.shape, order="F")
        with np.errstate(invalid="ignore"):
            for tokens in token_blocks(out.shape):
                logprobs, best = self.logprobs[:, tokens], self.max_logprobs[:, tokens]
                usable = (logprobs > MISSING_LOGPROB) & (logprobs < np.inf)
                usable &= (best > MISSING_LOGPROB) & (best < np.inf)
                out[:, tokens] = np.where(usable, np.maximum(best - logprobs, 0.0), np.nan)
        return out

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """Where g is a number."""
        return ~np.isnan(self.regrets)

    def told(self, sources: Sequence[SourceName]) -> Array | None:
        """The features made of what was told, [rollouts, tokens, features]; None without sources.

        What was not recorded is NaN; a critic's is in its own units.
        """
        if not sources:
            return None
        answers: dict[SourceName, Array | None] = {
            "history": None if self.history is None else self.history[:, None, None],
            "critic": None if self.critic is None else self.critic[..., None],
            "probe": self.probes,
        }
        whole: dict[SourceName, Array] = {}
        for source in sources:
            answer = answers[source]
            numbers = PROBED if source == "probe" else 1
            unknown = np.full((1, 1, numbers), np.nan)
            whole[source] = np.broadcast_to(
                unknown if answer is None else answer, (*self.logprobs.shape, numbers)
            )
        return told_arrays(sources, whole)

    def feature_blocks(self) -> Iterator[tuple[slice, Array]]:
        """The stream's statistics, in parts: whole they would be many times as large as all else.

        See `estimate.feature_blocks`.
        """
        return feature_blocks(self.regrets, self.logprobs, self.prompt_tokens)

    def features_where(self, chosen: NDArray[np.bool_]) -> Array:
        """The stream's statistics after some tokens, [of those tokens, `estimate.FEATURES`]."""
        parts, rows = [np.empty((0, len(FEATURES)))], [np.empty(0, dtype=np.int64)]
        for tokens, features in self.feature_blocks():
            parts.append(features[chosen[:, tokens]])
            rows.append(np.nonzero(chosen[:, tokens])[0])
        order = np.concatenate(rows).argsort(kind="stable")
        return np.concatenate(parts)[order]

    def z(self, statistics: RegretStatistics, monitor: MonitorConfig) -> Array:
        """z (row 4), [rollouts, tokens]; past the end of a rollout it stays at its last value."""
        key = statistics, monitor
        if key not in self._z:
            self._z[key] = smoothed_regret(self.regrets, *key)
        return self._z[key]


def pad(rows: Sequence[Sequence[float] | Array]) -> Array:
    """Stack rows of different lengths to [rows, longest], padded with NaN."""
    out = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def padded_probes(
    rows: Sequence[Sequence[Sequence[float]]], lengths: Sequence[int]
) -> Array | None:
    """What probes said, as [rollouts, tokens, `PROBED`], NaN where nobody asked.

    Args:
        rows: of each rollout, lists of a token (counted from 1) and what was said after it.
        lengths: in tokens, [rollouts]; what lies beyond is left out.

    Returns:
        None when none was asked.
    """
    if not any(rows):
        return None
    out = np.full((len(rows), max(lengths), PROBED), np.nan)
    for row, probes, length in zip(out, rows, lengths, strict=True):
        for token, *said in probes:
            if 0 < token <= length and len(said) == PROBED:
                row[int(token) - 1] = said
    return out
