"""What follows a choice beside its rule: is told of every token, and changes nothing. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from espo_gateway.stop.watch import Verdict, Watch


class Step(NamedTuple):
    """One token, and what the watch has made of it.

    logprob, max_logprob, confidence, last: as `Watch.push` takes them.
    regret: None when it is missing. z: None past the cut, where the rule follows no more.
    """

    logprob: float | None
    max_logprob: float | None
    confidence: float | None
    last: bool
    regret: float | None
    z: float | None


class Follower(Protocol):
    """Follows one choice."""

    def begin(self, prompt_tokens: int) -> None:
        """Take the prompt's length, before the first token; 0 where it is not known."""

    def push(self, step: Step) -> None:
        """Take the next token."""


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
        step = Step(logprob, max_logprob, confidence, last, regret, z)
        for follower in self._followers:
            follower.push(step)
        return verdict
