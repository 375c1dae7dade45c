"""A compressed answer, of a server that compresses though it is asked not to. Pure."""

from __future__ import annotations

import zlib

#: Content-Encodings that can be undone.
INFLATED = frozenset({"gzip", "x-gzip", "deflate"})


class Inflation:
    """Takes a body of one of these encodings piece by piece, gives it as it was.

    Raises zlib.error for a piece that is not of it.
    """

    def __init__(self) -> None:
        self._inflator: zlib._Decompress | None = None

    def feed(self, data: bytes) -> bytes:
        """What can be told by now."""
        parts = []
        while data:
            if self._inflator is None:
                # One of the two kinds of "deflate" has no header; the others zlib tells apart.
                headed = data[0] == 0x1F or data[0] & 0x0F == zlib.DEFLATED
                bits = zlib.MAX_WBITS + 32 if headed else -zlib.MAX_WBITS
                self._inflator = zlib.decompressobj(bits)
            parts.append(self._inflator.decompress(data))
            data = self._inflator.unused_data
            if self._inflator.eof:
                self._inflator = None  # gzip may have several members
        return b"".join(parts)
