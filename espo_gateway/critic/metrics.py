"""What Prometheus is told of a critic."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
)

from espo_gateway.errors import UpstreamError

_VALUE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class CriticMetrics:
    """Counters of one critic; found nowhere without a registry."""

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

    @contextmanager
    def question(self) -> Iterator[None]:
        """Count one question and time it; an UpstreamError within is a failure to answer."""
        asked, outcome = time.monotonic(), "dropped"
        try:
            yield
            outcome = "answered"
            self.seconds.observe(time.monotonic() - asked)
        except UpstreamError:
            outcome = "failed"
            raise
        finally:
            self.questions.labels(outcome).inc()
