"""What one gateway holds: its servers, the gate in force, its counters."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from aiohttp import web

from espo_gateway.config import WORD, Config
from espo_gateway.critic.probe import AnswerProbe
from espo_gateway.critic.server import CriticServer, ValueServer
from espo_gateway.errors import Conflict, InvalidRequest
from espo_gateway.front.admission import Admission
from espo_gateway.front.auth import Keys, read_keys
from espo_gateway.front.drain import Traffic
from espo_gateway.front.headers import ANSWERED, CrossOrigin, answered_headers
from espo_gateway.front.paths import served
from espo_gateway.stop.gate_json import Control, gate_from_json
from espo_gateway.stop.rules import Gate
from espo_gateway.stream.chunks import Chunk
from espo_gateway.stream.decided import DecidedSession, can_decide
from espo_gateway.stream.request import Plan, Single
from espo_gateway.stream.session import Policy, Session
from espo_gateway.telemetry.logs import current
from espo_gateway.telemetry.metrics import Metrics
from espo_gateway.traces.sessions import Turn
from espo_gateway.tuning.observers import Observers
from espo_gateway.upstream.connection import Reply
from espo_gateway.upstream.pool import UpstreamPool

log = logging.getLogger(__name__)

_NO_KEYS = Keys()
#: How many pushed gates a request may name by their versions.
GATES = 64
#: A request's word for a choice that was stopped.
FINISH_REASON = "X-Espo-Finish-Reason"


class Gateway:
    """One gateway's state. url: where it listens, once it does."""

    def __init__(
        self,
        pool: UpstreamPool,
        config: Config,
        metrics: Metrics,
        keys: Keys = _NO_KEYS,
        *,
        critic: ValueServer | None = None,
    ) -> None:
        self.pool = pool
        self.config = config
        self.url = ""
        self.critic = critic
        self.answer_probe = AnswerProbe(pool, registry=metrics.registry)
        self.metrics = metrics
        self.keys = keys
        self._finish_reasons = config.finish_reasons
        self.policy = Policy(self._finish_reasons[""], refuse=config.unmonitored == "refuse")
        self.traffic = Traffic()
        self.admission = Admission(config.max_in_flight, config.max_queue)
        self.cross_origin = CrossOrigin(pool)
        #: ids of requests under way whose choices the servers know by ids of their own, and how
        #: many those are
        self.several: dict[str, int] = {}
        self.gate = Gate()
        #: those that were pushed, the newest last, by version
        self.pushed: dict[int, Gate] = {}
        #: choices being generated
        self.sessions: set[Session] = set()
        #: told of every choice that has ended
        self.followers: list[Callable[[Session], None]] = []
        self._gate_read = config.read_gate()
        if self._gate_read is not None:
            self.gate = gate_from_json(self._gate_read, has_critic=critic is not None)
        #: tuning and recording
        self.observers = Observers(config, self.gate, has_critic=critic is not None)
        if self.observers.tuning is not None:
            self.gate = self.observers.tuning.gate

    def policy_of(self, request: web.Request, path: str) -> Policy:
        """For the choices of a request to a route. Raises InvalidRequest for a bad header."""
        word = request.headers.get(FINISH_REASON)
        if word is None:
            word = self._finish_reasons.get(path, self.policy.finish_reason)
        elif not WORD.fullmatch(word):
            raise InvalidRequest(
                f"{FINISH_REASON} must be one word of letters, digits and _.-, as `early_stop`",
                param=FINISH_REASON,
            )
        return replace(self.policy, finish_reason=word)

    def session(
        self,
        planned: Plan,
        single: Single,
        policy: Policy,
        began: Callable[[], None],
        turn: Turn | None,
        head: Chunk,
    ) -> Session:
        """For one choice of a request that begins now: the seam where it is settled who decides.

        head: of the answer, which its choices share.
        """
        gate = self.gate_of(planned.control)
        followers = self.observers.followers(gate, single.body, turn)
        by_server = (
            not followers
            and (self.config.decide == "engine" or self.pool.decides)
            and can_decide(gate, planned, has_values=self.config.critic_in_engine)
        )
        return (DecidedSession if by_server else Session)(
            gate,
            planned.control,
            planned.asked,
            single,
            chat=planned.chat,
            policy=policy,
            began=began,
            followers=followers,
            earlier=None if turn is None else turn.earlier,
            ids=self.observers.wants_ids(turn),
            head=head,
        )

    def push_gate(self, data: bytes) -> None:
        """Put a gate in force for the requests that come; raises InvalidRequest or Conflict.

        A request under way keeps the gate it started with; where this one names other weights, they
        are those of its tokens from now on.
        """
        if self.observers.tuning is not None:
            raise Conflict(
                "this gateway finds its gate by itself (--target-share); start it without that to "
                "push one, or with --gate to choose the rule and its constants"
            )
        gate = self.gate = gate_from_json(data, has_critic=self.critic is not None)
        self.pushed.pop(gate.version, None)
        self.pushed[gate.version] = gate
        if len(self.pushed) > GATES:
            del self.pushed[next(iter(self.pushed))]
        for session in self.sessions:
            session.weights_are(gate.weights_version)

    def gate_of(self, control: Control) -> Gate:
        """The gate that watches a request, with the weights that sample it now.

        Raises InvalidRequest when it names one that is not known.
        """
        if control.gate is None or control.gate == self.gate.version:
            return self.gate
        pushed = self.pushed.get(control.gate)
        if pushed is None:
            raise InvalidRequest(
                f"espo.gate: no gate of version {control.gate} was pushed, or {GATES} others were "
                "since then: push it again, or leave it out",
                param="espo.gate",
            )
        return replace(pushed, weights_version=self.gate.weights_version)

    def reload(self) -> None:
        """Read the key files again, and the gate's; all of it or, when it raises, nothing.

        A gate pushed since then stays in force unless the file has changed.

        Raises InvalidRequest naming the setting.
        """
        keys = read_keys(self.config)
        try:
            data = self.config.read_gate()
            if data is not None and data != self._gate_read:
                self.push_gate(data)
        except OSError as error:
            said = f"{self.config.gate_named}: {error.strerror}"
            raise InvalidRequest(said, param="gate") from error
        except InvalidRequest as error:
            said = f"{self.config.gate_named}: {error}"
            raise InvalidRequest(said, param=error.param) from error
        self.keys, self._gate_read = keys, data
        self.pool.headers = keys.upstream_headers
        if isinstance(self.critic, CriticServer):
            self.critic.headers = keys.upstream_headers
        log.info("read keys and gate again: %d API keys, gate %s", len(keys.api), self.gate.version)

    def answered(self, request: web.Request, reply: Reply) -> None:
        """Take the head of a server's answer, for that of the client's; of several the first."""
        if ANSWERED not in request:
            request[ANSWERED] = answered_headers(reply.headers, self.pool.urls, anew=True)

    async def complete(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add to the head of an answer, about to be sent, what the servers have to say in it."""
        headers = request.get(ANSWERED)
        if headers is None:
            if "Origin" not in request.headers or not served(request.path):
                return
            headers = await self.cross_origin.headers(self.keys, request)
        own = {name.lower() for name in response.headers}
        for name, value in headers.items():
            if name.lower() not in own:
                response.headers.add(name, value)

    def drain(self) -> None:
        """Refuse new requests; `traffic.over` waits for those under way."""
        self.traffic.drain()

    def finished(self, session: Session, turn: Turn | None = None) -> None:
        """Take a choice that has ended, in whatever way."""
        self.sessions.discard(session)
        self.metrics.count(session)
        for follower in self.followers:
            follower(session)
        entry = current.get()
        if entry is not None:
            entry.count(session)
        if gate := self.observers.finished(session, entry.request_id if entry else None, turn):
            self.gate = gate
