"""Whatever a server sends, it is served or it is the server's error: never one of ours."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espo_gateway.errors import UpstreamError, UpstreamProtocolError
from espo_gateway.stop.gate_json import Control
from espo_gateway.stop.rules import Gate
from espo_gateway.stream.answer import Answer, merged, total_usage
from espo_gateway.stream.request import plan
from espo_gateway.stream.session import Policy, Session
from espo_gateway.stream.templates import Output
from tests.helpers.streams import CALM, EAGER, WILD, chunk

GATES = [Gate(), EAGER, Gate(rule="confidence", confidence_top_k=2)]


def sent(*, chat: bool) -> list[dict[str, Any]]:
    """Calm, then wild: four tokens in three chunks, with all that a chunk may have."""
    chunks: list[dict[str, Any]] = []
    for logprobs in ([CALM], [CALM, WILD], [WILD]):
        one = json.loads(chunk(logprobs))
        one["usage"] = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
        one["prompt_token_ids"] = [1, 2, 3]
        choice = one["choices"][0]
        choice["token_ids"] = [7] * len(logprobs)
        if chat:
            tops = [{"token": "t", "logprob": CALM, "bytes": []}] * 2
            numbers = [{"token": "t", "logprob": x, "top_logprobs": tops} for x in logprobs]
            choice["logprobs"] = {"content": numbers}
            choice["delta"] = {
                "role": "assistant",
                "content": choice.pop("text"),
                "tool_calls": [
                    {"index": 0, "id": "1", "function": {"name": "f", "arguments": "{"}}
                ],
            }
        chunks.append(one)
    end = json.loads(chunk([], "stop"))
    if chat:
        end["choices"][0]["delta"] = {}
    return [*chunks, end, {"choices": [], "usage": one["usage"], "extra": 1}]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every field and item, at any depth."""
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, name
        if isinstance(inner, dict | list):
            yield from places(inner)


#: Of chunks of either endpoint, and of others'.
FIELDS = st.sampled_from(
    [
        "choices",
        "delta",
        "text",
        "message",
        "logprobs",
        "content",
        "token_logprobs",
        "top_logprobs",
        "tokens",
        "tool_calls",
        "function_call",
        "finish_reason",
        "usage",
        "error",
        "index",
        "id",
        "role",
        "prompt_token_ids",
        "token_ids",
        "reasoning",
        "refusal",
        "audio",
        "espo",
    ]
)
#: What stands where something else is expected; written as JSON.
ODD = st.one_of(
    st.sampled_from(
        [
            "null",
            "true",
            "5",
            "-1",
            "3000000",
            "1e999",
            "NaN",
            "1" * 400,
            "9" * 30,
            "1.5",
            '""',
            '"x"',
            '"\\ud83d"',
            "[]",
            "{}",
            "[null]",
            '["x"]',
            "[[]]",
            '{"a": 1}',
            '[{"index": null}]',
        ]
    ),
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=2),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
        max_leaves=4,
    ).map(json.dumps),
)


def served(
    events: list[bytes], asked: dict[str, Any], gate: Gate, *, chat: bool, refuse: bool = False
) -> Any:
    """As `relay.follow` does it; the client's answer as it would be written."""
    prompt: dict[str, Any] = {"messages": []} if chat else {"prompt": "p"}
    body = {"model": "m", **prompt, **asked}
    planned = plan(body, chat=chat)
    policy = Policy(refuse=refuse)
    single = planned.singles[0]
    session = Session(gate, Control(), planned.asked, single, chat=chat, policy=policy)
    answer, written = Answer(chat=chat), b""

    def put(outputs: list[Output]) -> None:
        nonlocal written
        if not planned.asked.stream:
            answer.put(outputs)
            return
        for one in outputs:
            written += one[0].event(one[1]) if isinstance(one, tuple) else msgspec.json.encode(one)

    for event in events:
        session.receive(event)
        put(session.drain())
        if session.ended:
            break
    put([*session.drain(), session.finish()])
    usage = total_usage([(0, session.usage), (0, session.usage)])
    if planned.asked.stream:
        return written + msgspec.json.encode(session.usage_chunk(usage))
    return msgspec.json.encode(merged([answer], usage, chat=chat))


ASKED = st.fixed_dictionaries(
    {},
    optional={
        "stream": st.booleans(),
        "logprobs": st.just(1),
        "top_logprobs": st.just(1),
        "return_token_ids": st.booleans(),
        "stop": st.sampled_from(["x", ["ab"], 5]),
    },
)


@pytest.mark.parametrize("chat", [True, False])
@settings(max_examples=200)
@given(data=st.data(), asked=ASKED, gate=st.sampled_from(GATES))
def test_no_chunk_fails_the_gateway(
    chat: bool, data: st.DataObject, asked: dict[str, Any], gate: Gate
) -> None:
    chunks = sent(chat=chat)
    texts: dict[str, str] = {}
    for mark in range(data.draw(st.integers(1, 3))):
        place, name = data.draw(st.sampled_from([*places(chunks)]))
        if isinstance(place, dict) and data.draw(st.booleans()):
            name = data.draw(FIELDS)
            place.setdefault(name, 0)
        if data.draw(st.booleans()):
            place[name] = f"@{mark}@"
            texts[json.dumps(place[name])] = data.draw(ODD)
        else:
            del place[name]
    events = []
    for one in chunks:
        event = json.dumps(one, separators=(",", ":"))
        for marker, odd in texts.items():
            event = event.replace(marker, odd)
        events.append(event.encode())
    try:
        served(events, asked, gate, chat=chat)
    except UpstreamError:
        return


@given(asked=ASKED, garbage=st.binary(max_size=20), chat=st.booleans())
def test_no_bytes_fail_the_gateway(asked: dict[str, Any], garbage: bytes, chat: bool) -> None:
    events = [json.dumps(one, separators=(",", ":")).encode() for one in sent(chat=chat)]
    for at in (0, 1, 2):
        for event in (garbage, events[at].replace(b'"t"', b'"' + garbage + b'"')):
            try:
                served([*events[:at], event, *events[at:]], asked, EAGER, chat=chat)
            except UpstreamError:
                continue


#: Of a chat's delta in a chunk of a stream; each is served.
MENDED: dict[str, Any] = {
    "a null index": {"tool_calls": [{"index": None, "id": "1", "function": {"name": "f"}}]},
    "no index": {"tool_calls": [{"id": "1", "function": {"name": "f"}}]},
    "an index far away": {"tool_calls": [{"index": 3_000_000, "id": "1"}]},
    "an index below": {"tool_calls": [{"index": -1, "id": "1"}]},
    "an index of words": {"tool_calls": [{"index": "0", "id": "1"}]},
    "a null function": {"tool_calls": [{"index": 0, "function": None}]},
    "a function of words": {"tool_calls": [{"index": 0, "function": "f"}]},
    "null arguments": {"tool_calls": [{"index": 0, "function": {"arguments": None}}]},
    "arguments of another type": {
        "tool_calls": [{"index": 0, "function": {"arguments": {"a": 1}}}]
    },
    "a null call": {"tool_calls": [None]},
    "calls of words": {"tool_calls": "x"},
    "no calls": {"tool_calls": []},
    "half a pair": {"content": "\ud83d"},
    "half a pair in a name": {"tool_calls": [{"index": 0, "function": {"name": "\ude00"}}]},
    "content of parts": {"content": [{"type": "text", "text": "x"}]},
    "content of another type": {"content": 5},
    "a role of another type": {"role": 5},
    "nothing": {},
    "null": None,
}


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("shape", MENDED)
def test_what_can_be_mended_is_served(shape: str, streamed: bool) -> None:
    choice = {"index": 0, "delta": MENDED[shape]}
    chunks = [{"choices": [choice]}, *sent(chat=True)[1:]]  # without an id, to begin with
    events = [json.dumps(one).encode() for one in chunks]
    answer = served(events, {"stream": streamed}, Gate(), chat=True)
    assert b'"stop"' in answer
    assert "\ufffd" in answer.decode() or shape != "half a pair"


def test_calls_keep_their_order_and_all_their_arguments() -> None:
    pieces = [
        {"index": 3_000_000, "id": "b", "function": {"name": "g", "arguments": "{"}},
        {"index": 0, "id": "a", "function": {"name": "f", "arguments": None}},
        {"index": 0, "id": "", "function": {"name": "", "arguments": "[]"}},
        {"index": 3_000_000, "function": {"arguments": "}"}},
        {"index": None, "function": {"arguments": " "}},
        {"id": "c", "type": "function", "function": {"name": "h", "arguments": {"a": 1}}},
    ]
    answer = Answer(chat=True)
    for piece in pieces:
        answer.add({"choices": [{"index": 0, "delta": {"tool_calls": [copy.deepcopy(piece)]}}]})
    calls = answer.finished()["message"]["tool_calls"]
    assert [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in calls] == [
        ("a", "f", "[]"),
        ("b", "g", "{} "),
        ("c", "h", '{"a": 1}'),
    ]


def test_text_in_words_and_in_parts_is_all_kept() -> None:
    answer = Answer(chat=True)
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]
    details = ({"index": 0, "type": "reasoning.text", "text": text} for text in "de")
    for delta in (
        {"content": "a"},
        {"content": parts, "reasoning_details": [next(details)]},
        {"content": "b", "reasoning_details": [next(details)]},
        {"content": "c", "function_call": {"name": "f", "arguments": "{"}},
        {"function_call": {"arguments": "}"}},
    ):
        answer.add({"choices": [{"index": 0, "delta": copy.deepcopy(delta)}]})
    message = answer.finished()["message"]
    text = [{"type": "text", "text": "a"}, *parts, {"type": "text", "text": "bc"}]
    assert message["content"] == text
    assert message["reasoning_details"] == [{"index": 0, "type": "reasoning.text", "text": "de"}]
    assert message["function_call"] == {"name": "f", "arguments": "{}"}


@pytest.mark.parametrize("missing", ["token", "tokens", "bytes", "a token that is none"])
@pytest.mark.parametrize("chat", [True, False])
def test_a_cut_needs_no_token_strings(missing: str, chat: bool) -> None:
    """Text chunks are not looked at more closely until one of them is cut."""
    chunks = sent(chat=chat)
    for one in chunks[:3]:
        for name in ("usage", "prompt_token_ids"):
            del one[name]
        choice = one["choices"][0]
        del choice["token_ids"]
        if chat:
            choice["delta"] = {"content": choice["delta"]["content"]}
            for entry in choice["logprobs"]["content"]:
                entry.pop(missing, None)
                if missing.startswith("a token"):
                    entry["token"] = 5
        else:
            choice["logprobs"].pop(missing, None)
            if missing.startswith("a token"):
                choice["logprobs"]["tokens"] = [5] * len(choice["logprobs"]["token_logprobs"])
    events = [json.dumps(one, separators=(",", ":")).encode() for one in chunks]
    answer = served(events, {}, EAGER, chat=chat)
    assert b'"cut":4' in answer
    assert b'"stop_reason":"espo"' in answer


@pytest.mark.parametrize("refuse", [True, False])
def test_logprobs_that_cannot_be_read_at_the_cut_cannot_be_monitored(refuse: bool) -> None:
    chunks = sent(chat=False)
    for one in chunks[:3]:
        del one["usage"], one["prompt_token_ids"], one["choices"][0]["token_ids"]
    chunks[2]["choices"][0]["logprobs"]["tokens"] = 5
    events = [json.dumps(one, separators=(",", ":")).encode() for one in chunks]
    if refuse:
        with pytest.raises(UpstreamProtocolError, match="cannot be read"):
            served(events, {}, EAGER, chat=False, refuse=True)
        return
    answer = json.loads(served(events, {}, EAGER, chat=False))
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("tttt", "stop")
    assert "cannot be read" in choice["espo"]["reason"]


#: A chunk's logprobs, of servers with a mind of their own.
UNREADABLE: list[Any] = [
    *([], [-0.1], "x", 5, {"content": 5}, {"content": [None]}, {"content": [{}]}),
    *({"content": [{"token": "t", "logprob": "x"}]}, {"content": {"t": -0.1}}),
    *({"token_logprobs": 5}, {"token_logprobs": [[]]}, {"token_logprobs": [-1], "tokens": 5}),
    *({"token_logprobs": [-1], "top_logprobs": [[1]]}, {"token_logprobs": [10**400]}),
]


@pytest.mark.parametrize("asked", [{}, {"logprobs": 1}], ids=str)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("logprobs", UNREADABLE, ids=lambda one: str(one)[:40])
def test_logprobs_of_another_kind_are_served_unmonitored(
    logprobs: Any, chat: bool, stream: bool, asked: dict[str, Any]
) -> None:
    chunks = sent(chat=chat)
    for one in chunks[:3]:
        one["choices"][0]["logprobs"] = copy.deepcopy(logprobs)
    events = [json.dumps(one).encode() for one in chunks]
    answer = served(events, {"stream": stream, **asked}, EAGER, chat=chat)
    if logprobs != []:
        assert b"cannot be read" in answer or b"sends no logprobs" in answer
    assert answer.count(b'"t') >= 1
    served(events, {"stream": stream, **asked}, Gate(), chat=chat, refuse=True)
    if logprobs not in ([], {"content": {"t": -0.1}}):
        with pytest.raises(UpstreamProtocolError, match="cannot be read"):
            served(events, asked, EAGER, chat=chat, refuse=True)
