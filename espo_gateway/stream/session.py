"""One monitored choice: upstream chunks in, the client's chunks out, cut at the decision token.

A `Session` does no I/O: give `receive` every event, send on what `drain` gives, and end with
`finish`. When `ended` turns true nothing more is needed from the server and its request can be
cancelled.

It keeps no chunk longer than it must: one that a critic's answer could still cut, and the last.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from espo_gateway.errors import EXCERPT, UpstreamProtocolError, UpstreamStatusError
from espo_gateway.stop.gate_json import Control
from espo_gateway.stop.rules import RULES, Gate
from espo_gateway.stop.watch import Follower, Verdict, Watch
from espo_gateway.stream.chunks import Chunk, Signal, decode_chunk, read_signals
from espo_gateway.stream.cut import (
    HeldText,
    keep_tokens,
    kept_text,
    set_text,
    strip_logprobs,
    text_of,
)
from espo_gateway.stream.outbox import _Held
from espo_gateway.stream.record import End
from espo_gateway.stream.request import Asked, Single
from espo_gateway.stream.templates import Output, Template, template_of

_HEAD = ("id", "object", "created", "model")
#: What watches a stream that cannot be monitored.
NEVER = Gate()
#: Finish reasons of a completion that ended by itself.
_COMPLETED = ("stop", "tool_calls")
#: What a trace tells of each token.
_TRACED = ("g", "z", "threshold", "value")
_NOT_ON_LAST = (*_HEAD, "choices", "usage")


@dataclass(frozen=True)
class Policy:
    """What holds for all requests of a gateway.

    finish_reason: of a stopped choice; typed clients know no other word than "length" for "ended
        before it was done".
    refuse: an answer that cannot be monitored is an error; else it is served and says so.
    """

    finish_reason: str = "length"
    refuse: bool = True


class Session:
    """The monitor, the cut, the accounting and the record of one choice.

    began: called when its first token comes. watching: makes what watches it.
    """

    def __init__(
        self,
        gate: Gate,
        control: Control,
        asked: Asked,
        single: Single,
        *,
        chat: bool,
        policy: Policy | None = None,
        began: Callable[[], None] | None = None,
        watching: Callable[[Gate, int], Watch] = Watch,
    ) -> None:
        self.gate = control.applied(gate)
        self.mode = control.mode
        #: drawn to be generated to the end even if it would be stopped
        self.audited = control.audit is not None and random.random() < control.audit
        if self.audited:
            self.mode = "shadow"
        #: why nothing was monitored, though it was asked for
        self.unmonitored: str | None = None
        self.index = single.index
        self.prompt = single.prompt
        #: when it began, and when its first token came, by `time.monotonic`
        self.started = time.monotonic()
        self.first_token: float | None = None
        #: tokens the server has sent
        self.tokens = 0
        #: tokens of the prompt, None until known
        self.prompt_tokens = single.prompt_tokens
        #: ids of prompt and sampled tokens, kept only when a critic needs them
        self.prompt_token_ids: list[int] = []
        self.token_ids: list[int] = []
        #: decision tokens a critic must value, not yet put to it; and those not yet answered
        self.questions: list[int] = []
        self._unanswered: set[int] = set()
        #: how many there were, and the last V that was answered
        self.asked = 0
        self._answered: float | None = None
        self._began = began
        self._policy = policy or Policy()
        self._asked = asked
        self._chat = chat
        self._watch: Watch | None = None
        self._watching = watching
        self._model = single.body.get("model")
        self._trace: list[Chunk] | None = [] if control.trace else None
        self._tracer: Follower | None = None
        #: alternatives a token whose logprobs make up its confidence
        self._top_k = self.gate.top_logprobs if self.gate.top_logprobs > 1 else 0
        #: whether a critic will be asked, who reads token ids
        self.wants_ids = self.gate.needs_critic
        self._held: deque[_Held] = deque()
        self._lag = HeldText(single.body)
        self._chat_echo = bool(chat and single.body.get("echo"))
        #: plain chunks may be treated as such: whatever else a chunk tells is not for this client
        self._plain = not (
            asked.logprobs is not None
            or asked.token_ids
            or asked.continuous_usage
            or self.wants_ids
            or self._lag.holds
            or self._chat_echo
            or control.trace
            or self._top_k
        )
        self._template: Template | None = None
        self._ready: list[Output] = []
        self._last: Chunk | None = None
        self._head: Chunk = {}
        self._usage: Chunk | None = None
        self._tail: Chunk = {}

    # -- what the server sends -----------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Take the next event of the upstream's stream, but for `[DONE]`.

        Raises:
            UpstreamStatusError: the event is an error.
            UpstreamProtocolError: it is malformed, or has tokens but no logprobs.
        """
        template, watch = self._template, self._watch
        if template is None or watch is None or watch.cut is not None or self._held:
            self._feed(data)
            return
        plain = template.read(data)
        if plain is None:
            self._feed(data)
            return
        # A usage that is not the last would be wrong in the end.
        self._usage = None
        text, signals = plain
        push = watch.push
        for logprob, max_logprob in signals:
            push(logprob, max_logprob)
        self.tokens = watch.tokens
        if watch.cut is None or self.mode != "enforce":
            self._ready.append((template, text))
        else:
            chunk = self._decoded(data)
            chunk.pop("usage", None)
            choice = chunk["choices"][0]
            self._hold(chunk, choice, read_signals(choice, self._top_k))

    def _decoded(self, data: bytes) -> Chunk:
        try:
            return decode_chunk(data)
        except ValueError as error:
            raise UpstreamProtocolError(
                f"the upstream sent no JSON object: {data[:EXCERPT]!r}"
            ) from error

    def _feed(self, data: bytes) -> None:
        chunk = self._decoded(data)
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self._usage = usage
            self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
            if not self._asked.continuous_usage:
                del chunk["usage"]
        choices = chunk.get("choices")
        if not choices:
            self._take_rest(chunk, choices)
            return
        try:
            choice = choices[0]
            signals = read_signals(choice, self._top_k)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UpstreamProtocolError(f"the upstream sent a malformed chunk: {error}") from error
        was_cut = self._cut is not None
        if signals:
            self._watch_tokens(signals, completed=choice.get("finish_reason") in _COMPLETED)
        elif not self.tokens:
            self._check_monitorable(choice)
        if self.wants_ids:
            self._collect_ids(chunk, choice)
        if was_cut:
            return  # beyond the cut: counted, not kept
        if self._plain and (template := template_of(data, chat=self._chat)):
            template.write(chunk)
            self._template = template
        self._hold(chunk, choice, signals)

    def _hold(self, chunk: Chunk, choice: Chunk, signals: list[Signal]) -> None:
        texts = [signal.text for signal in signals]
        lag = self._lag.before(text_of(choice, chat=self._chat), texts)
        self._held.append(_Held(chunk, texts, self.tokens, lag))

    def _take_rest(self, chunk: Chunk, choices: object) -> None:
        if "error" in chunk:
            error = chunk["error"]
            code = error.get("code") if isinstance(error, dict) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else 502
            raise UpstreamStatusError(status, chunk)
        if choices is None:
            raise UpstreamProtocolError("the upstream sent a chunk without choices")
        self._tail = chunk

    def _watch_tokens(self, signals: list[Signal], *, completed: bool) -> None:
        watch = self._watch
        if watch is None:
            if self.prompt_tokens is None and self.gate.needs_estimator:
                self.give_up(
                    "the estimator needs the prompt's length and the upstream does not tell it "
                    "(stream_options.continuous_usage_stats): send token ids, or use another rule"
                )
            watch = self._watch = self._watch or self._watching(self.gate, self.prompt_tokens or 0)
            if self._trace is not None:
                self._tracer = Follower(self.gate, self.prompt_tokens or 0)
            self.first_token = time.monotonic()
            if self._began is not None:
                self._began()
        # Where the server tells the end in a chunk of its own nothing is exempt: whether it came
        # before or after a decision would be a matter of timing. vLLM tells it with the token.
        last = watch.tokens + len(signals) if completed else None
        for _, _, logprob, max_logprob, confidence in signals:
            verdict = watch.push(
                logprob, max_logprob, last=watch.tokens + 1 == last, confidence=confidence
            )
            if verdict is Verdict.ASK:
                self.asked += 1
                self.questions.append(watch.tokens)
                self._unanswered.add(watch.tokens)
            if self._trace is not None and self._tracer is not None:
                self._tracer.push(logprob, max_logprob, confidence=confidence)
                look = zip(_TRACED, self._tracer.look(), strict=True)
                self._trace.append(dict(look))
        self.tokens = watch.tokens

    def _check_monitorable(self, choice: Chunk) -> None:
        told = choice.get("token_ids") or text_of(choice, chat=self._chat)
        if told and self.gate.rule != "none" and not self._chat_echo:
            self.give_up(
                "the upstream sends no logprobs though asked, so nothing can be monitored: "
                'enable them there, or send "espo": {"mode": "off"}'
            )

    def give_up(self, reason: str) -> None:
        """Serve the rest unmonitored, or refuse to, as the policy has it.

        Raises UpstreamProtocolError.
        """
        if self._policy.refuse:
            raise UpstreamProtocolError(reason)
        if self.unmonitored is None:
            self.unmonitored = reason
            self.mode = "off"
            self.gate = NEVER
            self._watch = Watch(NEVER, 0)
            self._watch.tokens = self.tokens
            self.questions.clear()
            self._unanswered.clear()

    def _collect_ids(self, chunk: Chunk, choice: Chunk) -> None:
        # Completions tell the prompt's ids in the choice, chat at the top; both once.
        for place in (choice, chunk):
            ids = place.get("prompt_token_ids")
            if ids is not None:
                self.prompt_token_ids = ids
                if not self._asked.token_ids:
                    del place["prompt_token_ids"]
        self.token_ids += choice.get("token_ids") or ()

    def answer(self, token: int, said: float | None) -> None:
        """What a critic says of a token it was asked for; None when it could not be had."""
        assert self._watch is not None
        value = None if said is None else self.gate.success(said)
        self._unanswered.discard(token)
        self._answered = self._answered if value is None else value
        self._watch.settle(token, value)
        if self._trace is not None and value is not None:
            bound = RULES[self.gate.rule].bound(self.gate, value)
            self._trace[token - 1].update(value=value, threshold=bound)

    # -- what the client gets ------------------------------------------------------------------

    @property
    def _cut(self) -> int | None:
        """Tokens kept, once it is certain that the choice is cut."""
        watch = self._watch
        if watch is None or watch.cut is None or self.mode != "enforce":
            return None
        return watch.cut if watch.settled else None

    @property
    def decided(self) -> bool:
        """No answer of a critic that is still out could change the cut."""
        watch = self._watch
        return not self._unanswered or (
            watch is not None and watch.cut is not None and watch.settled
        )

    @property
    def ended(self) -> bool:
        """Nothing that the server could still send belongs to the answer."""
        return self._last is not None and self._cut is not None

    def drain(self) -> list[Output]:
        """What is certain by now, stripped of what the client did not ask for."""
        ready, self._ready = self._ready, []
        held = self._held
        if not held or self._unproven(held[-1].chunk):
            return ready
        waits = self._unanswered and self.mode == "enforce"
        limit = min(self._unanswered) if waits else None
        cut = self._cut
        while held and (cut is not None or limit is None or held[0].end < limit):
            item = held.popleft()
            chunk = item.chunk
            if not self._head:
                self._head = {name: chunk.get(name) for name in _HEAD}
            choice = chunk["choices"][0]
            if cut is not None and item.end >= cut:
                self._end_at(cut, item, choice)
            choice["index"] = self.index
            self._strip(choice)
            if choice.get("finish_reason") is None:
                ready.append(chunk)
            else:
                self._last = chunk
                held.clear()
        return ready

    def _unproven(self, last: Chunk) -> bool:
        """Nothing has shown yet that this server can be monitored.

        A chat begins with a chunk that names the role: it waits for the first token, so that a
        client still gets an error status when logprobs are missing there.
        """
        if self.tokens or self.gate.rule == "none" or self._chat_echo:
            return False
        return last["choices"][0].get("finish_reason") is None

    def _end_at(self, cut: int, item: _Held, choice: Chunk) -> None:
        """End the choice at token `cut`, which lies in this chunk."""
        kept = len(item.texts) - (item.end - cut)
        text = kept_text(text_of(choice, chat=self._chat), item.texts, kept, item.lag)
        set_text(choice, text, chat=self._chat)
        keep_tokens(choice, kept)
        choice["finish_reason"] = self._policy.finish_reason
        choice["stop_reason"] = "espo"
        if self._asked.continuous_usage and (usage := self.usage):
            item.chunk["usage"] = usage

    def _strip(self, choice: Chunk) -> None:
        if self._asked.logprobs is None:
            choice["logprobs"] = None
        else:
            strip_logprobs(choice, self._asked.logprobs)
        if self.wants_ids and not self._asked.token_ids:
            choice.pop("token_ids", None)

    def finish(self) -> Chunk:
        """The choice's last chunk, with the record. Call when the server is done, or when `ended`.

        Raises:
            UpstreamProtocolError: the server's stream ended before its choice did.
        """
        if self._last is None:
            raise UpstreamProtocolError("the upstream's stream ended before its choice did")
        if not (self._asked.stream and self._asked.usage):
            # vLLM has put it on the usage chunk, which we asked for and the client did not.
            self._last.update((k, v) for k, v in self._tail.items() if k not in _NOT_ON_LAST)
        self._last["choices"][0]["espo"] = self.record
        return self._last

    @property
    def usage(self) -> Chunk | None:
        """The choice's usage; of a cut one, the kept tokens. None when the server did not tell."""
        cut = self._cut
        if cut is None:
            return self._usage
        if self.prompt_tokens is None:
            return None
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + cut,
            "completion_tokens": cut,
        }

    def usage_chunk(self, usage: Chunk | None) -> Chunk:
        """The chunk after the last, for a client that asked for usage."""
        return {**self._head, **self._tail, "choices": [], "usage": usage}

    @property
    def end(self) -> End:
        """How it ended; "aborted" until it has, and when the client left or the server failed."""
        if self._cut is not None:
            return "early_stop"
        reason = self._last["choices"][0].get("finish_reason") if self._last else None
        if reason in _COMPLETED:
            return "completed"
        return "length" if reason == "length" else "aborted"

    @property
    def head(self) -> Chunk:
        """`id` and `model` as the server tells them; empty before the first token."""
        return self._head

    @property
    def value(self) -> float | None:
        """V as the rule saw it last; None where the rule has none, or no critic has answered."""
        if self._answered is not None or self._watch is None:
            return self._answered
        return self._watch.estimate

    @property
    def watch(self) -> Watch | None:
        """What watches it; None before the first token."""
        return self._watch

    @property
    def about(self) -> Chunk:
        """What a recorded trace says beside its numbers."""
        watch = self._watch
        return {
            "id": self._head.get("id"),
            "index": self.index,
            "model": self._head.get("model", self._model),
            "gate_version": self.gate.version,
            "rule": self.gate.rule,
            "mode": self.mode,
            "prompt_tokens": self.prompt_tokens,
            "end": self.end,
            "cut": watch.cut if watch is not None else None,
        }

    @property
    def record(self) -> Chunk:
        """What the monitor saw and did: `choice["espo"]`."""
        watch, gate = self._watch, self.gate
        cut = watch.cut if watch is not None else None
        stopped = self._cut is not None
        record: Chunk = {
            "rule": gate.rule,
            "mode": self.mode,
            "audited": self.audited,
            "stopped": stopped,
            "cut": cut,
            "tokens": self.tokens,
            "overshoot": self.tokens - cut if stopped and cut is not None else 0,
            "missing": watch.missing if watch is not None else 0,
            "z": watch.z if watch is not None and not self.unmonitored else None,
            "threshold": watch.threshold if watch is not None else None,
            "value": watch.value if watch is not None else None,
            "beta": gate.beta,
            "gate_version": gate.version,
            "weights_version": gate.weights_version,
        }
        if self.unmonitored is not None:
            record["reason"] = self.unmonitored
        if self._trace is not None:
            record["trace"] = self._trace[:cut] if stopped else self._trace
        return record
