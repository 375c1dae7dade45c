"""SSE parsing: the same events however the bytes are split."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.errors import UpstreamProtocolError
from espo_gateway.stream.sse import SSEParser

lines = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=8)
newlines = st.sampled_from(["\n", "\r\n", "\r"])


@given(
    events=st.lists(st.lists(lines, min_size=1, max_size=3), max_size=5),
    newline=newlines,
    space=st.booleans(),
    cuts=st.lists(st.integers(0, 200), max_size=12),
)
def test_any_split_gives_the_same_events(
    events: list[list[str]], newline: str, space: bool, cuts: list[int]
) -> None:
    separator = ": " if space else ":"
    # Without the space, one that the line starts with would be taken for the separator's.
    events = [[line if space else line.lstrip(" ") for line in event] for event in events]
    stream = ": a comment" + newline
    for event in events:
        stream += "id: 7" + newline + "event: ping" + newline
        stream += "".join(f"data{separator}{line}{newline}" for line in event) + newline
    data = stream.encode()
    parser = SSEParser()
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    found = [e for a, b in pairwise(bounds) for e in parser.feed(data[a:b])]
    assert found == ["\n".join(event).encode() for event in events]


def test_byte_by_byte_with_split_characters() -> None:
    parser = SSEParser()
    data = 'data: {"text": "日本é🙂"}\r\n\r\n'.encode()
    found = [event for i in range(len(data)) for event in parser.feed(data[i : i + 1])]
    assert [event.decode() for event in found] == ['{"text": "日本é🙂"}']


def test_unfinished_event_is_not_given() -> None:
    parser = SSEParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == [b"a"]


def test_blank_lines_and_comments_give_nothing() -> None:
    assert SSEParser().feed(b"\n\n: ping\n\nretry: 3\n\ndata\n\n") == [b""]


@pytest.mark.parametrize(
    "data",
    [
        b"data: " + b"x" * 100,
        b"data: " + b"x" * 100 + b"\n\n",
        b"data: 12345678\n" * 20,
        b"\n: " + b"x" * 100,
    ],
    ids=["unfinished line", "finished line", "many lines", "comment"],
)
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_memory_is_bounded(data: bytes, step: int) -> None:
    parser = SSEParser(limit=64)
    parts = [data[start : start + step] for start in range(0, len(data), step)]
    with pytest.raises(UpstreamProtocolError, match="more than 64 bytes"):
        deque(map(parser.feed, parts), maxlen=0)
