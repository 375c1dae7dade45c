"""The short way of text chunks and the general way give the same answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.stop.rules import Gate
from espo_gateway.stream.answer import Answer, merged
from espo_gateway.stream.request import plan
from espo_gateway.stream.session import Session
from espo_gateway.stream.templates import Output, template_of

STOPPING = Gate(rule="regret-only", beta=2.0, min_tokens=1)

TEXTS = st.text(max_size=4)
LOGPROBS = st.floats(-12, 0, allow_nan=False)


#: Of fields that any object of a chunk may have beside the usual.
NAMES = st.sampled_from(["content", "reasoning", "reasoning_content", "refusal", "extra"])


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """All of a chunk's, at any depth; of logprobs only the outermost."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list) and "top_logprobs" not in inner:
            yield from objects(inner)


def token(draw: Any) -> tuple[str, float, float | None]:
    return draw(TEXTS), draw(LOGPROBS), draw(st.one_of(st.none(), LOGPROBS, st.just(-9999.0)))


def chat_choice(field: str, tokens: list[tuple[str, float, float | None]]) -> dict[str, Any]:
    content = []
    for text, logprob, other in tokens:
        tops = [{"token": text, "logprob": logprob, "bytes": []}]
        if other is not None:
            tops.append({"token": "o", "logprob": other, "bytes": []})
        content.append({"token": text, "logprob": logprob, "bytes": [], "top_logprobs": tops})
    text = "".join(text for text, _, _ in tokens)
    return {"index": 0, "delta": {field: text}, "logprobs": {"content": content}}


def completion_choice(tokens: list[tuple[str, float, float | None]]) -> dict[str, Any]:
    return {
        "index": 0,
        "text": "".join(text for text, _, _ in tokens),
        "logprobs": {
            "tokens": [text for text, _, _ in tokens],
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": [
                {text: logprob} | ({} if other is None else {text + "o": other})
                for text, logprob, other in tokens
            ],
            "text_offset": [0] * len(tokens),
        },
    }


@st.composite
def streams(draw: Any, *, chat: bool) -> list[bytes]:
    """Mostly text chunks, and between them such as are not."""
    events = []
    tokens = 0
    count = draw(st.integers(1, 12))
    for i in range(count):
        merged = [token(draw) for _ in range(draw(st.integers(1, 3)))]
        tokens += len(merged)
        field = draw(st.sampled_from(["content", "content", "reasoning"]))
        choice = chat_choice(field, merged) if chat else completion_choice(merged)
        chunk = {"id": "c", "object": "o", "created": 1, "model": "m", "choices": [choice]}
        chunk["usage"] = {
            "prompt_tokens": 3,
            "total_tokens": 3 + tokens,
            "completion_tokens": tokens,
        }
        odd = draw(st.sampled_from([None] * 6 + ["field", "text", "null", "created", "no tops"]))
        if odd == "field":
            place = draw(st.sampled_from([*objects(chunk)]))
            name = "extra" if place is choice["logprobs"] else draw(NAMES)
            place[name] = draw(st.sampled_from(["", "x", None, 1, {"a": [1]}, ["x"]]))
        elif odd == "text" and chat:
            text = choice["delta"][field]
            choice["delta"][draw(NAMES)] = draw(st.sampled_from([text, "more"]))
        elif odd == "null":
            choice["finish_reason"] = choice["token_ids"] = None
        elif odd == "created":
            chunk["created"] = 2
        elif odd == "no tops":
            logprobs = choice["logprobs"]
            if chat:
                logprobs["content"][0]["top_logprobs"] = []
            else:
                logprobs["top_logprobs"] = None
        if i == count - 1:
            choice["finish_reason"] = draw(st.sampled_from(["stop", "length"]))
        events.append(json.dumps(chunk, separators=(",", ":")).encode())
    return events


def played(events: list[bytes], *, chat: bool, stream: bool) -> tuple[Any, Any]:
    """What the client gets, and the record."""
    prompt: dict[str, Any] = {"messages": []} if chat else {"prompt": "p"}
    planned = plan({"model": "m", "stream": stream, **prompt}, chat=chat)
    session = Session(STOPPING, planned.control, planned.asked, planned.singles[0], chat=chat)
    answer = Answer(chat=chat)
    sent = []

    def deliver(outputs: list[Output]) -> None:
        answer.put(outputs)
        for output in outputs if stream else ():
            if isinstance(output, tuple):
                template, text = output
                sent.append(json.loads(template.event(text).removeprefix(b"data: ")))
            else:
                sent.append(json.loads(json.dumps(output)))

    for event in events:
        session.receive(event)
        deliver(session.drain())
        if session.ended:
            break
    deliver([*session.drain(), session.finish()])
    whole = sent or merged([answer], session.usage, chat=chat)
    # A field that is null and one that is not there mean the same.
    return json.loads(json.dumps(whole), object_hook=known), session.record


def spaced(event: bytes) -> bytes:
    """The same JSON, written as no template expects it: it takes the general way."""
    return json.dumps(json.loads(event), separators=(",", " : ")).encode()


def known(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


@pytest.mark.parametrize("chat", [True, False])
@given(data=st.data(), stream=st.booleans())
def test_the_short_way_is_the_general_way(chat: bool, data: st.DataObject, stream: bool) -> None:
    events = data.draw(streams(chat=chat))
    short = played(events, chat=chat, stream=stream)
    general = played([spaced(event) for event in events], chat=chat, stream=stream)
    assert short == general


LOGPROBS_OF_ONE = chat_choice("content", [("a", -0.1, None)])["logprobs"]

#: What a later chunk has beside, or in the place of, what the first one had.
LATER: dict[str, tuple[tuple[str, ...], Any]] = {
    "both reasonings": (("choices", "delta"), {"reasoning": "b", "reasoning_content": "b"}),
    "reasoning beside content": (("choices", "delta"), {"content": "b", "reasoning": "r"}),
    "content beside reasoning_content": (
        ("choices", "delta"),
        {"reasoning_content": "r", "content": "b"},
    ),
    "an empty content beside reasoning": (("choices", "delta"), {"content": "", "reasoning": "b"}),
    "a text of another name": (("choices", "delta"), {"thinking": "b"}),
    "details": (
        ("choices", "delta"),
        {"content": "b", "reasoning_details": [{"type": "reasoning.text", "text": "b"}]},
    ),
    "text in parts": (("choices", "delta"), {"content": [{"type": "text", "text": "b"}]}),
    "a refusal": (("choices", "delta"), {"refusal": "b"}),
    "a role": (("choices", "delta"), {"role": "assistant", "content": "b"}),
    "a call": (("choices", "delta"), {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}),
    "an old call": (("choices", "delta"), {"content": "b", "function_call": {"arguments": "{"}}),
    "no text": (("choices", "delta"), {}),
    "a choice's own text": (("choices",), {"text": "b", "delta": {"content": "b"}}),
    "a choice's extra": (("choices",), {"matched_stop": 7, "delta": {"content": "b"}}),
    "a stop reason": (("choices",), {"stop_reason": "x", "delta": {"content": "b"}}),
    "token ids": (("choices",), {"token_ids": [5], "delta": {"content": "b"}}),
    "an extra": ((), {"service_tier": "x"}),
    "an extra object": ((), {"timings": {"n": 1}, "model": "another"}),
    "another head": ((), {"model": "another"}),
}


@pytest.mark.parametrize("first", ["content", "reasoning", "reasoning_content"])
@pytest.mark.parametrize("shape", LATER)
def test_what_a_later_chunk_has_reaches_the_client(shape: str, first: str) -> None:
    """Chunks come one by one, so that the first is the template of the next."""
    depth, fields = LATER[shape]
    head = {"id": "c", "object": "o", "created": 1, "model": "m"}

    def chunk(text: str) -> dict[str, Any]:
        delta = {first: text}
        choice = {"index": 0, "delta": delta, "logprobs": LOGPROBS_OF_ONE, "finish_reason": None}
        return {**head, "choices": [choice]}

    odd = chunk("b")
    if depth:
        odd["choices"][0] |= {"delta": fields} if depth[1:] else fields
    else:
        odd |= fields
    end = {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    chunks = [chunk("a"), chunk("b"), odd, chunk("c"), odd, end]
    events = [json.dumps(one, separators=(",", ":")).encode() for one in chunks]
    sent, _ = played(events, chat=True, stream=True)
    for one in (found := json.loads(json.dumps(chunks), object_hook=known)):
        for choice in one["choices"]:
            choice.pop("logprobs", None)
    sent[-1]["choices"][0].pop("espo")
    assert sent == found
    whole, _ = played(events, chat=True, stream=False)
    assert whole == played([spaced(event) for event in events], chat=True, stream=False)[0]


@pytest.mark.parametrize("chat", [True, False])
def test_an_ordinary_chunk_is_a_text_chunk(chat: bool) -> None:
    """Else the equality above would be one of the general way with itself."""
    tokens = [("a", -0.5, None), ("b", -2.0, -0.25)]
    choice = chat_choice("content", tokens) if chat else completion_choice(tokens)
    chunk = {"id": "c", "object": "o", "created": 1, "model": "m", "choices": [choice]}
    data = json.dumps(chunk, separators=(",", ":")).encode()
    template = template_of(data, chat=chat)
    assert template is not None
    assert template.read(data) == ("ab", [(-0.5, -0.5), (-2.0, -0.25)])
    assert template_of(spaced(data), chat=chat) is None
