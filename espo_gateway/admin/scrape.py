"""What Prometheus reads off a gateway at each scrape, and so cannot drift from it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from espo_gateway.front.gateway import Gateway


class GatewayCollector(Collector):
    """Choices under way, the queue, the gate in force and the servers."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def describe(self) -> Iterator[Metric]:
        """Nothing: else registering would collect, from a gateway that is not whole yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The families as they are now."""
        gateway, gate = self._gateway, self._gateway.gate
        rule = GaugeMetricFamily(
            "espo_gateway_gate_info",
            "Always 1; the rule in force and where its V comes from",
            labels=["rule", "value"],
        )
        rule.add_metric([gate.rule, gate.source or "none"], 1)
        yield rule
        for name, text, number in (
            ("choices_in_flight", "Monitored choices under way", len(gateway.sessions)),
            ("requests_queued", "Requests waiting for others to finish", gateway.admission.queued),
            ("gate_version", "Version of the gate in force", gate.version),
            ("gate_beta", "beta of the gate in force", gate.beta),
            ("gate_epsilon", "epsilon of the gate in force", gate.epsilon),
            ("gate_p_star", "p* of the gate in force", gate.p_star),
        ):
            yield GaugeMetricFamily(f"espo_gateway_{name}", text, number)
        yield from self._upstreams()

    def _upstreams(self) -> Iterator[Metric]:
        in_flight, healthy, breaker = (
            GaugeMetricFamily(f"espo_gateway_upstream_{name}", text, labels=["upstream"])
            for name, text in (
                ("requests_in_flight", "Requests an upstream is working on"),
                ("healthy", "Whether the last health check succeeded"),
                ("breaker_open", "Whether it is left alone after failures in a row"),
            )
        )
        retries = CounterMetricFamily(
            "espo_gateway_upstream_retries",
            "Tries sent to this upstream after another had failed",
            labels=["upstream"],
        )
        for state in self._gateway.pool.states():
            labels = [state["url"]]
            in_flight.add_metric(labels, state["in_flight"])
            healthy.add_metric(labels, state["healthy"])
            breaker.add_metric(labels, state["breaker"] != "closed")
            retries.add_metric(labels, state["retries"])
        yield from (in_flight, healthy, breaker, retries)
