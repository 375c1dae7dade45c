"""Chunks of a stream that is calm or wild, and a gate that stops the wild one."""

from __future__ import annotations

import json
from collections.abc import Sequence

from espo_gateway.stop.rules import Gate

CALM, WILD = -0.1, -8.0

#: z passes 1 with the second wild token in a row.
EAGER = Gate(rule="regret-only", beta=1.0, min_tokens=1)


def chunk(logprobs: Sequence[float | None], finish: str | None = None) -> bytes:
    """One choice with so many tokens of the text `t`."""
    tokens = ["t"] * len(logprobs)
    tops = [
        {"t": logprob, "top": CALM if logprob is None else max(logprob, CALM)}
        for logprob in logprobs
    ]
    numbers = {"token_logprobs": logprobs, "tokens": tokens, "top_logprobs": tops}
    choice = {"index": 0, "text": "".join(tokens), "finish_reason": finish}
    head = {"id": "c", "object": "text_completion", "created": 1, "model": "m"}
    choices = [{**choice, "logprobs": numbers if logprobs else None}]
    return json.dumps({**head, "choices": choices}, separators=(",", ":")).encode()
