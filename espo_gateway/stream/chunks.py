"""What OpenAI's and vLLM's chunks hold: the sampled tokens, their logprobs and where text is. Pure.

Under load a server merges several tokens into one chunk, and a token may have no text: only the
logprob entries count tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import msgspec

from espo_gateway.stop.regret import MISSING_LOGPROB
from espo_gateway.stop.tracks import token_confidence

Chunk = dict[str, Any]


class TextDelta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A chat's delta that has text, in one of these fields, and nothing else."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


#: No token is likelier than one with more than half of all.
HALF = math.log(0.5)

#: Where a chat's delta may have its text.
TEXT_FIELDS = TextDelta.__struct_fields__
#: Of what a choice may have, and where null is the same as nothing.
_TYPES = (("delta", dict), ("text", str), ("token_ids", list))


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
    """The JSON object of one event. Raises ValueError when it is none.

    Half a surrogate pair, which no UTF-8 can say, is U+FFFD.
    """
    try:
        try:
            chunk = msgspec.json.decode(data)
        except msgspec.DecodeError:
            # Python servers write NaN and Infinity, which JSON does not have and msgspec refuses.
            chunk = json.loads(data)
            if b"\\u" in data:
                text = json.dumps(chunk, ensure_ascii=False).encode("utf-16", "surrogatepass")
                chunk = json.loads(text.decode("utf-16", "replace"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if type(chunk) is not dict:
        raise ValueError("not a JSON object")
    return chunk


def only_choice(choices: Any) -> Chunk:
    """A chunk's one choice, of the types that the rest relies on. Raises ValueError."""
    if type(choices) is not list or len(choices) != 1 or type(choices[0]) is not dict:
        raise ValueError("not one choice")
    choice: Chunk = choices[0]
    for name, kind in _TYPES:
        value = choice.get(name)
        if value is not None and type(value) is not kind:
            raise ValueError(f"{name} is {type(value).__name__}")
    return choice


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
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"malformed logprobs: {error!r}") from error


def _of_completion(logprobs: Chunk, ids: list[int] | None, top_k: int) -> list[SampledToken]:
    sampled = logprobs["token_logprobs"] or ()
    count = len(sampled)
    texts = _sized(logprobs.get("tokens"), count, "")
    tops = _sized(logprobs.get("top_logprobs"), count, None)
    token_ids = _sized(ids, count, None)
    return [
        SampledToken(
            token_id,
            text if type(text) is str else "",
            *_position(x, () if top is None else top.values(), top_k),
        )
        for token_id, text, x, top in zip(token_ids, texts, sampled, tops, strict=True)
    ]


def _of_chat(content: list[Chunk], ids: list[int] | None, top_k: int) -> list[SampledToken]:
    tokens = []
    for token_id, entry in zip(_sized(ids, len(content), None), content, strict=True):
        tops = [top.get("logprob") for top in entry.get("top_logprobs") or ()]
        logprob = entry.get("logprob")
        if logprob is None and "token" not in entry:
            raise KeyError("logprob")
        text = entry.get("token")  # only a cut needs it, and can do without
        position = _position(logprob, tops, top_k)
        tokens.append(SampledToken(token_id, text if type(text) is str else "", *position))
    return tokens


def _sized(values: list[Any] | None, count: int, default: Any) -> list[Any]:
    # An optional list of another length cannot be told to tokens.
    return values if values is not None and len(values) == count else [default] * count


def _position(
    logprob: object, alternatives: Collection[object], top_k: int
) -> tuple[float | None, float | None, float | None]:
    """The logprob, the largest and the confidence at a position."""
    sampled = logprob if type(logprob) is float else _number(logprob)
    others = [x if type(x) is float else _number(x) for x in alternatives]
    confidence = token_confidence(others, top_k) if top_k else None
    return sampled, largest_logprob(sampled, others), confidence


def _number(value: object) -> float | None:
    if value is None or type(value) is int:
        return None if value is None else float(value)  # a whole number may be too large for it
    raise TypeError(f"{type(value).__name__} is no logprob")


def largest_logprob(logprob: float | None, alternatives: Iterable[float | None]) -> float | None:
    """The largest logprob at a position, None if it cannot be known.

    The sampled token alone is not enough (g would be 0 whatever was sampled), and an unreadable
    alternative may have been the largest. So may a placeholder beside no other token: so vLLM's V1
    worker answers whoever shares a step with a request that lists `logprob_token_ids`.
    """
    if logprob is None:
        return None
    largest, known, another, withheld = logprob, False, False, False
    for alternative in alternatives:
        if alternative is None or alternative != alternative:
            return None
        known = True
        if alternative > largest:
            largest = alternative
        elif alternative <= MISSING_LOGPROB:
            withheld = True
        elif alternative != logprob:
            another = True
    if withheld and not another and largest == logprob < HALF:
        return None
    return largest if known else None
