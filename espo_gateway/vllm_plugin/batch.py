"""All requests of a step at once, for gates that look at z and at the stream's statistics. Pure.

Nearly every token of such a request moves some numbers and decides nothing. A `Watch` takes longer
over each than vLLM's scheduler should be held up; here the numbers of all are moved together, equal
to the last bit, and only the tokens that might stop are shown to their watch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.estimate import DECAYS, FEATURES, STATE, added
from espo_gateway.stop.regret import MISSING_LOGPROB
from espo_gateway.stop.rules import RULES, Gate
from espo_gateway.stop.watch import Watch

# Rows that move with each token: z, then `STATE`.
_SUMS = slice(1, 1 + len(DECAYS))
_LARGEST = slice(_SUMS.stop, _SUMS.stop + 2)
_POSITION = len(STATE)
_MOVING = 1 + len(STATE)
# Rows that stand: what moves z, the z above which and the log odds of success below which a token
# may stop, the one that is to be asked about, and what makes those odds of `FEATURES`.
_MEAN, _DEVIATIONS, _CLIP, _KEEP, _MOVE, _FLOOR, _ODDS, _DUE, _BIAS = range(9)
_WEIGHTS = slice(_BIAS + 1, _BIAS + len(FEATURES))
_STANDING = _WEIGHTS.stop
#: A feature is a row that moves, or the root of it; but for the first, of the prompt, which stands.
_ROWS = [1 + STATE.index(name.removeprefix("sqrt_")) for name in FEATURES[1:]]
_ROOTS = [place for place, name in enumerate(FEATURES[1:]) if name.startswith("sqrt_")]
#: Nearer to the threshold than this, in log odds, the watch looks closer.
_CLOSE = 1e-6


def can_be_batched(gate: Gate) -> bool:
    """Whether z, the stream's statistics and the schedule tell that a token does not decide."""
    rule = RULES[gate.rule]
    if rule.track(gate) is not None:
        return False
    return rule.floor(gate) > -math.inf or gate.source == "stream"


class Batch:
    """The watches of requests by name; each knows its own numbers only after `settle`."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        # [rows, slots]
        self._moving = np.zeros((_MOVING, 0))
        self._standing = np.zeros((_STANDING, 0))
        #: those whose statistics are followed
        self._estimated: set[str] = set()
        #: the last step's names, as long as they mean the same slots; those, and what stands
        self._names: Sequence[str] = ()
        self._known: NDArray[np.intp] = np.zeros(0, dtype=np.intp)
        self._own = self._standing

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def add(self, name: str, watch: Watch) -> None:
        """Take a request that has no token yet, under a gate that `can_be_batched`."""
        gate = watch.gate
        if not self._free:
            size = self._moving.shape[1]
            more = max(size, 64)
            self._moving = np.pad(self._moving, ((0, 0), (0, more)))
            self._standing = np.pad(self._standing, ((0, 0), (0, more)))
            self._free = [*range(size, size + more)]
        slot = self._slots[name] = self._free.pop()
        self._moving[:, slot] = 0.0
        column = self._standing[:, slot]
        column[:] = 0.0
        column[_MEAN] = gate.statistics.mean
        column[_DEVIATIONS] = 1.0 / math.sqrt(gate.statistics.variance + gate.monitor.delta)
        column[_CLIP] = gate.monitor.clip
        column[_KEEP] = keep = gate.monitor.smoothing
        column[_MOVE] = 1.0 - keep
        column[_FLOOR], column[_ODDS] = RULES[gate.rule].floor(gate), math.inf
        if gate.asks_estimate:
            self._estimated.add(name)
            column[_ODDS], column[_DUE] = -math.inf, watch.due
        elif watch.statistics is not None and gate.estimator is not None:
            self._estimated.add(name)
            column[_WEIGHTS] = gate.estimator.weights[1 : len(FEATURES)]
            # Of no token: what the prompt alone makes of it.
            column[_BIAS] = gate.estimator.logit(watch.statistics.features(), watch.told)
            if column[_FLOOR] == -math.inf:  # the estimate is all that is compared
                column[_ODDS] = math.log(gate.p_star) - math.log1p(-gate.p_star) + _CLOSE
        self._names = ()

    def remove(self, name: str) -> None:
        """Forget a request, if it is there."""
        slot = self._slots.pop(name, None)
        if slot is not None:
            self._estimated.discard(name)
            self._free.append(slot)
            self._names = ()

    def push(
        self, names: Sequence[str], counts: Sequence[int], rows: NDArray[np.floating]
    ) -> list[str]:
        """Take a step's tokens. Returns the requests of the batch that are as before, as their
        tokens may decide: `settle` them, show the tokens to their watch, and `resume`.

        counts: tokens of each request. rows: the sampled token's logprob and the largest, of shape
        [requests, 2 or more].
        """
        if not self._slots:
            return []
        if names != self._names:
            slots = self._slots
            self._known = np.array([slots.get(name, -1) for name in names], dtype=np.intp)
            self._names = list(names)
            self._own = self._standing[:, self._known]
        known, own = self._known, self._own
        logprobs, tops = rows[:, :2].T.astype(np.float64)
        moving = self._moving if self._estimated else self._moving[:1]
        moved = moving.take(known, axis=1)
        with np.errstate(invalid="ignore", over="ignore"):
            regrets = tops - logprobs
            taken = self._moved(moved, own, regrets, np.maximum(-logprobs, 0.0))
        # Where the largest is less than the sampled, or no number, the watch looks closer.
        taken &= (logprobs > MISSING_LOGPROB) & (logprobs <= tops) & (tops < math.inf)
        taken &= known >= 0
        if counts.count(1) != len(counts):
            taken &= np.array(counts) == 1
        if taken.all():
            moving[:, known] = moved
            return []
        moving[:, known[taken]] = moved[:, taken]
        return [names[place] for place in np.flatnonzero(~taken & (known >= 0))]

    def _moved(
        self,
        moved: NDArray[np.float64],
        own: NDArray[np.float64],
        regrets: NDArray[np.float64],
        surprises: NDArray[np.float64],
    ) -> NDArray[np.bool_]:
        """Move the rows that move, in their place; which of the tokens decide nothing."""
        steps = (regrets - own[_MEAN]) * own[_DEVIATIONS]
        clip = own[_CLIP]
        np.minimum(steps, clip, out=steps)
        np.maximum(steps, -clip, out=steps)
        z = moved[0]
        np.add(own[_KEEP] * z, own[_MOVE] * steps, out=z)
        idle: NDArray[np.bool_] = z <= own[_FLOOR]
        if self._estimated:
            sums, adding = moved[_SUMS], np.empty((len(DECAYS), len(regrets)))
            added(regrets, surprises, adding)
            np.add(DECAYS * sums, adding, out=sums)
            largest = moved[_LARGEST]
            np.maximum(largest, (regrets, surprises), out=largest)
            moved[_POSITION] += 1.0
            features = moved[_ROWS]
            features[_ROOTS] = np.sqrt(features[_ROOTS])
            odds = (own[_WEIGHTS] * features).sum(axis=0) + own[_BIAS]
            idle |= odds > own[_ODDS]
            idle &= moved[_POSITION] != own[_DUE]
        return idle

    def settle(self, name: str, watch: Watch, tokens: int) -> None:
        """Bring a request's watch up to date. tokens: taken so far."""
        slot = self._slots.get(name)
        if slot is not None:
            watch.z, watch.tokens = float(self._moving[0, slot]), tokens
            if watch.statistics is not None:
                watch.statistics.state = self._moving[1:, slot].tolist()

    def resume(self, name: str, watch: Watch) -> None:
        """Take up what a watch has seen of its own."""
        slot = self._slots.get(name)
        if slot is None:
            return
        self._moving[0, slot] = watch.z
        if watch.statistics is not None:
            self._moving[1:, slot] = watch.statistics.state
            if self._standing[_DUE, slot] and self._standing[_DUE, slot] != watch.due:
                self._standing[_DUE, slot] = watch.due
                self._names = ()
