"""z of all requests of a step at once, for gates whose rule looks at nothing else. Pure.

Nearly every token of such a request changes z and decides nothing. A `Watch` takes longer over each
than vLLM's scheduler should be held up; here the numbers of all are moved together, equal to the
last bit, and only the tokens that might stop are shown to their watch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.regret import MISSING_LOGPROB
from espo_gateway.stop.rules import RULES, Gate
from espo_gateway.stop.watch import Watch

#: Rows of the table: what moves, and what the gate has.
_Z, _MEAN, _DEVIATIONS, _CLIP, _KEEP, _MOVE, _FLOOR = range(7)


def looks_at_z_alone(gate: Gate) -> bool:
    """Whether no token decides that leaves z at or below a floor, and nothing else is followed."""
    rule = RULES[gate.rule]
    follows = gate.needs_estimator or rule.track(gate) is not None
    return not follows and rule.floor(gate) > -math.inf


class Batch:
    """The watches of requests by name; each knows its own z only after `settle`."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._table = np.zeros((_FLOOR + 1, 0))
        #: the last step's names, as long as they mean the same slots; those, and what they have
        self._names: Sequence[str] = ()
        self._known: NDArray[np.intp] = np.zeros(0, dtype=np.intp)
        self._own = self._table

    def add(self, name: str, gate: Gate) -> None:
        """Take a request that has no token yet, under a gate that `looks_at_z_alone`."""
        if not self._free:
            size = self._table.shape[1]
            more = np.zeros((_FLOOR + 1, max(size, 64)))
            self._table = np.concatenate([self._table, more], axis=1)
            self._free = [*range(size, self._table.shape[1])]
        slot = self._slots[name] = self._free.pop()
        keep = gate.monitor.smoothing
        self._table[:, slot] = (
            *(0.0, gate.statistics.mean),
            1.0 / math.sqrt(gate.statistics.variance + gate.monitor.delta),
            *(gate.monitor.clip, keep, 1.0 - keep, RULES[gate.rule].floor(gate)),
        )
        self._names = ()

    def remove(self, name: str) -> None:
        """Forget a request, if it is there."""
        slot = self._slots.pop(name, None)
        if slot is not None:
            self._free.append(slot)
            self._names = ()

    def push(
        self, names: Sequence[str], counts: Sequence[int], rows: NDArray[np.floating]
    ) -> set[str]:
        """Take a step's tokens. Returns the requests whose one token decides nothing: it is taken.

        The others are as before: `settle` them, show their tokens to their watch, and `resume`.

        counts: tokens of each request. rows: the sampled token's logprob and the largest, of shape
        [requests, 2 or more].
        """
        if not self._slots:
            return set()
        if names != self._names:
            slots = self._slots
            self._known = np.array([slots.get(name, -1) for name in names], dtype=np.intp)
            self._names = list(names)
            self._own = self._table[:, self._known]
            self._own[_FLOOR, self._known < 0] = -math.inf
        known, own = self._known, self._own
        logprobs, tops = rows[:, :2].T.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            steps = ((tops - logprobs) - own[_MEAN]) * own[_DEVIATIONS]
            np.minimum(steps, own[_CLIP], out=steps)
            np.maximum(steps, -own[_CLIP], out=steps)
            moved = own[_KEEP] * self._table[_Z, known] + own[_MOVE] * steps
        taken = moved <= own[_FLOOR]
        # Where the largest is less than the sampled, or no number, the watch looks closer.
        taken &= (logprobs > MISSING_LOGPROB) & (logprobs <= tops) & (tops < math.inf)
        if counts.count(1) != len(counts):
            taken &= np.array(counts) == 1
        self._table[_Z, known[taken]] = moved[taken]
        if taken.all():
            return set(names)
        return {names[place] for place in np.flatnonzero(taken)}

    def settle(self, name: str, watch: Watch, tokens: int) -> None:
        """Bring a request's watch up to date. tokens: taken so far."""
        slot = self._slots.get(name)
        if slot is not None and watch.cut is None:
            watch.z, watch.tokens = float(self._table[_Z, slot]), tokens

    def resume(self, name: str, watch: Watch) -> None:
        """Take up what a watch has seen of its own."""
        slot = self._slots.get(name)
        if slot is None:
            return
        if watch.cut is None:
            self._table[_Z, slot] = watch.z
        else:
            self.remove(name)  # z is no longer followed
