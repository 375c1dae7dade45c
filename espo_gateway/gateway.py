"""What one gateway holds: its servers, the gate in force, its counters. No HTTP of its own."""

from __future__ import annotations

from espo_gateway.admission import Admission
from espo_gateway.config import Config
from espo_gateway.critic import ValueServer
from espo_gateway.gates import gate_from_json
from espo_gateway.live import Live
from espo_gateway.metrics import Metrics
from espo_gateway.rules import Gate
from espo_gateway.scrape import GatewayCollector
from espo_gateway.session import Session
from espo_gateway.upstream import UpstreamPool


class Gateway:
    """One gateway's state. url: where it listens, once it does."""

    def __init__(
        self,
        pool: UpstreamPool,
        config: Config,
        metrics: Metrics,
        *,
        critic: ValueServer | None = None,
    ) -> None:
        self.pool = pool
        self.config = config
        self.url = ""
        self.critic = critic
        self.metrics = metrics
        self.admission = Admission(config.max_in_flight, config.max_queue)
        self.live = Live()
        self.gate = Gate()
        #: choices being generated
        self.sessions: set[Session] = set()
        metrics.registry.register(GatewayCollector(self))
        if config.gate is not None:
            self.push_gate(config.gate)

    def push_gate(self, data: bytes) -> None:
        """Put a gate in force for the requests that come; raises InvalidRequest.

        A request under way keeps the gate it started with.
        """
        self.gate = gate_from_json(data, has_critic=self.critic is not None)

    def finished(self, session: Session) -> None:
        """Take a choice that has ended, in whatever way."""
        self.sessions.discard(session)
        self.metrics.count(session)
        self.live.ended(session)
