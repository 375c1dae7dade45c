"""What the page at /espo shows: the gateway as it is now, as JSON values.

Nothing is kept per token. A snapshot reads the sessions; the page makes lines of successive ones.
No prompt and no completion is in it.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

from espo_gateway.front.gateway import Gateway
from espo_gateway.stop.rules import RULES
from espo_gateway.stream.session import Session
from espo_gateway.telemetry.metrics import total

#: Streams told of one by one.
MAX_STREAMS = 200
#: Ended ones told of, and for how many seconds.
MAX_ENDED, ENDED_SECONDS = 50, 5.0
#: Seconds over which tokens per second are measured.
RATE_SECONDS = 5.0
#: Nobody looks any more after so many seconds without a snapshot.
_UNWATCHED = 10.0
#: Longest text told; ids and model names come from outside.
_LONGEST = 120

Json = dict[str, Any]


class Live:
    """The snapshots of one gateway, and the little that must be remembered between them."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._started = time.time()
        self._numbers = itertools.count(1)
        self._ids: WeakKeyDictionary[Session, int] = WeakKeyDictionary()
        self._ended: deque[tuple[float, Json]] = deque(maxlen=MAX_ENDED)
        self._tokens: deque[tuple[float, float]] = deque()
        self._looked = float("-inf")

    def ended(self, session: Session) -> None:
        """Take a choice that has ended; remembered for a moment, when somebody looks."""
        now = time.monotonic()
        if now - self._looked < _UNWATCHED:
            self._ended.append((now, {**self._stream(session, now), "end": session.end}))

    def snapshot(self) -> Json:
        """The gateway now. Times in seconds, `started` and `time` since 1970."""
        now = self._looked = time.monotonic()
        while self._ended and now - self._ended[0][0] > ENDED_SECONDS:
            self._ended.popleft()
        gateway = self._gateway
        gate, sessions = gateway.gate, gateway.sessions
        shown = heapq.nlargest(MAX_STREAMS, sessions, key=lambda session: session.tokens)
        totals = _totals(gateway)
        return {
            "time": time.time(),
            "started": self._started,
            "gate": {
                "rule": gate.rule,
                "value": gate.source,
                "beta": gate.beta,
                "epsilon": gate.epsilon,
                "p_star": gate.p_star,
                "confidence": gate.confidence,
                "hazard": gate.hazard,
                "version": gate.version,
            },
            "running": len(sessions),
            "streams": [self._stream(session, now) for session in shown],
            "ended": [stream for _, stream in self._ended],
            "totals": totals,
            "tokens_per_second": self._rate(now, totals["tokens"]),
            "servers": gateway.pool.states(),
            "queued": gateway.admission.queued,
        }

    def _rate(self, now: float, tokens: float) -> float | None:
        """Tokens per second since the oldest snapshot of the last seconds, if there was one."""
        seen = self._tokens
        while seen and now - seen[0][0] > RATE_SECONDS:
            seen.popleft()
        seen.append((now, tokens))
        taken = now - seen[0][0]
        return (tokens - seen[0][1]) / taken if taken > 0.0 else None

    def _stream(self, session: Session, now: float) -> Json:
        record, head = session.record, session.head
        if session not in self._ids:
            self._ids[session] = next(self._numbers)
        value = session.value if record.value is None else record.value
        rule = RULES[session.gate.rule]
        # Until a critic has been asked, the lowest that its answer could make it.
        threshold = rule.bound(session.gate, value or 0.0) if rule.compared else None
        return {
            "id": self._ids[session],
            "name": str(head.get("id", head.get("request_id")) or "")[:_LONGEST],
            "model": str(head.get("model") or "")[:_LONGEST],
            "index": session.index,
            "age": now - session.started,
            "tokens": session.tokens,
            "cut": record.cut,
            "mode": record.mode,
            "rule": record.rule,
            "measure": rule.compared or "z",
            "z": record.z,
            "value": value,
            "threshold": threshold if record.threshold is None else record.threshold,
        }


def _totals(gateway: Gateway) -> Json:
    """Sums since the start; tokens include those of running choices."""
    metrics = gateway.metrics
    ended = {
        end: total(metrics.choices, end=end)
        for end in ("completed", "length", "early_stop", "aborted")
    }
    whole = ended["completed"] + ended["length"] + ended["early_stop"]
    return {
        "requests": total(metrics.requests),
        "in_flight": total(metrics.in_flight),
        **ended,
        "stop_share": ended["early_stop"] / whole if whole else None,
        "shadow_stops": total(metrics.stops, mode="shadow"),
        "tokens": total(metrics.tokens) + sum(session.tokens for session in gateway.sessions),
        "saved_estimate": total(metrics.saved),
        "shadow_saved": total(metrics.shadow_saved),
        "overshoot": total(metrics.overshoot),
        "unmonitored": total(metrics.unmonitored),
        "errors": total(metrics.upstream_errors),
        "disconnects": total(metrics.cancelled),
        "critic_asked": total(metrics.critic_tokens, outcome="asked"),
        "critic_avoided": total(metrics.critic_tokens, outcome="avoided"),
    }
