"""What the gateway tells Prometheus.

No label has a value that a client chooses: routes, statuses, rules, servers and ends are few.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import re
import time
from collections import deque
from typing import get_args

from aiohttp import web
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from espo_gateway.errors import GatewayError, UpstreamError
from espo_gateway.stream.decided import DecidedSession
from espo_gateway.stream.record import End
from espo_gateway.stream.session import Session

log = logging.getLogger(__name__)

#: When a request came, by `time.monotonic`.
ARRIVED = web.RequestKey("arrived", float)

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
#: As vLLM has them, so that the two can be laid over each other.
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
_Z = (-2, -1, -0.5, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10)
#: In z for some rules and a probability for others.
_THRESHOLDS = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, *_Z[7:])


class Metrics:
    """Counters of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self._savings = Savings()
        ProcessCollector(registry=r)
        build = Gauge(
            "espo_gateway_build_info",
            "Always 1; what runs is in the labels",
            ["version", "python"],
            registry=r,
        )
        build.labels(_version(), platform.python_version()).set(1)
        self.requests = Counter(
            "espo_gateway_requests", "Finished requests", ["endpoint", "status"], registry=r
        )
        self.seconds = Histogram(
            "espo_gateway_request_duration_seconds",
            "From a request's arrival to its last byte",
            ["endpoint"],
            buckets=_SECONDS,
            registry=r,
        )
        self.first_token_seconds = Histogram(
            "espo_gateway_time_to_first_token_seconds",
            "From a monitored request's arrival to the first token of any of its choices",
            ["endpoint"],
            buckets=_FIRST_TOKEN_SECONDS,
            registry=r,
        )
        self.token_seconds = Histogram(
            "espo_gateway_time_per_output_token_seconds",
            "Mean time between the tokens of one choice, after its first",
            buckets=_TOKEN_SECONDS,
            registry=r,
        )
        self.in_flight = Gauge(
            "espo_gateway_requests_in_flight", "Requests being served", registry=r
        )
        self.choices = Counter(
            "espo_gateway_choices",
            "Monitored choices by how they ended; the stopped share is early_stop's among all "
            "but aborted ones",
            ["end"],
            registry=r,
        )
        for end in get_args(End):
            self.choices.labels(end)  # there from the start, so that a rate has a beginning
        self.tokens = Counter(
            "espo_gateway_generated_tokens", "Monitored tokens the upstreams sent", registry=r
        )
        self.stops = Counter(
            "espo_gateway_stops", "Decisions to stop", ["rule", "mode"], registry=r
        )
        self.saved = Counter(
            "espo_gateway_estimated_saved_tokens",
            "Estimate of the tokens that enforced stops saved: for each the mean remaining length "
            "of the last 1024 unstopped choices that were longer than its cut",
            registry=r,
        )
        self.shadow_saved = Counter(
            "espo_gateway_shadow_saved_tokens",
            "Tokens seen after a decision that was not enforced: what enforcing had saved",
            registry=r,
        )
        self.overshoot = Counter(
            "espo_gateway_overshoot_tokens", "Tokens received after the decision", registry=r
        )
        self.missing = Counter(
            "espo_gateway_missing_tokens", "Tokens without a usable logprob", registry=r
        )
        self.unmonitored = Counter(
            "espo_gateway_unmonitored_requests",
            "Requests, or choices of one, that nothing watched, by why",
            ["reason"],
            registry=r,
        )
        self.z = Histogram(
            "espo_gateway_regret_z",
            "z of a choice: at the decision to stop, else at the last token",
            ["decision"],
            buckets=_Z,
            registry=r,
        )
        self.threshold = Histogram(
            "espo_gateway_decision_threshold",
            "What the rule compared with at the decision to stop: z, a probability or a hazard",
            ["rule"],
            buckets=_THRESHOLDS,
            registry=r,
        )
        self.critic_tokens = Counter(
            "espo_gateway_critic_tokens",
            "Tokens watched under a gate that has a critic: it was asked about them, or need not "
            "be, because z was at most beta * epsilon",
            ["outcome"],
            registry=r,
        )
        self.cancelled = Counter(
            "espo_gateway_client_disconnects", "Requests whose client left early", registry=r
        )
        self.upstream_errors = Counter(
            "espo_gateway_upstream_errors", "Failed upstream requests", ["kind"], registry=r
        )

    def first_token(self, request: web.Request, path: str) -> None:
        """Take the moment a request's first token is there; later ones change nothing."""
        arrived = request.pop(ARRIVED, None)
        if arrived is not None:
            endpoint = self.first_token_seconds.labels(path)
            endpoint.observe(time.monotonic() - arrived)

    def count(self, session: Session) -> None:
        """Take a choice that has ended, in whatever way."""
        if session.unmonitored is not None:
            self.count_unmonitored(session.unmonitored)
            return
        record, end = session.record, session.end
        tokens, cut = record.tokens, record.cut
        self.choices.labels(end).inc()
        self.tokens.inc(tokens)
        self.missing.inc(record.missing)
        self.overshoot.inc(record.overshoot)
        if record.z is not None:
            self.z.labels("stop" if cut is not None else "none").observe(record.z)
            if session.first_token is not None and tokens > 1:
                # Other choices of its request may still have gone on.
                taken = (session.over or time.monotonic()) - session.first_token
                self.token_seconds.observe(taken / (tokens - 1))
        if end in ("completed", "length"):
            self._savings.ended(tokens)
        if cut is not None:
            self.stops.labels(record.rule, record.mode).inc()
            if record.threshold is not None:
                self.threshold.labels(record.rule).observe(record.threshold)
            if end == "early_stop":
                self.saved.inc(self._savings.estimate(cut))
            else:
                self.shadow_saved.inc(tokens - cut)
        # What a server that decides has asked itself, it does not tell.
        if session.gate.needs_critic and not isinstance(session, DecidedSession):
            self.critic_tokens.labels("asked").inc(session.asked)
            self.critic_tokens.labels("avoided").inc(tokens - session.asked)

    def count_unmonitored(self, reason: str) -> None:
        """Take a generation that is passed through; the reason, less its explanation, is told."""
        self.unmonitored.labels(re.split("[:;,(]", reason)[0].strip()).inc()

    def count_error(self, error: GatewayError) -> None:
        """Take an error that a client is told of."""
        if isinstance(error, UpstreamError):
            self.upstream_errors.labels(type(error).__name__).inc()
            log.warning("upstream: %s", error.message)

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


def total(counter: Counter | Gauge, **labels: str) -> float:
    """The sum over the label values not given."""
    return sum(
        sample.value
        for family in counter.collect()
        for sample in family.samples
        if not sample.name.endswith("_created") and labels.items() <= sample.labels.items()
    )


def _version() -> str:
    try:
        return importlib.metadata.version("espo")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


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
