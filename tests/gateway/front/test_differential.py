"""Random requests and random answers, through the gateway and straight from the server: the same.

What is meant to differ is listed where it is allowed: `reconciled`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI

from tests.helpers.gateway import chat_body, client_of, completion_body, gateway_for
from tests.helpers.wire import WireServer, heard

Body = dict[str, Any]

#: Of each test: a third of a minute.
EXAMPLES = 100
FUZZED = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
NEVER = b'{"rule": "regret-only", "beta": 1e6}'
HEAD = {"id": "c", "object": "x", "created": 1, "model": "m"}
TEXTS = st.text(
    st.sampled_from('ab \n"\\\r\u2028é日🙂\x7f{[:') | st.characters(exclude_categories=["Cs"]),
    min_size=1,
    max_size=3,
)
ENDS = ["stop", "length", "tool_calls", "content_filter", "eos", "repetition"]


@dataclass
class Answer:
    """What a server says, whatever it is asked for.

    pieces: the tokens of each chunk. where: the field of their text. calls: deltas of tool calls.
    damage: what becomes of the events and the stream's tail; wrong: in words, for whom it fails.
    """

    pieces: list[list[str]]
    where: list[str]
    calls: list[Body]
    end: str
    end_apart: bool
    usage_at: str
    head: Body
    extra: Body
    newline: bytes
    lines: bool
    before: bytes
    done: bytes
    status: int = 200
    splits: list[int] = field(default_factory=list)
    damage: Callable[[list[bytes], list[bytes]], list[bytes]] = operator.add
    wrong: Any = None
    breaks: bool = False

    def chunks(self, body: Body) -> Iterator[Body]:
        """For a request: logprobs and usage as it asks for them."""
        chat = "messages" in body
        usage = {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}
        told = _tells(body)

        def chunk(choice: Body, end: str | None = None) -> Body:
            one = {**self.head, "choices": [{"index": 0, **choice, "finish_reason": end}]}
            if told and self.usage_at == "every":
                one["usage"] = usage
            return one | self.extra

        if chat:
            yield chunk({"delta": {"role": "assistant", "content": ""}})
        count = len(self.pieces)
        for i, tokens in enumerate(self.pieces):
            text = "".join(tokens)
            choice: Body = {"delta": {self.where[i]: text}} if chat else {"text": text}
            choice["logprobs"] = logprobs(tokens, body, chat=chat)
            last = i == count - 1 and not (self.end_apart or (self.calls and chat))
            yield chunk(choice, self.end if last else None)
        if chat:
            for call in self.calls:
                yield chunk({"delta": {"tool_calls": [call]}})
        if self.end_apart or not count or (self.calls and chat):
            yield chunk({"delta": {}} if chat else {"text": ""}, self.end)
        if told and self.usage_at == "end":
            yield {**self.head, "choices": [], "usage": usage}
        if told and self.usage_at == "choice":
            yield {**self.head, "choices": [{"index": 0, "delta": {}, "text": ""}], "usage": usage}

    def bytes(self, body: Body) -> bytes:
        """The whole stream, or the whole answer."""
        events = []
        for one in self.chunks(body):
            text = json.dumps(one, ensure_ascii=False, indent=0 if self.lines else None)
            data = b"".join(b"data: " + line.encode() + b"\n" for line in text.split("\n"))
            events.append((self.before + data + b"\n").replace(b"\n", self.newline))
        told = self.usage_at in ("end", "choice") and _tells(body)
        tail = [*([events.pop()] if told else []), self.done]
        return b"".join(self.damage(events, tail))


def _tells(body: Body) -> bool:
    return bool((body.get("stream_options") or {}).get("include_usage"))


def logprobs(tokens: list[str], body: Body, *, chat: bool) -> Body | None:
    """As vLLM answers it: in a chat so many of the likeliest, else those and the sampled one."""
    asked = body.get("logprobs")
    if asked is None or (chat and not asked):
        return None
    if not chat:
        tops = [{t: -0.1, "<other>": -0.05} if asked else {t: -0.1} for t in tokens]
        return {"tokens": tokens, "token_logprobs": [-0.1] * len(tokens), "top_logprobs": tops}
    names = (("sampled", -0.1), ("other", -0.05))[: body.get("top_logprobs") or 0]
    others = [{"token": name, "logprob": x, "bytes": None} for name, x in names]
    entries = ({"token": t, "logprob": -0.1, "bytes": None, "top_logprobs": others} for t in tokens)
    return {"content": [*entries]}


class Server(WireServer):
    """Gives `said`, in pieces."""

    said: Answer

    def answer(self, body: Body) -> Iterable[bytes]:
        data = self.said.bytes(body)
        if self.status != 200:
            data = b'{"error": {"message": "no", "code": 7}}'
        start = 0
        for split in self.said.splits:
            if data[start : start + split]:
                yield data[start : start + split]
            start += split
        yield data[start:]


@st.composite
def answers(draw: Any, *, ill: bool) -> Answer:
    """ill: with something wrong in the bytes."""
    pieces = draw(st.lists(st.lists(TEXTS, min_size=1, max_size=3), max_size=5))
    names = st.sampled_from(["content", "content", "reasoning_content", "reasoning", "refusal"])
    calls = []
    for index in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        function = {"name": "f", "arguments": ""}
        calls.append({"index": index, "id": str(index), "type": "function", "function": function})
        for part in draw(st.lists(TEXTS, max_size=2)):
            calls.append({"index": index, "function": {"arguments": part}})
    answer = Answer(
        pieces,
        [draw(names) for _ in pieces],
        calls,
        end=draw(st.sampled_from(ENDS)),
        end_apart=draw(st.booleans()),
        usage_at=draw(st.sampled_from(["end", "end", "every", "choice", "never"])),
        head=draw(st.sampled_from([HEAD, HEAD, {}, {"id": None, "model": "m"}])),
        extra=draw(st.sampled_from([{}, {}, {"error": None}, {"system_fingerprint": "x", "n": 1}])),
        newline=draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"])),
        lines=draw(st.sampled_from([False, False, True])),
        before=draw(st.sampled_from([b"", b"", b": hi\n\n", b"event: message\nid: 7\n", b"\n"])),
        done=draw(
            st.sampled_from([b"data: [DONE]\n\n", b"data:[DONE]\r\n\r\n", b"data: [DONE]", b""])
        ),
        splits=draw(st.lists(st.integers(1, 300), max_size=6)),
    )
    if ill:
        damaged(draw, answer)
    return answer


def damaged(draw: Any, answer: Answer) -> None:
    """One thing goes wrong."""
    # By events: those that the gateway asks for are longer.
    place = draw(st.integers(0, 8))
    kind = draw(st.sampled_from(["cut", "break", "garbage", "event", "error", "status", "replace"]))
    event = draw(
        st.sampled_from(
            [b"{not json", b"[1]", b"null", b"7", b'"x"', b"{}", b'{"choices": 3}', b"\xff"]
        )
    )
    if kind == "status":
        answer.status = draw(st.sampled_from([400, 404, 422, 500, 501]))
    elif kind in ("cut", "break"):
        kept = draw(st.sampled_from([0, 3, 40]))
        answer.damage = lambda events, tail: [*events[:place], b"".join(events[place:])[:kept]]
        answer.breaks = kind == "break"
    elif kind == "replace":
        old, new = draw(
            st.sampled_from(
                [
                    (b'"index": 0', b'"index": null'),
                    (b'"finish_reason": null', b'"finish_reason": ""'),
                    (b'"logprobs": null, ', b""),
                    (b'"arguments"', b'"argument"'),
                    (b'"choices": [{', b'"choices": [null, {'),
                    (b'{"index": 0', b'{"index": "x"'),
                ]
            )
        )
        answer.damage = lambda events, tail: [e.replace(old, new) for e in [*events, *tail]]
    else:
        if kind == "error":
            event = draw(
                st.sampled_from(
                    [
                        b'{"error": {"message": "boom", "code": 400}}',
                        b'{"error": "boom"}',
                        b'{"choices": [{"delta": {}, "text": ""}], "error": {"message": "boom"}}',
                    ]
                )
            )
        elif kind == "garbage":
            event = draw(st.binary(max_size=8))
        answer.wrong = event
        event = b"data: " + event + b"\n\n"
        answer.damage = lambda events, tail: [*events[:place], event, *events[place:], *tail]


@st.composite
def requests(draw: Any) -> Body:
    """A chat, or a completion, that one choice answers."""
    chat = draw(st.booleans())
    fields: Body = {}
    if draw(st.booleans()):
        fields["logprobs"] = True if chat else draw(st.integers(0, 1))
        if chat and draw(st.booleans()):
            fields["top_logprobs"] = draw(st.integers(0, 2))
    if draw(st.booleans()):
        fields["stream_options"] = {"include_usage": draw(st.booleans())}
    if draw(st.booleans()):
        fields["stop"] = draw(st.sampled_from(["zz", ["zz", "yy"], None]))
    if draw(st.booleans()):
        fields["extra_body"] = draw(
            st.sampled_from([{"top_k": 5}, {"min_p": 0.1}, {"odd": [None]}])
        )
    return (chat_body if chat else completion_body)(stream=True, **fields)


@dataclass
class Both:
    """A server, a gateway in front of it, and a client of each."""

    server: Server
    straight: AsyncOpenAI
    through: AsyncOpenAI
    runner: asyncio.Runner

    def hear(self, body: Body, answer: Answer, mode: str) -> tuple[Body, Body]:
        """What the two clients hear."""
        self.server.said, self.server.status = answer, answer.status
        self.server.breaks = answer.breaks
        espo = {**body.get("extra_body", {}), "espo": {"mode": mode}}

        async def both() -> tuple[Body, Body]:
            expected = await heard(self.straight, body)
            return expected, await heard(self.through, {**body, "extra_body": espo})

        return self.runner.run(both())


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def start() -> Both:
            server = await stack.enter_async_context(Server())
            # No waiting, and no server left alone, for what is wrong on purpose.
            gateway = await stack.enter_async_context(
                gateway_for(server, gate=NEVER, attempts=1, breaker_failures=10**6)
            )
            straight = await stack.enter_async_context(client_of(server.url))
            through = await stack.enter_async_context(client_of(gateway.url))
            return Both(server, straight, through, runner)

        yield runner.run(start())
        runner.run(stack.aclose())


def reconciled(expected: Body, found: Body) -> tuple[Body, Body]:
    """The two without what is meant to differ."""
    if expected["error"] and found["error"]:
        # In words: a connection that broke is told as an event, and is 503 before the first one.
        same = ("error", "status", "text", "calls", "logprobs", "finish", "usage")
        if expected["status"] is None:
            expected, found = (
                {k: v for k, v in one.items() if k not in same} for one in (expected, found)
            )
            return expected, found
        expected, found = expected | {"error": ""}, found | {"error": ""}
    elif expected["error"] and not found["error"] and expected["finish"]:
        # What breaks behind the end is not told, and a usage that was lost with it may be.
        expected |= {"error": None, "usage": found["usage"]}
    elif "ended before its choice did" in (found["error"] or "") and not expected["finish"]:
        # A stream that ends before its answer does is an error, not a shorter answer.
        return {}, {}
    elif "a chunk without choices" in (found["error"] or ""):
        return {}, {}
    return expected, found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["off", "shadow"])
@FUZZED
@given(body=requests(), data=st.data())
def test_what_is_well_formed_is_heard_the_same(
    mode: str, body: Body, data: st.DataObject, both: Both
) -> None:
    answer = data.draw(answers(ill=False))
    expected, found = both.hear(body, answer, mode)
    assert found == expected
    if mode == "shadow" and "tools" not in body:
        whole = {k: v for k, v in body.items() if k not in ("stream", "stream_options")}
        found = both.runner.run(heard(both.through, whole))
        for one in (expected, found):
            one["calls"] = [*one["calls"].values()]
            del one["usage"]  # a stream may not have asked for it
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["off", "shadow"])
@FUZZED
@given(body=requests(), data=st.data())
def test_what_is_wrong_is_heard_the_same(
    mode: str, body: Body, data: st.DataObject, both: Both, caplog: pytest.LogCaptureFixture
) -> None:
    answer = data.draw(answers(ill=True))
    caplog.clear()
    expected, found = reconciled(*both.hear(body, answer, mode))
    assert found == expected
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]
