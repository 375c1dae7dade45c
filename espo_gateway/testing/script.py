"""What a `FakeServer` answers: tokens, how they are cut into chunks, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Body = dict[str, Any]

Fault = Literal["reset", "no-body", "stall", "garbage", "error", "eof", "half", "flood"]


class Token(NamedTuple):
    """A token to stream. max_logprob: None for the sampled one's; logprob: None sends null.
    others: logprobs of further alternatives.

    Either may be NaN or infinite: it is sent as Python servers write it, which is not JSON.
    """

    text: str
    logprob: float | None = -0.1
    max_logprob: float | None = None
    id: int = 0
    others: tuple[float, ...] = ()


@dataclass(frozen=True)
class Script:
    """What the server answers to one generation.

    values: V of the state that each token is sampled in, of a server that tells it.
    tokens: may be endless; `max_tokens` of the request ends them, else finish_reason does.
    per_chunk: tokens merged into one chunk. split: bytes per write, None for whole events.
    logprobs, token_ids: False never sends any, though asked.
    tells_prompt: False leaves out continuous usage.
    status: answered at once when not 200. content_type: of an event stream.
    rewrite: changes every chunk that has choices before it is sent, for servers that lie.
    fault: what happens once `after` tokens are sent:
        "reset" drops the connection, before the headers when `after` is 0;
        "no-body" drops it right after the headers;
        "stall" sends nothing more;
        "garbage" sends what is no JSON;
        "error" sends an error event;
        "eof" ends without a last chunk;
        "half" ends in the middle of a chunk;
        "flood" sends a line that never ends, until its client goes.
        Of an answer that is not streamed, the last five come as the first half of it.
    """

    tokens: Iterable[Token]
    finish_reason: str = "stop"
    stop_reason: int | str | None = None
    prompt_token_ids: tuple[int, ...] = (1, 2, 3)
    values: tuple[float, ...] = ()
    per_chunk: int = 1
    split: int | None = None
    logprobs: bool = True
    token_ids: bool = True
    tells_prompt: bool = True
    status: int = 200
    content_type: str = "text/event-stream; charset=utf-8"
    rewrite: Callable[[Body], Body] | None = None
    fault: Fault | None = None
    after: int = 0
