"""Plain chunks, which carry tokens and nothing else: read, and written again, at little cost.

Nearly all chunks of a stream are plain. Only what the monitor needs of them is decoded, and the
client's are made from the bytes of an earlier one with another text. Whatever is not plain by the
strict types below takes the general way through `signals` and `session`, with the same result (but
that a field which is null may be left out, or the other way round). Pure.
"""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

Chunk = dict[str, Any]

_encode = msgspec.json.Encoder().encode
#: Stands for the text while a chunk is made into a template; in no server's answer.
_MARK = secrets.token_hex(16)


class _Strict(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """Any field that is not listed makes a chunk not plain."""


class _Top(msgspec.Struct, gc=False):
    logprob: float


class _Entry(msgspec.Struct, gc=False):
    logprob: float
    top_logprobs: list[_Top]


class _ChatLogprobs(msgspec.Struct, gc=False):
    content: list[_Entry]


class _Delta(_Strict):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _ChatChoice(_Strict):
    index: int
    delta: _Delta
    logprobs: _ChatLogprobs
    finish_reason: None = None
    stop_reason: None = None
    token_ids: None = None


class _Logprobs(msgspec.Struct, gc=False):
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class _Choice(_Strict):
    index: int
    text: str
    logprobs: _Logprobs
    finish_reason: None = None
    stop_reason: None = None
    token_ids: None = None
    prompt_token_ids: None = None


class _Head(_Strict):
    id: str
    object: str
    created: int
    model: str


class _ChatChunk(_Head):
    choices: tuple[_ChatChoice]
    usage: msgspec.Raw = msgspec.Raw()
    system_fingerprint: None = None


class _CompletionChunk(_Head):
    choices: tuple[_Choice]
    usage: msgspec.Raw = msgspec.Raw()
    system_fingerprint: None = None


class Template:
    """A plain chunk of the client's, in which only the text changes.

    chunk: it, as the client gets it. field: where its text is.
    """

    __slots__ = ("_after", "_before", "_same", "chunk", "field")

    def __init__(self, plain: Plain, chunk: Chunk) -> None:
        self.chunk = chunk
        self.field = plain.field
        self._same = plain.head
        self._before = self._after = b""

    def fits(self, plain: Plain) -> bool:
        """Whether the chunk differs in nothing but its text."""
        return plain.field == self.field and plain.head == self._same

    def event(self, text: str) -> bytes:
        """The chunk with this text, as an event of the client's stream."""
        if not self._before:
            choice = self.chunk["choices"][0]
            place = choice if self.field == "text" else choice["delta"]
            place[self.field] = _MARK
            before, after = _encode(self.chunk).split(_encode(_MARK))
            self._before, self._after = b"data: " + before, after + b"\n\n"
        return self._before + _encode(text) + self._after


class Plain:
    """What a plain chunk says.

    head: id, created and model. field: the name of its text. signals: (logprob, largest logprob)
    of each token.
    """

    __slots__ = ("field", "head", "signals", "text")

    def __init__(
        self, chunk: _Head, field: str, text: str, signals: list[tuple[float, float]]
    ) -> None:
        self.head = (chunk.id, chunk.created, chunk.model)
        self.field = field
        self.text = text
        self.signals = signals


_decode_chat = msgspec.json.Decoder(_ChatChunk).decode
_decode_completion = msgspec.json.Decoder(_CompletionChunk).decode


def read_plain(data: bytes, *, chat: bool) -> Plain | None:
    """The chunk of one event; None when it is not plain, or no JSON at all."""
    try:
        return _plain_chat(data) if chat else _plain_completion(data)
    except msgspec.MsgspecError:
        return None


def _plain_chat(data: bytes) -> Plain | None:
    chunk = _decode_chat(data)
    choice = chunk.choices[0]
    delta = choice.delta
    if (text := delta.content) is not None:
        field = "content"
        if delta.reasoning is not None or delta.reasoning_content is not None:
            return None
    elif (text := delta.reasoning) is not None and delta.reasoning_content is None:
        field = "reasoning"
    else:
        return None
    signals = []
    for entry in choice.logprobs.content:
        largest = logprob = entry.logprob
        if not entry.top_logprobs:
            return None
        for top in entry.top_logprobs:
            if top.logprob > largest:
                largest = top.logprob
        signals.append((logprob, largest))
    return Plain(chunk, field, text, signals) if signals else None


def _plain_completion(data: bytes) -> Plain | None:
    chunk = _decode_completion(data)
    choice = chunk.choices[0]
    logprobs = choice.logprobs
    if len(logprobs.top_logprobs) != len(logprobs.token_logprobs) or not all(logprobs.top_logprobs):
        return None
    pairs = zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    signals = [(logprob, max(logprob, *tops.values())) for logprob, tops in pairs]
    return Plain(chunk, "text", choice.text, signals) if signals else None
