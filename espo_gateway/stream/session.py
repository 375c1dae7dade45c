"""One monitored choice: what the server sends is watched, and cut at the decision token.

A `Session` does no I/O: give `receive` every event, send on what `drain` gives, and end with
`finish`. When `ended` turns true nothing more is needed from the server and its request can be
cancelled.

It owns what comes in: the events read, the watch, the questions to a critic, the usage. What may go
out is its `Outbox`'s, what is told of it the `Record`'s. It keeps no chunk longer than it must: one
that a critic's answer could still cut, and the last.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from espo_gateway.errors import EXCERPT, UpstreamProtocolError, UpstreamStatusError
from espo_gateway.stop.gate_json import Control, Mode
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import Answers
from espo_gateway.stop.watch import Earlier, Verdict, Watch
from espo_gateway.stream.chunks import (
    Chunk,
    SampledToken,
    decode_chunk,
    only_choice,
    sampled_tokens,
)
from espo_gateway.stream.cut import text_of
from espo_gateway.stream.followers import Followed, Follower
from espo_gateway.stream.outbox import Outbox
from espo_gateway.stream.record import End, Record, TokenTrace
from espo_gateway.stream.request import Asked, Single
from espo_gateway.stream.templates import Output, Template, template_of

#: What watches a stream that cannot be monitored.
_NEVER = Gate()
#: Servers' words for how a choice ended, when it was not by itself.
_ENDS: dict[object, End] = {
    **dict.fromkeys(("length", "max_tokens", "max_length", "model_length"), "length"),
    **dict.fromkeys(("abort", "aborted", "cancelled", "content_filter", "error"), "aborted"),
}


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
    """The monitor of one choice.

    began: called when its first token comes. followers: of this choice alone. earlier: turns that
        its monitor goes on from. ids: whether token ids are wanted though no source reads them.
        head: of the answer, which its choices share.
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
        followers: Sequence[Follower] = (),
        earlier: Earlier | None = None,
        ids: bool = False,
        head: Chunk | None = None,
    ) -> None:
        self.gate = control.applied(gate)
        self.mode: Mode = control.mode
        #: drawn to be generated to the end even if it would be stopped
        self.audited = control.audit is not None and random.random() < control.audit
        if self.audited:
            self.mode = "shadow"
        #: why nothing was monitored, though it was asked for
        self.unmonitored: str | None = None
        #: from which token on of which weights its tokens are
        self._weights = [(0, gate.weights_version)]
        self.index = single.index
        self.prompt = single.prompt
        #: when it began, when its first token came, and when it was over, by `time.monotonic`
        self.started = time.monotonic()
        self.first_token: float | None = None
        self.over: float | None = None
        #: tokens of the prompt, None until known
        self.prompt_tokens = single.prompt_tokens
        #: ids of prompt and sampled tokens, kept only for those who read them
        self.prompt_token_ids: list[int] = []
        self.token_ids: list[int] = []
        #: tokens that sources are to be asked about, not yet put to them; and those not answered
        self.questions: list[int] = []
        self._unanswered: set[int] = set()
        #: what an answer probe asks for, if the client wants one; and what it has said, by token
        self.probe = control.probe if self.gate.schedule.every else None
        self.probed: dict[int, Sequence[float]] = {}
        #: how many questions there were, and the last V that was answered
        self.asked = 0
        self._answered: float | None = None
        #: what watches it; None before the first token
        self.watch: Watch | None = None
        #: `watch.push`, or that of what the followers follow
        self._push: Callable[..., Verdict]
        self._earlier = earlier
        self._trace = TokenTrace(self.gate, earlier) if control.trace else None
        #: none follows a choice that is not monitored
        self.followers = (*followers, *([] if self._trace is None else [self._trace]))
        self._began = began
        self._policy = policy = policy or Policy()
        self._asked = asked
        self._chat = chat
        self._model = single.body.get("model")
        #: alternatives a token whose logprobs make up its confidence
        self._top_k = self.gate.top_logprobs if self.gate.top_logprobs > 1 else 0
        #: whether a source will be asked, which reads token ids; and whether anyone reads them
        self._asks = self.gate.needs_critic or self.probe is not None
        self.wants_ids = self._asks or ids
        self._history = control.history
        #: whether the server has said so of its stream
        self.done = False
        self._echo = bool(chat and single.body.get("echo"))
        self._outbox = Outbox(
            asked,
            single,
            chat=chat,
            finish_reason=policy.finish_reason,
            hide_ids=self.wants_ids and not asked.token_ids,
            head=head,
        )
        #: whatever a chunk tells beside its text is not for this client
        self._text_only = not (
            asked.logprobs is not None
            or asked.token_ids
            or asked.continuous_usage
            or self.wants_ids
            or self._outbox.lags
            or self._echo
            or self._top_k
        )
        self._template: Template | None = None
        self._usage: Chunk | None = None

    # -- what the server sends -----------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Take the next event of the upstream's stream, but for `[DONE]`.

        Raises:
            UpstreamStatusError: the event is an error.
            UpstreamProtocolError: it is malformed, or has tokens but no logprobs.
        """
        template, watch, outbox = self._template, self.watch, self._outbox
        if template is None or watch is None or watch.cut is not None or outbox.held:
            self._receive_any(data)
            return
        read = template.read(data)
        if read is None:
            self._receive_any(data)
            return
        # A usage that is not the last would be wrong in the end.
        self._usage = None
        text, logprobs = read
        push = self._push
        for logprob, max_logprob in logprobs:
            push(logprob, max_logprob)
        if watch.cut is None or self.mode != "enforce":
            outbox.ready.append((template, text))
        else:
            chunk = _decoded(data)
            chunk.pop("usage", None)
            choice, tokens = self._understood(chunk)
            outbox.hold(chunk, choice, tokens, self.tokens)

    def weights_are(self, version: str) -> None:
        """Take note that what the server samples from now on is of these weights."""
        if version != self._weights[-1][1]:
            if self._weights[-1][0] == self.tokens:  # none was of those before
                self._weights.pop()
            self._weights.append((self.tokens, version))

    def _receive_any(self, data: bytes) -> None:
        chunk = _decoded(data)
        # The first is OpenAI's way to say so, the second that of vLLM before 0.10 and of others.
        if (error := chunk.get("error")) or chunk.get("object") == "error":
            code = (error if isinstance(error, dict) else chunk).get("code")
            status = code if type(code) is int and 400 <= code < 600 else 502
            raise UpstreamStatusError(status, chunk)
        choices = chunk.get("choices")
        if not choices and chunk.keys().isdisjoint(("choices", "usage")):
            raise UpstreamProtocolError("the upstream sent a chunk without choices")
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self._usage = usage
            if type(length := usage.get("prompt_tokens")) is int:
                self.prompt_tokens = length
            if not self._asked.continuous_usage:
                del chunk["usage"]
        if not choices:
            self._outbox.tail.update(chunk)
            return
        self._take(data, chunk)

    def _take(self, data: bytes, chunk: Chunk) -> None:
        """A chunk with a choice; data: as it came."""
        choice, tokens = self._understood(chunk, self._top_k)
        was_cut = self._cut is not None
        if tokens:
            self._watch_tokens(
                tokens, completed=_end_of(choice.get("finish_reason")) in ("completed", "aborted")
            )
        elif not self.tokens:
            self._check_monitorable(choice)
        if self.wants_ids:
            self._collect_ids(chunk, choice)
        if was_cut:
            return  # beyond the cut: counted, not kept
        if choice.get("finish_reason"):
            # What a server may send after it goes out in order, behind a chunk that is held.
            self._template, self._text_only = None, False
        if self._text_only and (template := template_of(data, chat=self._chat)):
            template.write(chunk)
            self._template = template
        self._outbox.hold(chunk, choice, tokens, self.tokens)

    def _understood(self, chunk: Chunk, top_k: int = 0) -> tuple[Chunk, list[SampledToken]]:
        """A chunk's choice and tokens."""
        try:
            choice = only_choice(chunk["choices"])
        except ValueError as error:
            raise UpstreamProtocolError(f"the upstream sent a malformed chunk: {error}") from error
        try:
            return choice, sampled_tokens(choice, top_k)
        except ValueError as error:
            if self.gate.rule != "none":
                self.give_up(f"the upstream sends logprobs that cannot be read: {error}")
            return choice, []

    def _watch_tokens(self, tokens: list[SampledToken], *, completed: bool) -> None:
        watch = self.watch or self._begin()
        push = self._push
        # Where the server tells the end in a chunk of its own nothing is exempt: whether it came
        # before or after a decision would be a matter of timing. vLLM tells it with the token.
        last = watch.tokens + len(tokens) if completed else None
        for _, _, logprob, max_logprob, confidence in tokens:
            verdict = push(
                logprob, max_logprob, last=watch.tokens + 1 == last, confidence=confidence
            )
            if verdict is Verdict.ASK:
                self.asked += 1
                self.questions.append(watch.tokens)
                self._unanswered.add(watch.tokens)

    def _begin(self) -> Watch:
        """The first token is there."""
        if self.prompt_tokens is None and self.gate.needs_estimator:
            self.give_up(
                "the estimator needs the prompt's length and the upstream does not tell it "
                "(stream_options.continuous_usage_stats): send token ids, or use another rule"
            )
        prompt_tokens = self.prompt_tokens or 0
        watch = self._watch_by(self.gate, prompt_tokens)
        for follower in self.followers:
            follower.begin(prompt_tokens)
        self.first_token = time.monotonic()
        if self._began is not None:
            self._began()
        return watch

    def _watch_by(self, gate: Gate, prompt_tokens: int) -> Watch:
        watch = self.watch = Watch(
            gate,
            prompt_tokens,
            history=self._history,
            asks=self._asks,
            audited=self.mode == "shadow",
            earlier=self._earlier,
        )
        self._push = Followed(watch, self.followers).push if self.followers else watch.push
        return watch

    def _check_monitorable(self, choice: Chunk) -> None:
        content = choice.get("token_ids") or text_of(choice, chat=self._chat)
        if content and self.gate.rule != "none" and not self._echo:
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
            self.gate = _NEVER
            self.followers = ()
            self.wants_ids = self._asks = False
            self._earlier = None
            tokens = self.tokens
            self._watch_by(_NEVER, 0).tokens = tokens
            self.questions.clear()
            self._unanswered.clear()

    @property
    def goes_without_logprobs(self) -> bool:
        """Whether it may be had again without a monitor: nothing has come, and it is served so."""
        excused = self.gate.rule == "none" or not self._policy.refuse
        return excused and not self._outbox.begun

    def _collect_ids(self, chunk: Chunk, choice: Chunk) -> None:
        # Completions tell the prompt's ids in the choice, chat at the top; both once.
        for place in (choice, chunk):
            if type(ids := place.get("prompt_token_ids")) is list:
                self.prompt_token_ids = ids
        self.token_ids += choice.get("token_ids") or ()

    def answer(self, token: int, answers: Answers) -> None:
        """Take what sources have answered about a token; a missing one could not be had."""
        if token not in self._unanswered:
            return  # asked before it was given up
        assert self.watch is not None
        if "probe" in answers:
            self.probed[token] = answers["probe"]
        value = self.watch.valued(token, answers)
        self._unanswered.discard(token)
        self._answered = self._answered if value is None else value
        self.watch.settle(token, value)
        if self._trace is not None and value is not None:
            self._trace.settle(token, value)

    # -- what the client gets ------------------------------------------------------------------

    @property
    def _cut(self) -> int | None:
        """Tokens kept, once it is certain that the choice is cut."""
        watch = self.watch
        if watch is None or watch.cut is None or self.mode != "enforce":
            return None
        return watch.cut if watch.settled else None

    @property
    def decided(self) -> bool:
        """No answer of a critic that is still out could change the cut."""
        watch = self.watch
        cut = watch is not None and watch.cut is not None and watch.settled
        # What is spared is followed to its end, and all that is said of it recorded.
        return not self._unanswered or (cut and self.mode == "enforce")

    @property
    def complete(self) -> bool:
        """Whether the server has told the choice's end; what fails after it costs nothing."""
        return self._outbox.complete

    @property
    def ended(self) -> bool:
        """Nothing that the server could still send belongs to the answer."""
        return self._outbox.last is not None and self._cut is not None

    def drain(self) -> list[Output]:
        """What is certain by now, stripped of what the client did not ask for."""
        outbox = self._outbox
        if outbox.held and (self.watch is not None or self._excused):
            waits = self._unanswered and self.mode == "enforce"
            outbox.release(self._cut, min(self._unanswered) if waits else None)
        ready, outbox.ready = outbox.ready, []
        return ready

    @property
    def _excused(self) -> bool:
        """Whether chunks may go out before any token has shown that this server can be monitored.

        A chat begins with a chunk that names the role: it waits for the first token, so that a
        client still gets an error status when logprobs are missing there.
        """
        return self.gate.rule == "none" or self._echo or self.complete or self.done

    def finish(self) -> Chunk:
        """The choice's last chunk, with the record. Call when the server is done, or when `ended`.

        Raises:
            UpstreamProtocolError: the server's stream ended before its choice did.
        """
        return self._outbox.finish(self.record, self.usage, done=self.done)

    def usage_chunk(self, usage: Chunk | None) -> Chunk:
        """The chunk after the last, for a client that asked for usage."""
        return self._outbox.usage_chunk(usage)

    # -- what is told of it --------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Tokens the server has sent."""
        return 0 if self.watch is None else self.watch.tokens

    @property
    def usage(self) -> Chunk | None:
        """The choice's usage; of a cut one, the kept tokens. None when the server did not tell."""
        kept = self._cut
        if kept is None:
            if self._usage is not None or self.done:
                return self._usage
            kept = self.tokens  # the stream broke off before its usage came
        if self.prompt_tokens is None or not kept:
            return None
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + kept,
            "completion_tokens": kept,
        }

    @property
    def end(self) -> End:
        """How it ended."""
        if self._cut is not None:
            return "early_stop"
        return _end_of(self._outbox.finish_reason) or "aborted"

    @property
    def head(self) -> Chunk:
        """`id` and `model` as the client is told them; empty before the answer's first token."""
        return self._outbox.head

    @property
    def model(self) -> object:
        """As the server tells it; before, as the client has asked for it."""
        return self.head.get("model", self._model)

    @property
    def value(self) -> float | None:
        """V as the rule saw it last; None where the rule has none, or no critic has answered."""
        if self._answered is not None or self.watch is None:
            return self._answered
        return self.watch.estimate

    @property
    def record(self) -> Record:
        """What the monitor saw and did."""
        return Record.of(
            self.gate,
            self.watch,
            mode=self.mode,
            audited=self.audited,
            stopped=self._cut is not None,
            reason=self.unmonitored,
            probes=None if self.probe is None else self.probed,
            trace=None if self._trace is None else self._trace.tokens,
            weights=self._weights,
        )


def _end_of(reason: object) -> End | None:
    """What a finish reason says; None for none yet, for which some servers write ""."""
    word = reason.lower() if isinstance(reason, str) else str(reason)
    return _ENDS.get(word, "completed") if reason else None


def _decoded(data: bytes) -> Chunk:
    try:
        return decode_chunk(data)
    except ValueError as error:
        raise UpstreamProtocolError(
            "the upstream sent no JSON object", excerpt=repr(data[:EXCERPT])
        ) from error
