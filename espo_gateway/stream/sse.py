"""Server-sent events from a byte stream that may be split anywhere. Pure."""

from __future__ import annotations

from espo_gateway.errors import UpstreamProtocolError

#: A chunk of one token is about 500 bytes; a whole prompt's token ids can come in one event.
MAX_EVENT_BYTES = 16 * 2**20
#: UTF-8's byte order mark, which a stream may begin with.
BOM = b"\xef\xbb\xbf"


class SSEParser:
    """Takes bytes as they arrive, gives the `data` of each finished event.

    Works on bytes, so a split UTF-8 character needs no care; the fields `event`, `id` and `retry`
    are skipped, as no OpenAI server gives them a meaning.

    comments: lines that keep a silent stream alive; to be taken out by whoever passes them on.

        parser = SSEParser()
        parser.feed(b'data: {"a"')       # []
        parser.feed(b': 1}\\r\\n\\r\\n')  # [b'{"a": 1}']
    """

    __slots__ = ("_after_cr", "_data", "_limit", "_partial", "_size", "comments")

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._limit = limit
        self._partial = bytearray()
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self.comments: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """The data of the events that `received` finishes, lines of one event joined by a newline.

        Raises:
            UpstreamProtocolError: a line or an event is longer than the limit.
        """
        if (
            received[:6] == b"data: "
            and received.endswith(b"\n\n")
            and received.find(b"\r") < 0
            and len(received) < self._limit
            and not (self._partial or self._data or self._after_cr)
        ):
            # What nearly every read brings: an event of one line, or several.
            if received.find(b"\n") == len(received) - 2:
                return [received[6:-2]]
            events = received[6:-2].split(b"\n\ndata: ")
            if received.count(b"\n") == 2 * len(events):
                return events
        if b"\r" in received or self._after_cr:
            received = self._plain_newlines(received)
        lines = received.split(b"\n")
        if len(lines) == 1:
            self._partial += received
            self._check(len(self._partial))
            return []
        if self._partial:
            lines[0] = bytes(self._partial) + lines[0]
        self._partial = bytearray(lines.pop())
        self._check(len(self._partial))
        events = []
        for line in lines:
            line = line.removeprefix(BOM)
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data) if self._data[1:] else self._data[0])
                    self._data = []
                    self._size = 0
            elif line.startswith(b"data:"):
                self._size += len(line)
                self._check(self._size)
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line == b"data":
                self._data.append(b"")
            elif line.startswith(b":"):
                self.comments.append(line)
        return events

    def take_comments(self) -> bytes:
        """Those that have come since, as they are sent on."""
        taken = b"".join(line + b"\n\n" for line in self.comments)
        self.comments.clear()
        return taken

    def _plain_newlines(self, received: bytes) -> bytes:
        # A line may end in \r\n, \n or \r, and a \r\n may be split between two reads.
        if self._after_cr and received.startswith(b"\n"):
            received = received[1:]
            self._after_cr = False
        if received:
            self._after_cr = received.endswith(b"\r")
        return received.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise UpstreamProtocolError(
                f"the upstream sent an event of more than {self._limit} bytes"
            )
