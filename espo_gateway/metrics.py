"""What the gateway tells Prometheus."""

from __future__ import annotations

import logging
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from espo_gateway.errors import GatewayError, UpstreamError
from espo_gateway.session import Session
from espo_gateway.upstream import UpstreamPool

log = logging.getLogger(__name__)

_VALUE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """Counters of one gateway, in a registry of its own."""

    def __init__(self, pool: UpstreamPool) -> None:
        self.registry = r = CollectorRegistry()
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
        self.in_flight = Gauge(
            "espo_gateway_requests_in_flight", "Requests being served", registry=r
        )
        self.tokens = Counter(
            "espo_gateway_generated_tokens", "Monitored tokens the upstreams sent", registry=r
        )
        self.stops = Counter(
            "espo_gateway_stops", "Decisions to stop", ["rule", "mode"], registry=r
        )
        self.overshoot = Counter(
            "espo_gateway_overshoot_tokens", "Tokens received after the decision", registry=r
        )
        self.missing = Counter(
            "espo_gateway_missing_tokens", "Tokens without a usable logprob", registry=r
        )
        self.cancelled = Counter(
            "espo_gateway_client_disconnects", "Requests whose client left early", registry=r
        )
        self.upstream_errors = Counter(
            "espo_gateway_upstream_errors", "Failed upstream requests", ["kind"], registry=r
        )
        self.gate_version = Gauge(
            "espo_gateway_gate_version", "Version of the gate in force", registry=r
        )
        upstream = Gauge(
            "espo_gateway_upstream_requests_in_flight",
            "Requests an upstream is working on",
            ["upstream"],
            registry=r,
        )
        for server in pool.servers:
            upstream.labels(server.url).set_function(partial(getattr, server, "in_flight"))

    def count(self, session: Session) -> None:
        """Take a choice that has ended, in whatever way."""
        record = session.record
        self.tokens.inc(record["tokens"])
        self.missing.inc(record["missing"])
        self.overshoot.inc(record["overshoot"])
        if record["cut"] is not None:
            self.stops.labels(record["rule"], record["mode"]).inc()

    def count_error(self, error: GatewayError) -> None:
        """Take an error that a client is told of."""
        if isinstance(error, UpstreamError):
            self.upstream_errors.labels(type(error).__name__).inc()
            log.warning("upstream: %s", error.message)

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class CriticMetrics:
    """Counters of one critic server; found nowhere without a registry."""

    def __init__(self, registry: CollectorRegistry | None) -> None:
        self.questions = Counter(
            "espo_gateway_critic_questions",
            "Values asked for: answered, failed, or dropped because nobody waits any more",
            ["outcome"],
            registry=registry,
        )
        self.requests = Counter(
            "espo_gateway_critic_requests",
            "Requests to the critic, each with the questions of many streams",
            ["outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            "espo_gateway_critic_answer_duration_seconds",
            "From a question to its value",
            buckets=_VALUE_SECONDS,
            registry=registry,
        )
        self.waiting = Gauge(
            "espo_gateway_critic_questions_waiting", "Questions not yet sent", registry=registry
        )
