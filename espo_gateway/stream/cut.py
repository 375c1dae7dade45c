"""Cutting a chunk down: to its first tokens, or to what the client asked for. Pure.

A stop falls in the middle of a chunk when the server has merged several tokens into it. Ids and
logprobs are cut exactly. The text is, too, wherever the server's token strings add up to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from espo_gateway.stream.chunks import TEXT_FIELDS

Choice = dict[str, Any]

#: Where text is in a chat's delta, at any depth, and whose comes first when it has both.
_TEXTS = {*TEXT_FIELDS, "text", "thinking", "refusal"}
_FIRST = ("reasoning", "reasoning_content", "reasoning_details", "thinking")
#: What may be the same word as a chunk's text, and is none.
_NO_TEXTS = {"id", "object", "model", "index", "role", "type", "name", "logprobs"}


class HeldText:
    """Text the server holds back, as its end might become a stop string.

    Once the stream is cut that text belongs to the answer, as when a length limit ends it.
    """

    __slots__ = ("_lag", "_longest")

    def __init__(self, body: dict[str, Any]) -> None:
        stop = body.get("stop")
        # Anything else is the server's to refuse.
        stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
        held = not body.get("include_stop_str_in_output")
        self._longest = max((len(s) for s in stops if isinstance(s, str)), default=0) if held else 0
        self._lag = ""

    @property
    def holds(self) -> bool:
        """Whether this server may hold text back."""
        return self._longest > 0

    def before(self, text: str, tokens: list[str]) -> str | None:
        """Take a chunk's text and token strings; returns what was held back before it.

        None when this server holds nothing back.
        """
        if not self._longest:
            return None
        lag = self._lag
        whole = lag + "".join(tokens)
        rest = whole[len(text) :] if whole.startswith(text) else ""
        # More than a stop string is no lag: special tokens that the text leaves out.
        self._lag = rest if len(rest) < self._longest else ""
        return lag


def kept_text(text: str, tokens: list[str], kept: int, lag: str | None) -> str:
    """The text of a chunk's first `kept` tokens, with the `lag` held back before it.

    Where token strings do not add up to the text (a server may send placeholders for them) it
    cannot be cut and is returned whole.
    """
    if lag is not None and (lag + "".join(tokens)).startswith(text):
        return lag + "".join(tokens[:kept])
    position = end = 0
    for i, token in enumerate(tokens):
        found = text.find(token, position) if token else -1
        # Between strings only a space may go missing, lost when a tokenizer decodes one token.
        if found >= 0 and not text[position:found].strip():
            position = found + len(token)
        if i < kept:
            end = position
    return text[:end] if position == len(text) else text


def text_of(choice: Choice, *, chat: bool) -> str:
    """The text of a chunk's choice; what several fields tell alike is told once."""
    return "".join(_texts(choice, chat=chat))


def cut_text(
    chunk: Choice, choice: Choice, tokens: list[str], kept: int, lag: str | None, *, chat: bool
) -> None:
    """Cut a chunk's text to its first `kept` tokens (`kept_text`), wherever it stands in it."""
    texts = _texts(choice, chat=chat)
    left = kept_text("".join(texts), tokens, kept, lag)
    if texts:
        cuts = {}
        for text in texts[:-1]:
            cuts[text], left = left[: len(text)], left[len(text) :]
        cuts[texts[-1]] = left
        _replace(chunk, cuts)
        return
    names = TEXT_FIELDS if chat else ("text",)
    place = choice
    if chat:
        place = choice["delta"] = choice.get("delta") or {}
    name = next((name for name in names if isinstance(place.get(name), str)), names[0])
    # A delta of another kind (a tool call) has no text of its own to cut.
    if left or name in place:
        place[name] = left


def _texts(choice: Choice, *, chat: bool) -> list[str]:
    """A choice's different texts, in the order in which they are sampled."""
    if not chat:
        return [choice["text"]] if choice.get("text") else []
    delta = choice.get("delta") or {}
    names = sorted(delta, key=lambda name: name not in _FIRST)
    return list(dict.fromkeys(text for name in names for text in _found(delta[name], name)))


def _found(value: object, name: str) -> Iterator[str]:
    if isinstance(value, str):
        if value and name in _TEXTS:
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from _found(item, name)
    elif isinstance(value, dict) and name not in _NO_TEXTS:
        for inner, item in value.items():
            yield from _found(item, inner)


def _replace(place: Any, cuts: dict[str, str]) -> None:
    """Put other texts in the place of these, at any depth."""
    items = place.items() if isinstance(place, dict) else enumerate(place)
    for name, value in items:
        if name in _NO_TEXTS:
            continue
        if isinstance(value, str):
            place[name] = cuts.get(value, value)
        elif isinstance(value, dict | list):
            _replace(value, cuts)


def keep_tokens(choice: Choice, kept: int) -> None:
    """Cut what has an entry for each token to the first `kept` tokens, in place."""
    for name in ("token_ids", "sampling_mask"):
        if choice.get(name) is not None:
            del choice[name][kept:]
    for name in ("routed_experts", "weight_versions"):
        if name in choice:
            choice[name] = None  # of more tokens than are left
    logprobs = choice.get("logprobs")
    if logprobs is not None:
        for values in logprobs.values():
            if isinstance(values, list):
                del values[kept:]


def strip_logprobs(choice: Choice, alternatives: int) -> None:
    """Leave only the `alternatives` a token that the client asked for, in place.

    The monitor may need more alternatives than a client has asked for (-1: all). What cannot be
    read is left as it is.
    """
    logprobs = choice.get("logprobs")
    if logprobs is None or alternatives < 0:
        return
    try:
        if "token_logprobs" not in logprobs:
            for entry in logprobs.get("content") or ():
                del (entry.get("top_logprobs") or [])[alternatives:]
            return
        # The sampled token comes first, and its string may also be an alternative's.
        tops, tokens = logprobs.get("top_logprobs"), logprobs.get("tokens")
        sampled = logprobs["token_logprobs"]
        if tops and tokens and len(tokens) == len(sampled or ()) == len(tops):
            logprobs["top_logprobs"] = [
                _likeliest(token, logprob, top, alternatives) if top and type(token) is str else top
                for token, logprob, top in zip(tokens, sampled, tops, strict=True)
            ]
    except (AttributeError, TypeError):
        return  # `suppress` would cost more than all the rest


def _likeliest(token: str, logprob: Any, top: Choice, alternatives: int) -> Choice:
    """The sampled token, and as many others as it takes to show the likeliest `alternatives`."""
    if len(top) <= alternatives:
        return top
    others = [(name, value) for name, value in top.items() if name != token]
    shown = others[:alternatives]
    last = shown[-1][1] if shown else None
    if None not in (logprob, last) and logprob >= last:
        shown.pop()  # the sampled token is one of them
    return {token: logprob, **dict(shown)}
