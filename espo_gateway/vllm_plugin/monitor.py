"""The monitor of one request inside vLLM's engine: a `Watch` fed with rows of logprobs. Pure.

    monitor = Monitor(order, prompt_tokens=12)
    for row in rows:  # the sampled token's logprob, then the largest ones at its position
        if monitor.push(row, last=False):
            break  # the request ends with this token
    request.stop_reason = monitor.stop_reason(None, tokens)

It is the gateway's decision: the same watch with the same numbers, so the same cut.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from espo_gateway.stop.regret import MISSING_LOGPROB
from espo_gateway.stop.rules import RULES
from espo_gateway.stop.tracks import token_confidence
from espo_gateway.stop.watch import Verdict, Watch
from espo_gateway.vllm_plugin.batch import can_be_batched
from espo_gateway.vllm_plugin.wire import STOPPED, Order, Told, stop_reason_of

_STOP, _ASK = Verdict.STOP, Verdict.ASK


class Monitor:
    """The monitor of one request.

    alternatives: largest logprobs a position that it reads.
    batched: whether a `Batch` can follow it.
    fault: why it watches no more; None while it does.
    """

    __slots__ = (
        "_audited",
        "_confident",
        "_enforces",
        "_order",
        "_push",
        "_stopped",
        "_trace",
        "_traced",
        "alternatives",
        "batched",
        "fault",
        "watch",
    )

    def __init__(self, order: Order, prompt_tokens: int) -> None:
        self._order = order
        gate = order.gate
        self.alternatives = gate.top_logprobs
        self.batched = can_be_batched(gate) and not order.trace
        self._confident = self.alternatives > 1
        self._audited = order.audit > 0.0 and random.random() < order.audit
        self._enforces = order.mode == "enforce" and not self._audited
        self._stopped = False
        self.fault: str | None = None
        self.watch = Watch(gate, prompt_tokens, history=order.history, asks=gate.needs_critic)
        self._push = self.watch.push
        # Past the cut the watch that decides follows no more.
        self._traced = (
            Watch(gate, prompt_tokens, history=order.history, decides=False)
            if order.trace
            else None
        )
        self._trace: list[tuple[float | None, float, float | None, float | None]] = []

    def push(self, row: Sequence[float] | None, *, last: bool, value: float | None = None) -> bool:
        """Take the next token's logprobs. Returns whether the request is to end with it.

        row: the sampled token's, then the largest ones, falling; None when there are none.
        last: the token completes the answer. value: what the engine says of V, if it does.
        """
        logprob = top = confidence = None
        if row is not None and len(row) > self.alternatives:
            logprob, top = row[0], row[1]
            if not logprob <= top:
                # Where one request lists tokens of its own, vLLM may leave out the others' largest.
                top = logprob if top > MISSING_LOGPROB else None
            if self._confident:
                confidence = token_confidence(row[1 : self.alternatives + 1], self.alternatives)
        verdict = self._push(logprob, top, last=last, confidence=confidence)
        if self._traced is not None:
            self._traced.push(logprob, top, confidence=confidence)
            self._trace.append(self._traced.look())
        if verdict is _ASK:
            verdict = self._answer(value)
        if verdict is _STOP and self._enforces:
            self._stopped = True
        return self._stopped

    def _answer(self, value: float | None) -> Verdict:
        """What the watch asks of the last token is known at once, or not at all."""
        watch, gate = self.watch, self._order.gate
        v = watch.valued(watch.tokens, {} if value is None else {"critic": (value,)})
        if self._trace and v is not None:
            regret, z, _, _ = self._trace[-1]
            self._trace[-1] = regret, z, RULES[gate.rule].bound(gate, v), v
        return watch.settle(watch.tokens, v)

    @property
    def done(self) -> bool:
        """Whether no further token changes what it says."""
        return self.watch.cut is not None and self._traced is None

    def stop_reason(self, own: int | str | None, tokens: int) -> int | str | None:
        """Of the request, which has ended.

        own: what vLLM says where it is not stopped. tokens: of the answer.
        """
        if self._order.record:
            return stop_reason_of(self._told(None if self._stopped else own, tokens))
        return STOPPED if self._stopped else own

    def _told(self, own: int | str | None, tokens: int) -> Told:
        watch = self.watch
        return Told(
            tokens=tokens,
            mode="shadow" if self._audited else self._order.mode,
            cut=watch.cut,
            z=watch.z if tokens and self.fault is None else None,
            threshold=watch.threshold,
            value=watch.value,
            missing=watch.missing,
            audited=self._audited,
            stop_reason=own,
            fault=self.fault,
            trace=self._trace if self._traced is not None else None,
        )
