"""A compressed body is undone, however it was cut and whichever way it was compressed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.upstream.inflation import Inflation


def raw(data: bytes) -> bytes:
    deflator = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflator.compress(data) + deflator.flush()


def flushed(data: bytes) -> bytes:
    """As a server does that streams: each piece can be read when it comes."""
    deflator = zlib.compressobj(wbits=zlib.MAX_WBITS + 16)
    pieces = [
        deflator.compress(data[i : i + 3]) + deflator.flush(zlib.Z_SYNC_FLUSH)
        for i in range(0, len(data), 3)
    ]
    return b"".join(pieces) + deflator.flush()


WAYS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "gzip, flushed": flushed,
    "gzip, several members": lambda data: gzip.compress(data[:5]) + gzip.compress(data[5:]),
    "deflate": zlib.compress,
    "deflate, no compression": lambda data: zlib.compress(data, 0),
    "deflate without a header": raw,
}


@pytest.mark.parametrize("way", WAYS)
@given(data=st.binary(max_size=60), cuts=st.lists(st.integers(0, 120), max_size=8))
def test_any_split_gives_the_same_body(way: str, data: bytes, cuts: list[int]) -> None:
    body = WAYS[way](data)
    bounds = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    inflation = Inflation()
    assert b"".join(inflation.feed(body[a:b]) for a, b in pairwise(bounds)) == data


def test_a_piece_is_there_when_it_has_come() -> None:
    deflator = zlib.compressobj(wbits=zlib.MAX_WBITS + 16)
    inflation = Inflation()
    for piece in (b"data: a\n\n", b"data: b\n\n"):
        sent = deflator.compress(piece) + deflator.flush(zlib.Z_SYNC_FLUSH)
        assert inflation.feed(sent) == piece


@pytest.mark.parametrize(
    "body", [b"\x1f not gzip at all", b"\xff\xff\xff", gzip.compress(b"a", mtime=0) + b"?!"]
)
def test_what_is_none_of_it_is_refused(body: bytes) -> None:
    with pytest.raises(zlib.error):
        Inflation().feed(body)
