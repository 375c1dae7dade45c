"""Which server a request goes to: the least loaded, or the one that its prompt's cache is on. Pure.

By rendezvous hashing every gateway sends a key to the same server without being told, and a server
that goes or comes moves only its own keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal, Protocol, TypeVar

import msgspec

Affinity = Literal["none", "session", "prefix"]
#: The header that requests of one session have in common, in lower case.
SESSION_ID = "x-session-id"

#: How much of a prompt is its prefix: characters, or token ids.
PREFIX_CHARACTERS, PREFIX_TOKENS = 1024, 256
#: A server with more than LOAD_FACTOR · (mean load) + LOAD_SLACK requests takes none for affinity.
LOAD_FACTOR, LOAD_SLACK = 1.25, 1.0

_encode = msgspec.json.Encoder().encode


class Loaded(Protocol):
    """A server, as far as choosing one needs to know it."""

    in_flight: int

    @property
    def url(self) -> str: ...


Server = TypeVar("Server", bound=Loaded)


def affinity_key(
    kind: Affinity, headers: Mapping[str, str], body: Mapping[str, Any]
) -> bytes | None:
    """What requests that belong on one server have in common; None when any server will do.

    Args:
        body: of one single request, as JSON was decoded; a list of prompts goes by its first.
    """
    if kind == "session":
        common: object = next(
            (value for name, value in headers.items() if name.lower() == SESSION_ID), None
        )
        # OpenAI's own field for this, and the older one that it took over from.
        common = common or body.get("prompt_cache_key") or body.get("user")
    elif kind == "prefix":
        common = _prefix(body)
    else:
        return None
    return blake2b(_encode(common), digest_size=16).digest() if common else None


def passed_key(kind: Affinity, headers: Mapping[str, str], data: bytes | None) -> bytes | None:
    """The same of a request that is passed through, whatever its body is."""
    if kind == "none":
        return None
    try:
        body = msgspec.json.decode(data or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        body = {}
    return affinity_key(kind, headers, body if isinstance(body, dict) else {})


def _prefix(body: Mapping[str, Any]) -> object:
    prompt = body.get("prompt", body.get("token_ids", body.get("input")))
    messages = body.get("messages")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        messages = prompt  # as /v1/responses has them
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt[:PREFIX_CHARACTERS]
    if isinstance(prompt, list) and messages is not prompt:
        return prompt[:PREFIX_TOKENS]
    if not isinstance(messages, list):
        return None
    # Up to the first word of the user, so that a conversation keeps its key as it grows.
    first = []
    for message in messages:
        first.append(message)
        if isinstance(message, dict) and message.get("role") == "user":
            break
    return _encode(first)[:PREFIX_CHARACTERS] if first else None


def choose(servers: Sequence[Server], key: bytes | None) -> Server:
    """The least loaded; with a key the first in its order that has no much higher load."""
    if key is None:
        return min(servers, key=lambda server: server.in_flight)
    mean = sum(server.in_flight for server in servers) / len(servers)
    # Never empty: the least loaded is not above the mean.
    light = [s for s in servers if s.in_flight <= LOAD_FACTOR * mean + LOAD_SLACK]
    return max(light, key=lambda server: _weight(key, server.url))


def _weight(key: bytes, url: str) -> bytes:
    return blake2b(key + b"\0" + url.encode(), digest_size=8).digest()
