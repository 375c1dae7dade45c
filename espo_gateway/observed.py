"""A watch whose tokens are also followed by tuning and recording."""

from __future__ import annotations

from espo_gateway.recording import Trace
from espo_gateway.rules import Gate, Verdict, Watch
from espo_gateway.tuning import Evidence


class ObservedWatch(Watch):
    """Decides as any watch; what it is told goes on to `evidence`, up to a cut, and to `trace`.

    judging: the gate that evidence is taken under.
    """

    __slots__ = ("evidence", "trace")

    def __init__(
        self, gate: Gate, prompt_tokens: int, *, judging: Gate | None = None, traced: bool = False
    ) -> None:
        super().__init__(gate, prompt_tokens)
        self.evidence = None if judging is None else Evidence(judging, prompt_tokens)
        self.trace = Trace(confidences=gate.top_logprobs > 1) if traced else None

    def push(
        self,
        logprob: float | None,
        max_logprob: float | None,
        *,
        last: bool = False,
        confidence: float | None = None,
    ) -> Verdict:
        if self.trace is not None:
            self.trace.push(logprob, max_logprob, confidence)
        if self.evidence is not None and self.cut is None:
            self.evidence.push(logprob, max_logprob, last=last, confidence=confidence)
        return super().push(logprob, max_logprob, last=last, confidence=confidence)
