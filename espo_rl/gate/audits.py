"""Which rollouts are generated to their end though the rule stops them."""

from __future__ import annotations

import random
from dataclasses import dataclass

#: Of fewer rollouts of a prompt than this, one is a large part of them.
FEW = 4


@dataclass(frozen=True)
class Audits:
    """share: each rollout's chance. each: so many of every n of a prompt; 0: by chance alone."""

    share: float
    each: int = 0
    n: int = 1

    @classmethod
    def of(cls, share: float, n: int) -> Audits:
        """About that share, and one of each prompt's n at least where they are not `FEW`.

        So no prompt is left without a finished rollout, whatever the rule makes of it.
        """
        if not share or n < FEW:
            return cls(share)
        each = max(1, round(share * n))
        return cls(each / n, each, n)

    def draw(self, count: int, rng: random.Random) -> list[bool]:
        """Which of so many rollouts, prompt by prompt.

        Drawn before anything is sampled, so an audit cannot depend on what it observes.
        """
        if not self.each:
            return [rng.random() < self.share for _ in range(count)]
        chosen = [rng.sample(range(self.n), self.each) for _ in range(-(-count // self.n))]
        return [i % self.n in chosen[i // self.n] for i in range(count)]
