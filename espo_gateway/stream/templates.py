"""Text chunks, which carry text, its logprobs and nothing else: read and written at little cost.

Nearly all chunks of a stream are of this kind. Only what the monitor needs of them is decoded, and
the client's are made from the bytes of an earlier one with another text. Whatever is not by the
strict types below takes the general way through `chunks` and `outbox`, with the same result (but
that a field which is null may be left out, or the other way round). Pure.
"""

from __future__ import annotations

import secrets

import msgspec

from espo_gateway.stream.chunks import HALF, Chunk, TextDelta, largest_logprob

_encode = msgspec.json.Encoder().encode
#: Stands for the text while a chunk is made into a template; in no server's answer.
_MARK = secrets.token_hex(16)


class _Strict(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """Any field that is not listed makes it another kind of chunk."""


class _Top(msgspec.Struct, gc=False):
    logprob: float


class _Entry(msgspec.Struct, gc=False):
    logprob: float
    top_logprobs: list[_Top]


class _ChatLogprobs(msgspec.Struct, gc=False):
    content: list[_Entry]


class _ChatChoice(_Strict):
    index: int
    delta: TextDelta
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


class _ChatChunk(_Strict):
    choices: tuple[_ChatChoice]
    usage: msgspec.Raw = msgspec.Raw()


class _CompletionChunk(_Strict):
    choices: tuple[_Choice]
    usage: msgspec.Raw = msgspec.Raw()


_decode_chat = msgspec.json.Decoder(_ChatChunk).decode
_decode_completion = msgspec.json.Decoder(_CompletionChunk).decode
#: What msgspec raises.
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
#: What follows the head of a chunk: its id, its model and what else never changes.
_CHOICES = b'"choices":'

#: (logprob, largest logprob) of each token of a chunk; the second is never None where there are any
Logprobs = list[tuple[float, float | None]]


class Template:
    """Reads the text chunks of one stream, and writes the client's.

    Made from a chunk that the general way has read: `template_of`.

    field: the name of the text.
    """

    __slots__ = ("_after", "_before", "_chunk", "_head", "_read", "_size", "field")

    def __init__(self, head: bytes, field: str) -> None:
        self.field = field
        self._head = head
        self._size = len(head)
        self._read = _completion if field == "text" else _chat
        self._chunk: Chunk = {}
        self._before = self._after = b""

    def read(self, data: bytes) -> tuple[str, Logprobs] | None:
        """An event's text and tokens; None when it differs in anything else from the template."""
        if not data.startswith(self._head):
            return None
        try:
            field, text, logprobs = self._read(b"{" + data[self._size :])
        except _UNREADABLE:
            return None
        return (text, logprobs) if field == self.field and logprobs else None

    def write(self, chunk: Chunk) -> None:
        """Take the chunk as the client gets it."""
        self._chunk = chunk

    def event(self, text: str) -> bytes:
        """The client's chunk with this text, as an event."""
        if not self._before:
            choice = self._chunk["choices"][0]
            place = choice if self.field == "text" else choice["delta"]
            place[self.field] = _MARK
            before, after = _encode(self._chunk).split(_encode(_MARK))
            self._before, self._after = b"data: " + before, after + b"\n\n"
        return self._before + _encode(text) + self._after


def template_of(data: bytes, *, chat: bool) -> Template | None:
    """A template like this event, if it is a text chunk itself."""
    size = data.find(_CHOICES)
    if size < 1:
        return None
    try:
        field, _, logprobs = (_chat if chat else _completion)(b"{" + data[size:])
    except _UNREADABLE:
        return None
    return Template(data[:size], field) if field and logprobs else None


def _chat(data: bytes) -> tuple[str, str, Logprobs]:
    """The name of the text ("" for none or several), it, and the tokens."""
    choice = _decode_chat(data).choices[0]
    delta = choice.delta
    text, field = delta.content, "content"
    if text is None:
        text, field = delta.reasoning, "reasoning"
        if text is None:
            text, field = delta.reasoning_content, "reasoning_content"
        elif delta.reasoning_content is not None:
            field = ""
    elif delta.reasoning is not None or delta.reasoning_content is not None:
        field = ""
    logprobs: Logprobs = []
    for entry in choice.logprobs.content:
        largest = logprob = entry.logprob
        tops = entry.top_logprobs
        if not tops:
            return "", "", []
        # `largest_logprob` written out: as a call it would be a tenth of a token's whole cost.
        for top in tops:
            if top.logprob > largest:
                largest = top.logprob
        known = largest != logprob or logprob >= HALF
        told = largest if known else largest_logprob(logprob, [top.logprob for top in tops])
        logprobs.append((logprob, told))
    return field if text is not None else "", text or "", logprobs


def _completion(data: bytes) -> tuple[str, str, Logprobs]:
    choice = _decode_completion(data).choices[0]
    logprobs = choice.logprobs
    sampled, tops = logprobs.token_logprobs, logprobs.top_logprobs
    if len(tops) != len(sampled) or not all(tops):
        return "", "", []
    pairs = zip(sampled, tops, strict=True)
    return "text", choice.text, [(x, largest_logprob(x, top.values())) for x, top in pairs]


#: What a client gets: a chunk, or a template and its text.
Output = Chunk | tuple[Template, str]
