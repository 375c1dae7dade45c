"""What OpenAI's and vLLM's chunks hold: the sampled tokens, their logprobs and where text is. Pure.

Under load a server merges several tokens into one chunk, and a token may have no text: only the
logprob entries count tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import msgspec

from espo_gateway.stop.tracks import token_confidence

Chunk = dict[str, Any]


class TextDelta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A chat's delta that has text, in one of these fields, and nothing else."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


#: Where a chat's delta may have its text.
TEXT_FIELDS = TextDelta.__struct_fields__


class SampledToken(NamedTuple):
    """One sampled token.

    token_id: None unless token ids were asked for. text: as the server writes the token beside its
    logprob; empty when it is part of a character. logprob, max_logprob: natural logarithms, None
    when missing; a placeholder like -9999 is kept, `Watch` knows it.
    confidence: of the position (`token_confidence`), None unless it was asked for and is known.
    """

    token_id: int | None
    text: str
    logprob: float | None
    max_logprob: float | None
    confidence: float | None = None


def decode_chunk(data: bytes) -> Chunk:
    """The JSON object of one event. Raises ValueError when it is none."""
    try:
        chunk = msgspec.json.decode(data)
    except msgspec.DecodeError:
        # Python servers write NaN and Infinity, which JSON does not have and msgspec refuses.
        chunk = json.loads(data)
    if type(chunk) is not dict:
        raise ValueError("not a JSON object")
    return chunk


def sampled_tokens(choice: Chunk, top_k: int = 0) -> list[SampledToken]:
    """The tokens of one chunk's choice, of either API. Raises ValueError on a malformed one.

    top_k: alternatives that make up a position's confidence; 0 for none.
    """
    logprobs = choice.get("logprobs")
    if logprobs is None:
        return []
    try:
        if "token_logprobs" in logprobs:
            return _of_completion(logprobs, choice.get("token_ids"), top_k)
        return _of_chat(logprobs.get("content") or [], choice.get("token_ids"), top_k)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"malformed logprobs: {error!r}") from error


def _of_completion(logprobs: Chunk, ids: list[int] | None, top_k: int) -> list[SampledToken]:
    sampled = logprobs["token_logprobs"] or ()
    count = len(sampled)
    texts = _sized(logprobs.get("tokens"), count, "")
    tops = _sized(logprobs.get("top_logprobs"), count, None)
    token_ids = _sized(ids, count, None)
    return [
        SampledToken(token_ids[i], texts[i], x, *_position(x, (top or {}).values(), top_k))
        for i, (x, top) in enumerate(zip(sampled, tops, strict=True))
    ]


def _of_chat(content: list[Chunk], ids: list[int] | None, top_k: int) -> list[SampledToken]:
    tokens = []
    for token_id, entry in zip(_sized(ids, len(content), None), content, strict=True):
        logprob = entry.get("logprob")
        tops = [top.get("logprob") for top in entry.get("top_logprobs") or ()]
        position = _position(logprob, tops, top_k)
        # Where tokens are told by their ids there is no string.
        text = "" if "token_id" in entry else entry["token"]
        tokens.append(SampledToken(token_id, text, logprob, *position))
    return tokens


def _sized(values: list[Any] | None, count: int, default: Any) -> list[Any]:
    # An optional list of another length cannot be told to tokens.
    return values if values is not None and len(values) == count else [default] * count


def _position(
    logprob: float | None, alternatives: Collection[float | None], top_k: int
) -> tuple[float | None, float | None]:
    """The largest logprob and the confidence at a position."""
    confidence = token_confidence([*alternatives], top_k) if top_k else None
    return largest_logprob(logprob, alternatives), confidence


def largest_logprob(logprob: float | None, alternatives: Iterable[float | None]) -> float | None:
    """The largest logprob at a position, None if it cannot be known.

    The sampled token alone is not enough (g would be 0 whatever was sampled), and an unreadable
    alternative may have been the largest.
    """
    if logprob is None:
        return None
    largest, known = logprob, False
    for alternative in alternatives:
        if alternative is None or alternative != alternative:
            return None
        known = True
        if alternative > largest:
            largest = alternative
    return largest if known else None
