"""What an enforced stop saved: unknowable, so estimated from unstopped choices. Pure."""

from __future__ import annotations

from collections import deque

#: Lengths remembered: enough for a steady mean, few enough to follow the traffic.
WINDOW = 1024


class Savings:
    """Tokens a choice would still have had after its cut: the mean remaining length.

    Taken over the last unstopped choices that were longer than the cut; 0 when none was. Stopping
    takes the long failures out of this sample, so the estimate is rather low than high.
    """

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=WINDOW)

    def ended(self, tokens: int) -> None:
        """Take the length of a choice that was not cut."""
        self._lengths.append(tokens)

    def estimate(self, cut: int) -> float:
        """Tokens saved by a cut after this many."""
        left = [tokens - cut for tokens in self._lengths if tokens > cut]
        return sum(left) / len(left) if left else 0.0
