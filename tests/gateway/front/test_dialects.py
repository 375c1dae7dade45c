"""What servers other than vLLM, and proxies, send: the same answer as without the gateway."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.gateway import chat_body, client_of, gateway_for
from tests.helpers.wire import DONE, WireServer, events, heard

HEAD = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def chat(delta: Any, finish: Any = None, **fields: Any) -> dict[str, Any]:
    return {**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}


def said(text: str, **fields: Any) -> dict[str, Any]:
    """A chunk of one token, with logprobs."""
    top = [{"token": text, "logprob": -0.1, "bytes": []}]
    entry = {"token": text, "logprob": -0.1, "bytes": [], "top_logprobs": top}
    chunk = chat({"content": text})
    chunk["choices"][0] |= {"logprobs": {"content": [entry]}, **fields}
    return chunk


ROLE = chat({"role": "assistant", "content": ""})
END = chat({}, "stop")
LAST = {**HEAD, "choices": [], "usage": USAGE}
PLAIN = events(ROLE, said("Hel"), said("lo"), END, LAST) + DONE


def call(index: Any, arguments: Any, name: str | None = None, **fields: Any) -> dict[str, Any]:
    function = {"arguments": arguments} | ({} if name is None else {"name": name})
    place = {} if index is ... else {"index": index}
    return chat({"tool_calls": [{**place, "function": function, **fields}]})


#: The bytes of a whole stream each.
WIRE: dict[str, bytes] = {
    # -- the decoder's: lines and fields
    "as vLLM": PLAIN,
    "CRLF": PLAIN.replace(b"\n", b"\r\n"),
    "CR": PLAIN.replace(b"\n", b"\r"),
    "no space after the colon": PLAIN.replace(b"data: ", b"data:"),
    "two spaces": events(ROLE, said("Hel"), said("lo"), END, LAST).replace(b"data: ", b"data:  ")
    + DONE,
    "comments": PLAIN.replace(b"data: ", b": keep-alive\n\n: ping\ndata: "),
    "fields of an event": PLAIN.replace(b"data: ", b"event: message\nid: 7\nretry: 10\ndata: "),
    "unknown fields": PLAIN.replace(b"data: ", b"error: none\nfoo\n data: x\ndata: "),
    "data of several lines": b"".join(
        b"".join(b"data: " + line + b"\n" for line in json.dumps(c, indent=1).encode().split(b"\n"))
        + b"\n"
        for c in (ROLE, said("Hel"), said("lo"), END, LAST)
    )
    + DONE,
    "blank lines": PLAIN.replace(b"\n\n", b"\n\n\n\n"),
    "an end with words": PLAIN.replace(b"[DONE]", b"[DONE] and thanks"),
    "an end without a newline": PLAIN.rstrip(),
    "no end": PLAIN.removesuffix(DONE),
    "words after the end": PLAIN + b"data: nothing\n\n",
    "no end told but [DONE]": events(ROLE, said("Hel"), said("lo"), LAST) + DONE,
    # -- the chunks'
    "null usage": events(
        *({**c, "usage": None} for c in (ROLE, said("Hel"), said("lo"), END)), LAST
    )
    + DONE,
    "usage with the end": events(ROLE, said("Hel"), said("lo"), {**END, "usage": USAGE}) + DONE,
    "usage with choices after the end": events(
        ROLE, said("Hello"), END, chat({"content": "", "role": None}, usage=USAGE)
    )
    + DONE,
    "usage without choices": events(ROLE, said("Hello"), END, {**HEAD, "usage": USAGE}) + DONE,
    "usage with null choices": events(
        ROLE, said("Hello"), END, {**HEAD, "choices": None, "usage": USAGE}
    )
    + DONE,
    "no usage": events(ROLE, said("Hel"), said("lo"), END) + DONE,
    "empty choices first": events(
        {"id": "", "model": "", "choices": [], "prompt_filter_results": [{"a": 1}]}, ROLE
    )
    + PLAIN,
    "empty choices between": events(ROLE, said("Hel"), {**HEAD, "choices": []}, said("lo"), END)
    + DONE,
    "no error": events(*({**c, "error": None} for c in (ROLE, said("Hello"), END, LAST))) + DONE,
    "no index": PLAIN.replace(b'"index": 0, ', b""),
    "null index": PLAIN.replace(b'"index": 0', b'"index": null'),
    "null content": events(chat({"role": "assistant", "content": None}), said("a"), END) + DONE,
    "the role each time": events(
        *(chat({"role": "assistant", "content": t}) for t in ("Hel", "lo")), END
    )
    + DONE,
    "an empty role": events(ROLE, chat({"role": "", "content": "Hello"}), END) + DONE,
    "an empty finish reason": events(
        *(chat({"content": t}, "") for t in ("Hel", "lo", " you")), END, LAST
    )
    + DONE,
    "an empty finish reason and logprobs": events(
        ROLE, *(said(t, finish_reason="") for t in ("Hel", "lo", " you")), END, LAST
    )
    + DONE,
    "the finish reason twice": events(ROLE, said("Hel"), chat({"content": "lo"}, "stop"), END, LAST)
    + DONE,
    "text after the finish reason": events(
        ROLE, said("Hel"), chat({"content": "lo"}, "stop"), said(" y"), said("ou"), LAST
    )
    + DONE,
    "text and end in one chunk": events(chat({"role": "assistant", "content": "Hello"}, "stop"))
    + DONE,
    "only an end": events(END) + DONE,
    "a null delta": events(ROLE, said("Hello"), chat(None, "stop")) + DONE,
    "no delta": events(ROLE, said("Hello"), {**HEAD, "choices": [{"finish_reason": "stop"}]})
    + DONE,
    "no head": events(*({"choices": c["choices"]} for c in (ROLE, said("Hel"), said("lo"), END)))
    + DONE,
    "other words for the end": events(ROLE, said("Hello"), chat({}, "eos_token"), LAST) + DONE,
    "nulls everywhere": events(
        *(
            chat({"role": None, "content": t, "reasoning_content": None, "tool_calls": None})
            for t in ("Hel", "lo")
        ),
        END,
        LAST,
    )
    + DONE,
    "reasoning, then content": events(
        ROLE, chat({"reasoning_content": "hm"}), chat({"content": "lo"}), END
    )
    + DONE,
    "reasoning under both names": events(
        ROLE, *(chat({"reasoning": t, "reasoning_content": t}) for t in ("a", "b", "c")), END
    )
    + DONE,
    "a refusal": events(
        chat({"role": "assistant", "refusal": "I "}), chat({"refusal": "won't"}), END
    )
    + DONE,
    "calls": events(
        call(0, "", "f", id="1", type="function"),
        call(0, '{"a"'),
        call(0, ": 1}"),
        call(1, "{}", "g", id="2", type="function"),
        chat({}, "tool_calls"),
    )
    + DONE,
    "calls with empty ids": events(
        call(0, "{", "f", id="1", type="function"), call(0, "}", "", id="", type=""), END
    )
    + DONE,
    "calls without index": events(call(..., "{}", "f", id="1"), END) + DONE,
    "a call far away": events(call(3_000_000, "{}", "f", id="1"), END) + DONE,
    # -- errors
    "an error": events(ROLE, said("Hello"), {"error": {"message": "boom", "code": 500}}) + DONE,
    "an error of words": events(ROLE, said("Hello"), {"error": "boom"}) + DONE,
    "an error with choices": events(
        ROLE, said("Hello"), chat({}, "error", error={"message": "boom", "code": "x"})
    )
    + DONE,
    "an error by its name": events(ROLE, said("Hello"))
    + b'event: error\ndata: {"error": {"message": "boom"}}\n\n'
    + DONE,
    "an error after the end": events(ROLE, said("Hello"), END, {"error": {"message": "boom"}}),
    "no JSON": events(ROLE, said("Hello")) + b"data: {not json\n\n" + DONE,
}


@pytest.mark.parametrize("mode", ["enforce", "off"])
@pytest.mark.parametrize("shape", WIRE)
async def test_a_stream_is_heard_as_without_the_gateway(shape: str, mode: str) -> None:
    body = chat_body(stream=True, stream_options={"include_usage": True})
    async with (
        WireServer(WIRE[shape]) as server,
        gateway_for(server) as gateway,
        client_of(server.url) as straight,
        client_of(gateway.url) as through,
    ):
        expected = await heard(straight, body)
        found = await heard(through, {**body, "extra_body": {"espo": {"mode": mode}}})
    assert failed(found) == failed(expected)
    if expected["error"] is None:
        assert found == expected


@pytest.mark.parametrize("shape", WIRE)
async def test_the_same_stream_makes_the_whole_answer(shape: str) -> None:
    body = chat_body()
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    async with (
        WireServer(WIRE[shape]) as server,
        gateway_for(server) as gateway,
        client_of(server.url) as straight,
        client_of(gateway.url) as through,
    ):
        expected = await heard(straight, {**body, **stream})
        found = await heard(through, body)
    assert failed(found) == failed(expected)
    if expected["error"] is None:
        calls = [*found.pop("calls").values()], [*expected.pop("calls").values()]
        assert calls[0] == calls[1]
        assert found == expected


def failed(found: dict[str, Any]) -> bool:
    return found["error"] is not None
