"""What may go out to the client of one choice, in order: held until it is certain, then cut.

It is told where the cut is, and up to which token chunks are certain; it decides neither.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from espo_gateway.errors import UpstreamProtocolError
from espo_gateway.stream.chunks import Chunk, SampledToken
from espo_gateway.stream.cut import (
    HeldText,
    cut_text,
    keep_tokens,
    strip_logprobs,
    text_of,
)
from espo_gateway.stream.record import Record
from espo_gateway.stream.request import Asked, Single
from espo_gateway.stream.templates import Output

_HEAD = ("id", "object", "created", "model", "request_id", "output_mode")
#: What chunks of one answer have in common, whichever choice they are of.
_SHARED = ("id", "created", "request_id")
_NOT_ON_LAST = (*_HEAD, "choices", "usage")


class _Held(NamedTuple):
    """A chunk not yet sent on; `end`: tokens of the choice up to and with it."""

    chunk: Chunk
    texts: list[str]
    end: int
    lag: str | None


class Outbox:
    """The client's chunks of one choice.

    held: chunks that may still be cut. ready: what may go out now; a template's output may be
        appended while nothing is held.
    last: the choice's last chunk, once it is certain. It waits for `finish`.
    head: `id`, `object`, `created` and `model` of the first chunk of any choice; empty before it.
    tail: what the chunks without choices say, with one of which a server ends its stream.

    Args:
        finish_reason: of a choice that is cut.
        hide_ids: the token ids have been asked for by the gateway, not by the client.
        head: of the answer, which its choices share; None for one alone.
    """

    __slots__ = (
        "_asked",
        "_begun",
        "_chat",
        "_complete",
        "_finish_reason",
        "_hide_ids",
        "_index",
        "_lag",
        "head",
        "held",
        "last",
        "ready",
        "tail",
    )

    def __init__(
        self,
        asked: Asked,
        single: Single,
        *,
        chat: bool,
        finish_reason: str,
        hide_ids: bool,
        head: Chunk | None = None,
    ) -> None:
        self.held: deque[_Held] = deque()
        self.ready: list[Output] = []
        self.last: Chunk | None = None
        self.head: Chunk = {} if head is None else head
        self.tail: Chunk = {}
        self._asked = asked
        self._chat = chat
        self._finish_reason = finish_reason
        self._hide_ids = hide_ids
        self._index = single.index
        self._lag = HeldText(single.body)
        self._begun = self._complete = False

    @property
    def lags(self) -> bool:
        """Whether a chunk's text may be of earlier tokens, held back for a stop string."""
        return self._lag.holds

    @property
    def begun(self) -> bool:
        """Whether the server has told anything of the choice."""
        return self._begun or bool(self.held)

    @property
    def complete(self) -> bool:
        """Whether the server has told the choice's end."""
        return self._complete

    def hold(self, chunk: Chunk, choice: Chunk, tokens: list[SampledToken], end: int) -> None:
        """Take a chunk. end: tokens of the choice up to and with it."""
        texts = [token.text for token in tokens]
        lag = self._lag.before(text_of(choice, chat=self._chat), texts) if self.lags else None
        self._complete = self._complete or bool(choice.get("finish_reason"))
        self.held.append(_Held(chunk, texts, end, lag))

    def share(self, chunk: Chunk) -> None:
        """Let a chunk tell what the first of all choices has told."""
        if not self.head:
            self.head.update((name, chunk[name]) for name in _HEAD if name in chunk)
        chunk.update((name, self.head[name]) for name in _SHARED if self.head.get(name))

    def release(self, cut: int | None, limit: int | None) -> None:
        """Make ready what is certain, stripped of what the client did not ask for.

        cut: tokens kept, once that is certain. limit: the first token the cut may still fall on;
        None for none.
        """
        held = self.held
        while held and (cut is not None or limit is None or held[0].end < limit):
            item = held.popleft()
            chunk = item.chunk
            self._begun = True
            self.share(chunk)
            choice = chunk["choices"][0]
            if cut is not None and item.end >= cut:
                self._end_at(cut, item, choice)
                held.clear()
            choice["index"] = self._index
            self._strip(chunk, choice)
            if self.last is not None:
                self._go_on(choice)
            # Some servers say "" until they know it.
            if choice.get("finish_reason"):
                self.last = chunk
            else:
                self.ready.append(chunk)

    def finish(self, record: Record, usage: Chunk | None, *, done: bool = False) -> Chunk:
        """The choice's last chunk, with its record. usage: the choice's.

        done: the server has said that it is, so a finish reason may be missing.

        Raises:
            UpstreamProtocolError: there is none.
        """
        last = self.last
        if last is None and done and self._begun:
            place: Chunk = {"delta": {}} if self._chat else {"text": ""}
            choice = {"index": self._index, **place, "logprobs": None, "finish_reason": None}
            last = {**self.head, "choices": [choice]}
        if last is None:
            raise UpstreamProtocolError("the upstream's stream ended before its choice did")
        if record.stopped and self._asked.continuous_usage and usage is not None:
            last["usage"] = usage
        if not (self._asked.stream and self._asked.usage):
            # vLLM has put it on the usage chunk, which we asked for and the client did not.
            last.update((k, v) for k, v in self.tail.items() if k not in _NOT_ON_LAST)
        last["choices"][0]["espo"] = record.json()
        return last

    @property
    def finish_reason(self) -> str | None:
        """The last chunk's; None until it is certain."""
        return None if self.last is None else _finish_reason(self.last)

    def usage_chunk(self, usage: Chunk | None) -> Chunk:
        """The chunk after the last, for a client that asked for usage."""
        return {**self.tail, **self.head, "choices": [], "usage": usage}

    def _go_on(self, choice: Chunk) -> None:
        """A chunk follows the one with the finish reason: the reason goes to it."""
        assert self.last is not None
        before = self.last["choices"][0]
        for name in ("finish_reason", "stop_reason"):
            if before.get(name):
                choice[name] = choice.get(name) or before[name]
                before[name] = None
        self.ready.append(self.last)
        self.last = None

    def _end_at(self, cut: int, item: _Held, choice: Chunk) -> None:
        """End the choice at token `cut`, which lies in this chunk."""
        kept = len(item.texts) - (item.end - cut)
        cut_text(item.chunk, choice, item.texts, kept, item.lag, chat=self._chat)
        keep_tokens(choice, kept)
        choice["finish_reason"] = self._finish_reason
        choice["stop_reason"] = "espo"

    def _strip(self, chunk: Chunk, choice: Chunk) -> None:
        if self._asked.logprobs is None:
            choice["logprobs"] = None
        else:
            strip_logprobs(choice, self._asked.logprobs)
        if self._hide_ids:
            choice.pop("token_ids", None)
            for place in (choice, chunk):
                if place.get("prompt_token_ids") is not None:
                    del place["prompt_token_ids"]


def _finish_reason(chunk: Chunk) -> str | None:
    reason: str | None = chunk["choices"][0].get("finish_reason")
    return reason
