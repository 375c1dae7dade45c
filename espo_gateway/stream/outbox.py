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
    keep_tokens,
    kept_text,
    set_text,
    strip_logprobs,
    text_of,
)
from espo_gateway.stream.record import Record
from espo_gateway.stream.request import Asked, Single
from espo_gateway.stream.templates import Output

_HEAD = ("id", "object", "created", "model", "request_id", "output_mode")
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
    head: `id`, `object`, `created` and `model` of the first chunk; empty before it.
    tail: the chunk without choices that the server ends its stream with.

    Args:
        finish_reason: of a choice that is cut.
        hide_ids: the token ids have been asked for by the gateway, not by the client.
    """

    __slots__ = (
        "_asked",
        "_chat",
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
        self, asked: Asked, single: Single, *, chat: bool, finish_reason: str, hide_ids: bool
    ) -> None:
        self.held: deque[_Held] = deque()
        self.ready: list[Output] = []
        self.last: Chunk | None = None
        self.head: Chunk = {}
        self.tail: Chunk = {}
        self._asked = asked
        self._chat = chat
        self._finish_reason = finish_reason
        self._hide_ids = hide_ids
        self._index = single.index
        self._lag = HeldText(single.body)

    @property
    def lags(self) -> bool:
        """Whether a chunk's text may be of earlier tokens, held back for a stop string."""
        return self._lag.holds

    @property
    def complete(self) -> bool:
        """Whether the last chunk held is the choice's last."""
        return bool(self.held) and _finish_reason(self.held[-1].chunk) is not None

    def hold(self, chunk: Chunk, choice: Chunk, tokens: list[SampledToken], end: int) -> None:
        """Take a chunk. end: tokens of the choice up to and with it."""
        texts = [token.text for token in tokens]
        lag = self._lag.before(text_of(choice, chat=self._chat), texts)
        self.held.append(_Held(chunk, texts, end, lag))

    def release(self, cut: int | None, limit: int | None) -> None:
        """Make ready what is certain, stripped of what the client did not ask for.

        cut: tokens kept, once that is certain. limit: the first token the cut may still fall on;
        None for none.
        """
        held = self.held
        while held and (cut is not None or limit is None or held[0].end < limit):
            item = held.popleft()
            chunk = item.chunk
            if not self.head:
                self.head = {name: chunk[name] for name in _HEAD if name in chunk}
            choice = chunk["choices"][0]
            if cut is not None and item.end >= cut:
                self._end_at(cut, item, choice)
            choice["index"] = self._index
            self._strip(chunk, choice)
            if choice.get("finish_reason") is None:
                self.ready.append(chunk)
            else:
                self.last = chunk
                held.clear()

    def finish(self, record: Record, usage: Chunk | None) -> Chunk:
        """The choice's last chunk, with its record. usage: the choice's.

        Raises:
            UpstreamProtocolError: there is none.
        """
        last = self.last
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
        return {**self.head, **self.tail, "choices": [], "usage": usage}

    def _end_at(self, cut: int, item: _Held, choice: Chunk) -> None:
        """End the choice at token `cut`, which lies in this chunk."""
        kept = len(item.texts) - (item.end - cut)
        text = kept_text(text_of(choice, chat=self._chat), item.texts, kept, item.lag)
        set_text(choice, text, chat=self._chat)
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
