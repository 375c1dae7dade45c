"""What may go out to the client, and where it is cut."""

from __future__ import annotations

from typing import NamedTuple

from espo_gateway.stream.chunks import Chunk


class _Held(NamedTuple):
    """A chunk not yet sent on; `end`: tokens of the choice up to and with it."""

    chunk: Chunk
    texts: list[str]
    end: int
    lag: str | None
