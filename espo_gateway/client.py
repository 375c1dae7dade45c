"""What became of each choice of an answer: it ended, was cut for length, or was stopped.

One page, no dependency, not even the gateway: copy it into a trainer that cannot have more.

    answer = client.chat.completions.create(...)        # or the JSON of any other client
    for outcome in outcomes(answer):
        if outcome.end == "early_stop":
            ...                                         # at token outcome.tokens
        reward = outcome.reward(grade(...))

A trainer that only reads `finish_reason` takes a stopped rollout for one that ran out of length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

#: "aborted": the server or the client broke it off, or it has not ended; no rollout to learn from.
End = Literal["completed", "length", "early_stop", "aborted"]

#: The paper's reward of a stopped rollout, whatever it might still have become.
R_FAIL = -1.0

_COMPLETED = frozenset({"stop", "tool_calls", "function_call"})


@dataclass(frozen=True)
class Outcome:
    """How one choice ended.

    index: of the choice. tokens: how many it has, so of a stopped one the token that it was stopped
    at; None where the answer does not say. would_stop: the token that a choice which was let finish
    (shadow mode, an audit) would have been stopped at. monitored: whether anything watched it.
    """

    index: int
    end: End
    tokens: int | None
    would_stop: int | None
    monitored: bool

    def reward(self, graded: float, *, r_fail: float = R_FAIL) -> float:
        """For the last token; all others have 0. graded: what a grader gives the text as it is.

        A stop is an absorbing failure: no value of a later state may be added (no bootstrap). One
        that ran out of length is graded like any other.
        """
        return r_fail if self.end == "early_stop" else graded


def outcomes(answer: Any) -> list[Outcome]:
    """Of every choice of an answer, in its order.

    answer: a completion, chat or `/inference/v1/generate` answer, or the last chunk of a stream; as
    an object of the `openai` client, or as JSON was decoded.
    """
    choices = list(_get(answer, "choices") or [])
    usage = _get(answer, "usage") if len(choices) == 1 else None
    return [_outcome(choice, usage) for choice in choices]


def _outcome(choice: Any, usage: Any) -> Outcome:
    record = _get(choice, "espo")
    reason = _get(choice, "finish_reason")
    # The gateway's word for it stays where a client, or a proxy, has dropped what it did not know.
    stopped = _get(record, "stopped") is True or _get(choice, "stop_reason") == "espo"
    end: End = "aborted"
    if stopped:
        end = "early_stop"
    elif reason in _COMPLETED:
        end = "completed"
    elif reason == "length":
        end = "length"
    cut = _get(record, "cut")
    monitored = record is not None and _get(record, "mode") != "off"
    tokens = cut if stopped else _get(record, "tokens") if monitored else None
    return Outcome(
        index=_get(choice, "index") or 0,
        end=end,
        tokens=_counted(choice, usage) if tokens is None else tokens,
        would_stop=None if stopped else cut,
        monitored=monitored or stopped,
    )


def _counted(choice: Any, usage: Any) -> int | None:
    """The tokens of a choice, from whatever else the answer has."""
    logprobs = _get(choice, "logprobs")
    for tokens in (
        _get(choice, "token_ids"),
        _get(logprobs, "content"),
        _get(logprobs, "token_logprobs"),
    ):
        if tokens:
            return len(tokens)
    count = _get(usage, "completion_tokens")
    return count if isinstance(count, int) else None


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)
