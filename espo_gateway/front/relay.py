"""One single request upstream, followed by its session."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, Protocol

import msgspec

from espo_gateway.config import CHAT, TOKENS
from espo_gateway.critic.inquiry import Ask, Inquiry
from espo_gateway.critic.probe import AnswerProbe
from espo_gateway.critic.server import ValueServer
from espo_gateway.errors import (
    EXCERPT,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamStatusError,
)
from espo_gateway.front.events import EventStream
from espo_gateway.stop.told import SourceName
from espo_gateway.stream.answer import Answer
from espo_gateway.stream.chunks import decode_chunk
from espo_gateway.stream.decided import DecidedSession
from espo_gateway.stream.request import Body, Single, upstream_body
from espo_gateway.stream.session import Session
from espo_gateway.stream.sse import BOM, SSEParser
from espo_gateway.stream.templates import Output
from espo_gateway.stream.tokens import upstream_tokens_body
from espo_gateway.upstream.affinity import SESSION_ID, affinity_key
from espo_gateway.upstream.connection import Reply
from espo_gateway.upstream.pool import UpstreamPool

_encode = msgspec.json.Encoder().encode
#: Statuses of a request that the server does not take.
_REFUSED = frozenset({400, 422})
#: What tells the choices of one prompt apart.
_OWN = ("seed", "request_id", "sampling_params", "vllm_xargs")
#: Of a client's request, those that a question about it needs.
_OWN_HEADERS = frozenset({"authorization", "accept-encoding", SESSION_ID})

#: What a server is asked for: what is watched here, less where it decides, or no logprobs of ours.
Kind = Literal["watched", "decided", "bare"]


class OutputSink(Protocol):
    """Where a client's outputs go."""

    @property
    def flowing(self) -> bool:
        """Whether `put` may be used now; else `deliver` must be awaited."""

    def put(self, outputs: list[Output]) -> None:
        """Take outputs without waiting. Raises ConnectionResetError when the client has left."""

    async def deliver(self, outputs: list[Output]) -> None:
        """Take outputs, and wait until there is room for more. Raises as `put`."""


class Bodies:
    """The bodies of one client's upstream requests; those of one prompt share nearly all bytes.

    They are kept for as long as the answers take, and a prompt may have megabytes.
    """

    def __init__(self) -> None:
        self._shared: dict[tuple[int, Kind], bytes] = {}

    def encoded(
        self, single: Single, body: Body, kind: Kind = "watched"
    ) -> tuple[bytes | memoryview, ...]:
        """A body's JSON, in pieces; what is the choice's own is taken out of the body."""
        own = {name: body.pop(name) for name in _OWN if name in body}
        key = (single.prompt, kind)
        shared = self._shared.get(key)
        if shared is None:
            shared = self._shared[key] = _encode(body)
        if not own:
            return (shared,)
        return (_encode(own)[:-1] + b",", memoryview(shared)[1:])


async def follow(
    pool: UpstreamPool,
    path: str,
    headers: Mapping[str, str],
    single: Single,
    session: Session,
    sink: OutputSink,
    critic: ValueServer | None = None,
    answer_probe: AnswerProbe | None = None,
    *,
    bodies: Bodies,
    answered: Callable[[Reply], None],
) -> None:
    """Deliver one choice to its client.

    bodies: of all choices of the request.
    answered: told of the server's answer, of whatever status, once its head is there.
    The upstream's request is over, cancelled if need be, before the last chunk is delivered.
    A server that refuses logprobs is asked once more without, where that is served.
    Raises the kinds of `UpstreamError`.
    """
    key = affinity_key(pool.affinity, headers, single.body)
    sources: dict[SourceName, Ask] = {}
    if critic is not None and session.gate.needs_critic:
        sources["critic"] = partial(_valued, critic)
    if answer_probe is not None and session.probe is not None:
        # The cache of the prefix is on the server that samples it.
        key = key or affinity_key("prefix", headers, single.body)
        sources["probe"] = partial(_probed, answer_probe, session, headers, key)
    inquiry = Inquiry(sources, session) if sources and session.wants_ids else None

    async def ask(kind: Kind) -> None:
        body = _body_of(path, single, session, kind)
        async with pool.open(
            "POST",
            path,
            headers=headers,
            data=bodies.encoded(single, body, kind),
            key=key,
            model=single.body.get("model"),
            whole=not body.get("stream"),
        ) as reply:
            answered(reply)
            if isinstance(session, DecidedSession) and isinstance(sink, Answer):
                await check_answer(reply)
                sink.adopt(*session.take_whole(await reply.body()))
                return
            await check_stream(reply)
            if kind == "bare" and session.gate.rule != "none":
                session.give_up(
                    "the upstream refuses logprobs, so nothing can be monitored: allow them there "
                    '(vLLM\'s --max-logprobs), or send "espo": {"mode": "off"}'
                )
            await _Relay(reply, session, sink, inquiry).run()
            if inquiry is not None:
                await inquiry.conclude()

    kind: Kind = "decided" if isinstance(session, DecidedSession) else "watched"
    try:
        try:
            await ask(kind)
        except UpstreamStatusError as error:
            # Of any other fault the client is told at once.
            about = error.status in _REFUSED and "logprob" in str(error.answer).lower()
            if not (about and session.goes_without_logprobs):
                raise
            if _body_of(path, single, session, kind) == _body_of(path, single, session, "bare"):
                raise
            await ask("bare")
    finally:
        session.over = time.monotonic()
        if inquiry is not None:
            inquiry.close()
    await sink.deliver([*session.drain(), session.finish()])


def _body_of(path: str, single: Single, session: Session, kind: Kind) -> Body:
    """As it goes to the server."""
    if isinstance(session, DecidedSession):
        return session.body(single.body, tokens=path == TOKENS)
    alternatives = session.gate.top_logprobs if kind == "watched" else 0
    if path == TOKENS:
        return upstream_tokens_body(single, alternatives=alternatives)
    return upstream_body(
        single, chat=path == CHAT, token_ids=session.wants_ids, alternatives=alternatives
    )


async def _valued(
    critic: ValueServer, prompt: Sequence[int], sampled: Sequence[int]
) -> list[float]:
    return [await critic.value(prompt, sampled)]


async def _probed(
    answer_probe: AnswerProbe,
    session: Session,
    headers: Mapping[str, str],
    key: bytes | None,
    prompt: Sequence[int],
    sampled: Sequence[int],
) -> list[float]:
    assert session.probe is not None
    # Another name for the request would be that of one under way.
    own = {name: value for name, value in headers.items() if name.lower() in _OWN_HEADERS}
    prefix = [*prompt, *sampled]
    said = await answer_probe.ask(session.probe, session.model, prefix, headers=own, key=key)
    return said.told


class _Relay:
    """From a reply through a session to a sink."""

    def __init__(
        self, reply: Reply, session: Session, sink: OutputSink, inquiry: Inquiry | None
    ) -> None:
        self._reply = reply
        self._session = session
        self._sink = sink
        #: where the server's comments go
        self._stream = sink if isinstance(sink, EventStream) else None
        self._inquiry = inquiry
        self._parser = SSEParser()
        self._comments = self._parser.comments
        self._done = False
        self._failure: UpstreamError | None = None

    async def run(self) -> None:
        """Until the answer's end, or until nothing more of it is needed."""
        if self._stream is not None:
            self._stream.certain.set()
        over = False
        while not over:
            try:
                if self._inquiry is None and self._sink.flowing:
                    over = await self._reply.push(self._receive)
                else:
                    over = await self._read()
                if self._failure is not None:
                    raise self._failure
            except UpstreamError as error:
                # What breaks after the answer's end leaves it whole, unless the server says not.
                if isinstance(error, UpstreamStatusError) or not self._session.complete:
                    raise
                return
            except RecursionError as error:
                raise UpstreamProtocolError("the upstream's answer is nested too deeply") from error
            over = over or self._done or self._session.ended

    async def _read(self) -> bool:
        received = await self._reply.read()
        self._take(received)
        if self._comments:
            comments = self._parser.take_comments()
            if self._stream is not None:
                await self._stream.send(comments)
        if self._inquiry is not None:
            await self._inquiry.proceed()
        if outputs := self._session.drain():
            await self._sink.deliver(outputs)
        return not received

    def _receive(self, received: bytes) -> bool:
        """The same without waiting, in the turn of the event loop that brought it."""
        self._take(received)
        if self._comments:
            comments = self._parser.take_comments()
            if self._stream is not None:
                self._stream.put([], comments)
        if outputs := self._session.drain():
            self._sink.put(outputs)
        return not (self._done or self._failure or self._session.ended) and self._sink.flowing

    def _take(self, received: bytes) -> None:
        session = self._session
        try:
            for data in self._parser.feed(received):
                if data[:6] == b"[DONE]":
                    self._done = session.done = True
                    return
                session.receive(data)
        except UpstreamError as error:
            self._failure = error  # what came before it is still the client's


async def streams(reply: Reply) -> bool:
    """Whether the answer is an event stream, by its name or, as OpenAI's clients see it, its kind.

    Raises UpstreamProtocolError when it is compressed in a way that nobody here can undo.
    """
    encoding = reply.headers.get("Content-Encoding")
    if encoding is not None and reply.status < 300:
        raise UpstreamProtocolError(
            f"the upstream answered with Content-Encoding {encoding}, though asked for none: "
            "switch its compression off"
        )
    if reply.content_type == "text/event-stream":
        return True
    start = (await reply.peek(16)).removeprefix(BOM).lstrip()
    return any(start.startswith(field) for field in (b"data:", b"event:", b"id:", b"retry:", b":"))


async def check_stream(reply: Reply) -> None:
    """Raises UpstreamStatusError or UpstreamProtocolError unless the answer is an event stream."""
    if await streams(reply) and 200 <= reply.status < 300:
        return
    await check_answer(reply)
    data = await reply.body()
    raise UpstreamProtocolError(
        f"the upstream answered a streaming request with {reply.content_type} "
        f"(status {reply.status})",
        excerpt=repr(data[:EXCERPT]),
    )


async def check_answer(reply: Reply) -> None:
    """Raises UpstreamStatusError or UpstreamProtocolError when a generation was refused."""
    check_place(reply)
    if reply.status < 400:
        return
    data = await reply.body()
    try:
        answer: object = decode_chunk(data)
    except ValueError:
        answer = data[:EXCERPT].decode(errors="replace")
    retry_after = reply.headers.get("Retry-After")
    raise UpstreamStatusError(
        reply.status, answer, {"Retry-After": retry_after} if retry_after else None
    )


def check_place(reply: Reply) -> None:
    """Raises UpstreamProtocolError when a generation is to be had elsewhere."""
    if 300 <= reply.status < 400:
        # Followed by the client it would lead around the gateway, or back into it.
        raise UpstreamProtocolError(
            "the upstream redirects; give the gateway the address that answers (--upstream)",
            excerpt=reply.headers.get("Location", "nowhere"),
        )
