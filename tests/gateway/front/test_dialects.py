"""What servers other than vLLM, and proxies, send: the same answer as without the gateway."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from typing import Any

import aiohttp
import pytest

from tests.helpers.gateway import CHAT, chat_body, client_of, completion_body, gateway_for, post
from tests.helpers.wire import DONE, WireServer, events, heard

HEAD = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
LOGPROBS: dict[str, Any] = {"logprobs": True, "top_logprobs": 1}
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
    body = chat_body(**LOGPROBS, stream=True, stream_options={"include_usage": True})
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
    body = chat_body(**LOGPROBS)
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


def completion(chunk: dict[str, Any]) -> dict[str, Any]:
    """A chat's chunk as one of the other endpoint."""
    (choice,) = chunk["choices"]
    text = {"text": choice["delta"].get("content", "")}
    return {**chunk, "choices": [{k: v for k, v in choice.items() if k != "delta"} | text]}


def failed(found: dict[str, Any]) -> bool:
    return found["error"] is not None


# -- the way the bytes come ---------------------------------------------------------------------

FLUSHED = zlib.compressobj(wbits=zlib.MAX_WBITS + 16)
COMPRESSED = {
    "gzip": [
        FLUSHED.compress(event + b"\n\n") + FLUSHED.flush(zlib.Z_SYNC_FLUSH)
        for event in PLAIN.split(b"\n\n")
    ],
    "deflate": [zlib.compress(PLAIN)],
    "x-gzip": [gzip.compress(PLAIN)],
    "identity": [PLAIN],
}


@pytest.mark.parametrize("mode", ["enforce", "off"])
@pytest.mark.parametrize("encoding", COMPRESSED)
async def test_a_server_may_compress(encoding: str, mode: str) -> None:
    server = WireServer(*COMPRESSED[encoding], headers={"Content-Encoding": encoding})
    stream = {"stream": True, "stream_options": {"include_usage": True}, **LOGPROBS}
    async with (
        server,
        WireServer(PLAIN) as plain,
        gateway_for(server) as gateway,
        client_of(plain.url) as straight,
        client_of(gateway.url) as through,
    ):
        expected = await heard(straight, chat_body(**stream))
        espo = {"extra_body": {"espo": {"mode": mode}}}
        assert await heard(through, chat_body(**stream, **espo)) == expected
        if mode == "enforce":
            assert await heard(through, chat_body(**LOGPROBS)) == expected


@pytest.mark.parametrize("mode", ["enforce", "off"])
@pytest.mark.parametrize(
    ("encoding", "body"), [("br", PLAIN), ("gzip", PLAIN), ("gzip, gzip", PLAIN)], ids=str
)
async def test_what_cannot_be_undone_is_said(encoding: str, body: bytes, mode: str) -> None:
    server = WireServer(body, headers={"Content-Encoding": encoding})
    async with server, gateway_for(server) as gateway:
        for stream in (True, False):
            sent = chat_body(stream=stream, espo={"mode": mode})
            status, answer = await post(gateway.url + CHAT, sent)
            assert status == 502
            assert "encoding" in answer["error"]["message"].lower()


async def test_other_answers_may_be_compressed_too() -> None:
    packed = gzip.compress(b'{"data": []}')
    server = WireServer(packed, headers={"Content-Encoding": "gzip", "Content-Type": "text/x"})
    async with (
        server,
        gateway_for(server) as gateway,
        aiohttp.ClientSession(auto_decompress=False) as session,
    ):
        for encoding, body in (("gzip", b'{"data": []}'), ("zstd", packed)):
            server.headers["Content-Encoding"] = encoding
            response = await session.post(gateway.url + "/v1/embeddings", json={})
            assert await response.read() == body
            assert response.headers.get("Content-Encoding") == {"zstd": "zstd"}.get(encoding)


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/octet-stream", "Text/Event-Stream"]
)
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n\n", b": hello\n\n", b"event: x\n"])
async def test_a_stream_is_known_by_its_bytes(kind: str, start: bytes) -> None:
    """As OpenAI's clients know it."""
    server = WireServer(start[:1], start[1:], PLAIN, headers={"Content-Type": kind})
    body = chat_body(stream=True, stream_options={"include_usage": True})
    async with server, gateway_for(server) as gateway, client_of(gateway.url) as client:
        for mode in ("enforce", "off"):
            found = await heard(client, {**body, "extra_body": {"espo": {"mode": mode}}})
            assert found["text"] == {"content": "Hello"}
            assert (found["finish"], found["error"]) == ("stop", None)


@pytest.mark.parametrize("broken", ["reset", "end", "half", "garbage", "silence"])
@pytest.mark.parametrize("told", [True, False], ids=["usage told", "no usage told"])
async def test_an_answer_whose_end_has_come_is_whole(broken: str, told: bool) -> None:
    last = {**END, "usage": USAGE} if told else END
    chunks = [events(ROLE), events(said("Hel")), events(said("lo")), events(last)]
    tail = {"half": b'data: {"id', "garbage": b"data: {no\n\n"}.get(broken, b"")
    server = WireServer(*chunks, tail, breaks=broken in ("reset", "half"))
    server.hangs = broken == "silence"
    limits: dict[str, Any] = {"idle_timeout": 0.2} if broken == "silence" else {}
    async with (
        server,
        gateway_for(server, **limits) as gateway,
        client_of(gateway.url) as client,
    ):
        for fields in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
            found = await heard(client, chat_body(**fields))
            assert (found["text"], found["finish"]) == ({"content": "Hello"}, "stop")
            assert found["error"] is None
            assert (found["usage"] or {}).get("total_tokens") == (5 if told else None)
        # Where the prompt's length is known, so is the usage.
        server.parts = [events(*map(completion, (said("Hel"), said("lo"), last))), tail]
        found = await heard(client, completion_body(prompt=[1, 2, 3]))
        assert (found["text"], found["finish"]) == ({"text": "Hello"}, "stop")
        assert found["usage"]["total_tokens"] == 5


async def test_an_answer_whose_end_has_not_come_is_none() -> None:
    server = WireServer(events(ROLE, said("Hel"), said("lo")), breaks=True)
    async with server, gateway_for(server) as gateway, client_of(gateway.url) as client:
        for fields in ({}, {"stream": True}):
            assert failed(await heard(client, chat_body(**fields)))
        server.breaks = False
        for fields in ({}, {"stream": True}):
            assert failed(await heard(client, chat_body(**fields)))


@pytest.mark.parametrize(
    "word", ["stop", "eos_token", "repetition", "content_filter", "abort", "x"]
)
async def test_a_servers_own_word_for_the_end_is_kept(word: str) -> None:
    """Though the rule would stop at that very token, in the place of which a word would be ours."""
    wild = {"token": "x", "logprob": -8.0, "top_logprobs": [{"token": "y", "logprob": -0.1}]}
    choice = {"delta": {"content": "xx"}, "logprobs": {"content": [wild, wild]}}
    body = events({**HEAD, "choices": [{**choice, "finish_reason": word}]}) + DONE
    async with WireServer(body) as server, gateway_for(server) as gateway:
        _, answer = await post(gateway.url + CHAT, chat_body())
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == word
    assert choice["espo"]["cut"] is None


async def test_an_error_in_the_old_way_is_one() -> None:
    """Of vLLM once, and of others still: OpenAI's client takes it for a chunk."""
    error = {"object": "error", "message": "boom", "code": 400}
    async with (
        WireServer(events(ROLE, said("Hello"), error) + DONE) as server,
        gateway_for(server) as gateway,
        client_of(server.url) as straight,
        client_of(gateway.url) as through,
    ):
        stream = chat_body(**LOGPROBS, stream=True)
        assert await heard(through, stream) == await heard(straight, stream)
        assert await post(gateway.url + CHAT, chat_body()) == (400, error)


@pytest.mark.parametrize("depth", [200, 600, 900, 1200, 100_000])
@pytest.mark.parametrize("mode", ["enforce", "off"])
@pytest.mark.parametrize("stream", [True, False])
async def test_no_depth_of_an_answer_fails_the_gateway(
    depth: int, mode: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    nest = b"[" * depth + b"]" * depth
    for place, where in ((b"Hel", b'"Hel"'), (b"lo", b'"finish_reason": null')):
        name = b'"finish_reason": null, "x": ' if where != b'"Hel"' else b'"Hel", "x": '
        body = PLAIN.replace(where, name + nest)
        assert place in body
        async with WireServer(body) as server, gateway_for(server) as gateway:
            answer = chat_body(stream=stream, espo={"mode": mode})
            async with aiohttp.ClientSession() as session:
                response = await session.post(gateway.url + CHAT, json=answer)
                text = await response.text()
            assert response.status in (200, 502), text[:200]
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


@pytest.mark.parametrize("status", [201, 204, 400, 402, 418, 500, 529, 599])
@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"words", b"\xff\x00", b"{", b"[1]", b"null", b'{"error": null}', b"<html>"),
        *(
            b'{"error": "\\ud83d"}',
            b'{"error": NaN}',
            b'{"error": ' + b"[" * 900 + b"]" * 900 + b"}",
        ),
        b'{"detail": [{"loc": ["body"]}], "error": {"code": {}}}',
    ],
    ids=lambda body: repr(body)[:30],
)
@pytest.mark.parametrize("mode", ["enforce", "off"])
async def test_no_error_of_a_server_fails_the_gateway(
    mode: str, body: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"Content-Type": "x/y; charset=\u00e9, charset=x", "Retry-After": "-\u00e9"}
    server = WireServer(*([] if status == 204 else [body]), status=status, headers=headers)
    async with server, gateway_for(server) as gateway, aiohttp.ClientSession() as session:
        for stream in (True, False):
            sent = chat_body(stream=stream, espo={"mode": mode})
            response = await session.post(gateway.url + CHAT, json=sent)
            await response.read()
            assert response.status in ((status, 502) if status < 400 else (status,))
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]
