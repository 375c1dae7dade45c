"""OpenAI and vLLM chunks to per-token signals: token, its logprob, the largest one there. Pure.

Under load a server merges several tokens into one chunk, and a token may have no text: only the
logprob entries count tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import msgspec

from espo_gateway.stop.tracks import token_confidence


class Signal(NamedTuple):
    """One sampled token.

    token_id: None unless token ids were asked for. text: as the server writes the token beside its
    logprob; empty when it is part of a character. logprob, max_logprob: natural logarithms, None
    when missing; a placeholder like -9999 is kept, `surrogate_regret` knows it.
    confidence: of the position (`token_confidence`), None unless it was asked for and is known.
    """

    token_id: int | None
    text: str
    logprob: float | None
    max_logprob: float | None
    confidence: float | None = None


def decode_chunk(data: bytes) -> dict[str, Any]:
    """The JSON object of one event. Raises ValueError when it is none."""
    try:
        chunk = msgspec.json.decode(data)
    except msgspec.DecodeError:
        # Python servers write NaN and Infinity, which JSON does not have and msgspec refuses.
        chunk = json.loads(data)
    if type(chunk) is not dict:
        raise ValueError("not a JSON object")
    return chunk


def read_signals(choice: dict[str, Any], top_k: int = 0) -> list[Signal]:
    """The tokens of one chunk's choice, of either API. Raises ValueError on a malformed one.

    top_k: alternatives that make up a position's confidence; 0 for none.
    """
    logprobs = choice.get("logprobs")
    if logprobs is None:
        return []
    try:
        if "token_logprobs" in logprobs:
            return _completion_signals(logprobs, choice.get("token_ids"), top_k)
        return _chat_signals(logprobs.get("content") or [], choice.get("token_ids"), top_k)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"malformed logprobs: {error!r}") from error


def _completion_signals(
    logprobs: dict[str, Any], ids: list[int] | None, top_k: int
) -> list[Signal]:
    sampled = logprobs["token_logprobs"] or ()
    count = len(sampled)
    texts = _sized(logprobs.get("tokens"), count, "")
    tops = _sized(logprobs.get("top_logprobs"), count, None)
    token_ids = _sized(ids, count, None)
    return [
        Signal(token_ids[i], texts[i], x, *_position(x, (top or {}).values(), top_k))
        for i, (x, top) in enumerate(zip(sampled, tops, strict=True))
    ]


def _chat_signals(content: list[dict[str, Any]], ids: list[int] | None, top_k: int) -> list[Signal]:
    signals = []
    for token_id, entry in zip(_sized(ids, len(content), None), content, strict=True):
        logprob = entry.get("logprob")
        tops = [top.get("logprob") for top in entry.get("top_logprobs") or ()]
        signals.append(Signal(token_id, entry["token"], logprob, *_position(logprob, tops, top_k)))
    return signals


def _sized(values: list[Any] | None, count: int, default: Any) -> list[Any]:
    # An optional list of another length cannot be told to tokens.
    return values if values is not None and len(values) == count else [default] * count


def _position(
    logprob: float | None, alternatives: Collection[float | None], top_k: int
) -> tuple[float | None, float | None]:
    """The largest logprob and the confidence at a position."""
    confidence = token_confidence([*alternatives], top_k) if top_k else None
    return _largest(logprob, alternatives), confidence


def _largest(logprob: float | None, alternatives: Iterable[float | None]) -> float | None:
    """The largest logprob, None if it cannot be known.

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


Chunk = dict[str, Any]
