"""What Prometheus is told of a source that is asked."""

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
from espo_gateway.stop.told import SourceName

_VALUE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class SourceMetrics:
    """Counters of one source, by its name; found nowhere without a registry."""

    def __init__(self, source: SourceName, registry: CollectorRegistry | None) -> None:
        self.questions = Counter(
            f"espo_gateway_{source}_questions",
            "Values asked for: answered, failed, or dropped because nobody waits any more",
            ["outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            f"espo_gateway_{source}_answer_duration_seconds",
            "From a question to its value",
            buckets=_VALUE_SECONDS,
            registry=registry,
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


class CriticMetrics(SourceMetrics):
    """Those of a critic."""

    def __init__(self, registry: CollectorRegistry | None) -> None:
        super().__init__("critic", registry)
        self.requests = Counter(
            "espo_gateway_critic_requests",
            "Requests to the critic, each with the questions of many streams",
            ["outcome"],
            registry=registry,
        )
        self.waiting = Gauge(
            "espo_gateway_critic_questions_waiting", "Questions not yet sent", registry=registry
        )


class ProbeMetrics(SourceMetrics):
    """Those of answer probes."""

    def __init__(self, registry: CollectorRegistry | None) -> None:
        super().__init__("probe", registry)
        self.tokens = Counter(
            "espo_gateway_probe_tokens", "Tokens sampled to answer probes", registry=registry
        )
