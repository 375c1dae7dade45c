"""What follows a choice beside its rule: is told of every token, and changes nothing. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from espo_gateway.stop.watch import Verdict, Watch


class Follower(Protocol):
    """Follows one choice."""

    def begin(self, prompt_tokens: int) -> None:
        """Take the prompt's length, before the first token; 0 where it is not known."""

    def push(
        self,
        logprob: float | None,
        max_logprob: float | None,
        confidence: float | None,
        regret: float | None,
        z: float | None,
        *,
        last: bool,
    ) -> None:
        """Take the next token.

        logprob, max_logprob, confidence, last: as `Watch.push` takes them.
        regret: None when it is missing. z: None past the cut, where the rule follows no more.
        """


class Followed:
    """A watch, and followers that hear what it is told and what it makes of it."""

    __slots__ = ("_followers", "_watch")

    def __init__(self, watch: Watch, followers: Sequence[Follower]) -> None:
        self._watch = watch
        self._followers = followers

    def push(
        self,
        logprob: float | None,
        max_logprob: float | None,
        *,
        last: bool = False,
        confidence: float | None = None,
    ) -> Verdict:
        """As `Watch.push`."""
        watch = self._watch
        going_on = watch.cut is None
        verdict = watch.push(logprob, max_logprob, last=last, confidence=confidence)
        regret, z = (watch.regret, watch.z) if going_on else (None, None)
        for follower in self._followers:
            follower.push(logprob, max_logprob, confidence, regret, z, last=last)
        return verdict
