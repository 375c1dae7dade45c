"""One choice whose end the server decides: its answer is handed on, and its record read off it.

A server that decides by itself (`vllm_plugin/scheduler.py`) gets the gate with the request and says
in the choice's `stop_reason` what it has seen. Nothing is asked for that the client has not asked
for: no stream, no logprobs. Until the end the gateway knows no more of such a choice than that it
runs.
"""

from __future__ import annotations

import math
import time
from typing import Any

from espo_gateway.errors import EXCERPT, UpstreamProtocolError
from espo_gateway.stop.gate_json import Control
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.watch import Watch
from espo_gateway.stream.chunks import Chunk, decode_chunk, only_choice
from espo_gateway.stream.cut import text_of
from espo_gateway.stream.request import Body, Plan
from espo_gateway.stream.session import Session
from espo_gateway.stream.templates import Output
from espo_gateway.vllm_plugin.wire import STOPPED, decides_alone, order_fields, told_by

#: Ends of which the engine does not tell: it is not the one that finds them.
_OUTSIDE = ("abort", "error")


def can_decide(gate: Gate, planned: Plan, *, has_values: bool) -> bool:
    """Whether a server that decides can be left to it, and its record is the gateway's.

    has_values: it knows a critic's V.
    """
    control: Control = planned.control
    if control.probe is not None or not decides_alone(gate, has_values=has_values):
        return False  # what is asked, and of whom, only the gateway knows
    # vLLM finds stop strings outside its engine, and what that knows of such an answer is lost.
    told = control.mode == "shadow" or control.audit or control.trace
    fields = planned.body["sampling_params"] if planned.tokens else planned.body
    return not (told and fields.get("stop"))


class DecidedSession(Session):
    """The choice, with the parts of a `Session` that others read.

    Give it the events of a stream as they come, or the whole answer (`take_whole`).
    """

    def body(self, body: Body, *, tokens: bool) -> Body:
        """The client's body as it goes to the server. tokens: to vLLM's route for tokens."""
        order = order_fields(
            self.gate, mode=self.mode, history=self._history, trace=self._trace is not None
        )
        body = dict(body)
        place, name = body, "vllm_xargs"
        if tokens:
            place = body["sampling_params"] = dict(body["sampling_params"])
            name = "extra_args"
        given = place.get(name) or {}
        # Anything else is the server's to refuse.
        if isinstance(given, dict):
            place[name] = {**given, **order}
        if body.get("stream"):
            # Of an end that is not the engine's only this tells the tokens.
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        return body

    def weights_are(self, version: str) -> None:
        """Nobody here sees from which token on; the server's record tells."""

    # -- what the server sends -----------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """As `Session.receive`."""
        self._receive_any(data)

    def _take(self, data: bytes, chunk: Chunk) -> None:
        choice = self._choice(chunk)
        if self.first_token is None and (
            choice.get("finish_reason") or choice.get("token_ids") or self._text(choice)
        ):
            self.first_token = time.monotonic()
            if self._began is not None:
                self._began()
        if choice.get("finish_reason"):
            self._adopt(choice)
        self._outbox.hold(chunk, choice, [], 0)

    def take_whole(self, data: bytes) -> tuple[Chunk, Chunk]:
        """The answer's other fields, and the choice with its record.

        Raises UpstreamProtocolError: it is none, or nobody has decided and that is insisted on.
        """
        try:
            answer = decode_chunk(data)
        except ValueError as error:
            raise UpstreamProtocolError(
                "the upstream sent no JSON object", excerpt=repr(data[:EXCERPT])
            ) from error
        choice = self._choice(answer)
        del answer["choices"]
        usage = answer.pop("usage", None)
        self._usage = usage if isinstance(usage, dict) else None
        self._outbox.share(answer)
        choice["index"] = self.index
        self._adopt(choice)
        self._outbox.last = {"choices": [choice]}
        self._count()
        choice["espo"] = self.record.json()
        return answer, choice

    def _choice(self, chunk: Chunk) -> Chunk:
        try:
            return only_choice(chunk.get("choices"))
        except ValueError as error:
            raise UpstreamProtocolError(f"the upstream sent a malformed chunk: {error}") from error

    def _text(self, choice: Chunk) -> str:
        return text_of(choice, chat=self._chat)

    def _adopt(self, choice: Chunk) -> None:
        """Take what the engine says at the choice's end, and say it in the client's words."""
        told = told_by(choice.get("stop_reason"))
        watch = self.watch = Watch(self.gate, self.prompt_tokens or 0)
        watch.z = math.nan  # this one follows nothing: only the server can tell
        if told is None:
            found = choice.get("finish_reason") in _OUTSIDE
            if not found and type(choice.get("stop_reason")) is not str:
                self.give_up("the upstream does not decide by itself, though it was said to")
            return
        choice["stop_reason"] = told.stop_reason
        watch.tokens, watch.missing = told.tokens, told.missing
        if told.weights and self.gate.weights_version:  # else nobody has named any
            self._weights = told.weights
        if told.fault is not None:
            self.give_up(told.fault)
            return
        watch.cut, watch.threshold, watch.value = told.cut, told.threshold, told.value
        if told.z is not None:
            watch.z = told.z
        if self._trace is not None:
            self._trace.adopt(told.trace or [])
        if self._cut is not None:
            choice["finish_reason"] = self._policy.finish_reason
            choice["stop_reason"] = STOPPED

    def _count(self) -> None:
        """Of an end that is not the engine's the usage tells the tokens."""
        usage: dict[str, Any] = self._usage or {}
        count = usage.get("completion_tokens")
        if self.watch is not None and not self.watch.tokens and type(count) is int:
            self.watch.tokens = count

    # -- what the client gets ------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """It is the server that ends it."""
        return False

    def drain(self) -> list[Output]:
        outbox = self._outbox
        outbox.release(None, None)
        ready, outbox.ready = outbox.ready, []
        return ready

    def finish(self) -> Chunk:
        self._count()
        return super().finish()

    @property
    def usage(self) -> Chunk | None:
        return self._usage

    @property
    def value(self) -> float | None:
        """As `Session.value`; V at a stop is the record's, and at other ends the server's alone."""
        return self.gate.constant if self.gate.source == "constant" else None
