"""Cutting a chunk down: to its first tokens, or to what the client asked for. Pure.

A stop falls in the middle of a chunk when the server has merged several tokens into it. Ids and
logprobs are cut exactly. The text is, too, wherever the server's token strings add up to it.
"""

from __future__ import annotations

from typing import Any

from espo_gateway.stream.chunks import TEXT_FIELDS

Choice = dict[str, Any]


class HeldText:
    """Text the server holds back, as its end might become a stop string.

    Once the stream is cut that text belongs to the answer, as when a length limit ends it.
    """

    __slots__ = ("_lag", "_longest")

    def __init__(self, body: dict[str, Any]) -> None:
        stop = body.get("stop") or []
        stops = [stop] if isinstance(stop, str) else stop
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
    """The text of a chunk's choice."""
    if not chat:
        return choice.get("text") or ""
    delta = choice.get("delta") or {}
    return next((delta[name] for name in TEXT_FIELDS if delta.get(name)), "")


def set_text(choice: Choice, text: str, *, chat: bool) -> None:
    """Put another text in its place."""
    if not chat:
        if text or "text" in choice:
            choice["text"] = text
        return
    delta = choice.setdefault("delta", {})
    name = next((name for name in TEXT_FIELDS if delta.get(name)), "content")
    # A delta of another kind (a tool call) has no text of its own to cut.
    if text or name in delta:
        delta[name] = text


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

    The monitor may need more alternatives than a client has asked for (-1: all).
    """
    logprobs = choice.get("logprobs")
    if logprobs is None or alternatives < 0:
        return
    if "content" in logprobs:
        for entry in logprobs["content"] or ():
            del (entry.get("top_logprobs") or [])[alternatives:]
    elif logprobs.get("top_logprobs"):
        # The sampled token comes first, and its string may also be an alternative's.
        logprobs["top_logprobs"] = [
            _likeliest(token, logprob, top, alternatives) if top is not None else None
            for token, logprob, top in zip(
                logprobs["tokens"],
                logprobs["token_logprobs"],
                logprobs["top_logprobs"],
                strict=False,
            )
        ]


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
