"""Chunks to sampled tokens, and chunks cut down."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from espo_gateway.stream.chunks import SampledToken, decode_chunk, sampled_tokens
from espo_gateway.stream.cut import HeldText, cut_text, keep_tokens, kept_text, strip_logprobs
from tests.gateway.stop.reference import surrogate_regret


def completion(tokens: list[str], logprobs: list[Any], tops: list[Any]) -> dict[str, Any]:
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": []}


def entry(token: str, logprob: Any, *tops: Any) -> dict[str, Any]:
    alternatives = [{"token": "?", "logprob": top, "bytes": None} for top in tops]
    return {"token": token, "logprob": logprob, "bytes": None, "top_logprobs": alternatives}


def test_completion_chunk_with_merged_tokens() -> None:
    logprobs = completion(
        ["a", "", "c"],
        [-1.0, -2.0, -0.1],
        [{"a": -1.0, "x": -0.5}, {"": -2.0, "y": -0.2}, {"c": -0.1}],
    )
    choice = {"text": "ac", "logprobs": logprobs, "token_ids": [7, 8, 9]}
    assert sampled_tokens(choice) == [
        SampledToken(7, "a", -1.0, -0.5),
        SampledToken(8, "", -2.0, -0.2),
        SampledToken(9, "c", -0.1, -0.1),
    ]


def test_chat_chunk_with_merged_tokens() -> None:
    content = [entry("a", -1.0, -1.0, -0.5), entry("b", -0.1, -0.1, -3.0)]
    choice = {"delta": {"content": "ab"}, "logprobs": {"content": content}}
    assert sampled_tokens(choice) == [
        SampledToken(None, "a", -1.0, -0.5),
        SampledToken(None, "b", -0.1, -0.1),
    ]


def test_the_sampled_token_may_be_the_largest_though_not_listed() -> None:
    assert (
        sampled_tokens({"logprobs": {"content": [entry("a", -0.1, -2.0)]}})[0].max_logprob == -0.1
    )


@pytest.mark.parametrize("choice", [{}, {"logprobs": None}, {"logprobs": {"content": None}}])
def test_no_logprobs(choice: dict[str, Any]) -> None:
    assert sampled_tokens(choice) == []


@pytest.mark.parametrize(
    ("logprob", "tops"),
    [
        (None, [-0.1]),
        (math.nan, [-0.1]),
        (-9999.0, [-0.1]),
        (-5.0, []),
        (-5.0, [None]),
        (-5.0, [math.nan]),
        (-5.0, [-6.0, math.nan]),
        (-5.0, [math.inf]),
        (-math.inf, [-0.1]),
    ],
)
def test_bad_numbers_carry_no_regret(logprob: float | None, tops: list[float | None]) -> None:
    named = {str(i): top for i, top in enumerate(tops)}
    for choice in (
        {"logprobs": {"content": [entry("a", logprob, *tops)]}},
        {"logprobs": completion(["a"], [logprob], [named])},
    ):
        (token,) = sampled_tokens(choice)
        assert surrogate_regret(token.logprob, token.max_logprob) is None


@pytest.mark.parametrize(
    ("logprob", "tops", "largest"),
    [
        (-3.2, [-3.2, -9999.0], None),  # vLLM's V1 worker, beside a request that lists tokens
        (-3.2, [-9999.0], None),
        (-3.2, [-3.2, -0.1, -9999.0], -0.1),
        (-0.7, [-0.7, -0.71, -9999.0], -0.7),
        (-0.2, [-0.2, -9999.0], -0.2),  # nothing is likelier than what has more than half of all
        (0.0, [0.0, -9999.0], 0.0),  # top_k = 1, where the server tells what it samples from
        (-3.2, [-3.2], -3.2),
    ],
)
def test_a_placeholder_beside_the_sampled_token_alone_tells_nothing(
    logprob: float, tops: list[float], largest: float | None
) -> None:
    named = {str(i): top for i, top in enumerate(tops)}
    for choice in (
        {"logprobs": {"content": [entry("a", logprob, *tops)]}},
        {"logprobs": completion(["a"], [logprob], [named])},
    ):
        assert sampled_tokens(choice)[0].max_logprob == largest


def test_top_logprobs_missing_altogether_is_no_evidence() -> None:
    for top in (None, [None]):
        logprobs = {"tokens": ["a"], "token_logprobs": [-4.0], "top_logprobs": top}
        assert sampled_tokens({"logprobs": logprobs}) == [SampledToken(None, "a", -4.0, None)]


@pytest.mark.parametrize(
    "logprobs",
    [
        7,
        [1],
        {"content": 7},
        {"content": [{}]},
        {"token_logprobs": ["x"], "top_logprobs": [{"a": 1}]},
    ],
)
def test_malformed_logprobs(logprobs: Any) -> None:
    with pytest.raises(ValueError, match="malformed logprobs"):
        sampled_tokens({"logprobs": logprobs})


def test_python_json_is_understood() -> None:
    chunk = decode_chunk(b'{"a": NaN, "b": -Infinity, "c": 1}')
    assert math.isnan(chunk["a"])
    assert chunk["b"] == -math.inf


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'"\\ud83d"', "\ufffd"),
        (b'"\\ude00 x"', "\ufffd x"),
        (b'"\\ud83d\\ud83d\\ude00"', "\ufffd\U0001f600"),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'"\\\\ud83d"', "\\ud83d"),
    ],
)
def test_half_a_pair_is_mended(data: bytes, text: str) -> None:
    """No UTF-8 can say it, so no client could be told."""
    for nan in (b"1", b"NaN"):
        chunk = decode_chunk(b'{"a": ' + data + b', "b": ' + nan + b", " + data + b": 1}")
        assert [*chunk] == ["a", "b", text]
        assert chunk["a"] == text


@pytest.mark.parametrize("data", [b'{"a":' * 100_000, b"[" * 100_000], ids=["objects", "lists"])
def test_what_is_nested_too_deeply_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="deep"):
        decode_chunk(data)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"null", b'"x"'])
def test_anything_but_an_object_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        decode_chunk(data)


@pytest.mark.parametrize(
    ("text", "tokens", "kept", "expected"),
    [
        ("abc", ["a", "b", "c"], 2, "ab"),
        ("abc", ["a", "b", "c"], 3, "abc"),
        ("é!", ["", "é", "!"], 1, ""),
        ("é!", ["", "é", "!"], 2, "é"),
        ("ab", ["a", "<|im_end|>", "b"], 2, "a"),  # special tokens are left out of the text
        ("ab", ["a", "b", "<|im_end|>"], 3, "ab"),
        (" Hello world", ["Hello", "world"], 1, " Hello"),  # decoded alone, the space is lost
        ("abc", ["token_id:1", "token_id:2"], 1, "abc"),  # cannot be told apart
    ],
)
def test_kept_text(text: str, tokens: list[str], kept: int, expected: str) -> None:
    assert kept_text(text, tokens, kept, None) == expected


#: A delta of the tokens a, b and c, and what a cut after b leaves of it.
CUT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "content": ({"content": "abc"}, {"content": "ab"}),
    "both reasonings": (
        {"reasoning": "abc", "reasoning_content": "abc", "content": None},
        {"reasoning": "ab", "reasoning_content": "ab", "content": None},
    ),
    "content under a second name": (
        {"content": "abc", "text": "abc"},
        {"content": "ab", "text": "ab"},
    ),
    "content under an unknown name": ({"content": "abc", "x": "abc"}, {"content": "ab", "x": "ab"}),
    "content under every name": (
        dict.fromkeys(["content", "reasoning", "reasoning_content"], "abc"),
        dict.fromkeys(["content", "reasoning", "reasoning_content"], "ab"),
    ),
    "reasoning that turns to content": (
        {"content": "bc", "reasoning": "a"},
        {"content": "b", "reasoning": "a"},
    ),
    "a cut in the reasoning": (
        {"content": "c", "reasoning": "ab"},
        {"content": "", "reasoning": "ab"},
    ),
    "all three in turn": (
        {"content": "c", "reasoning": "ab", "reasoning_content": "ab"},
        {"content": "", "reasoning": "ab", "reasoning_content": "ab"},
    ),
    "details": (
        {"reasoning": "abc", "reasoning_details": [{"type": "reasoning.text", "text": "abc"}]},
        {"reasoning": "ab", "reasoning_details": [{"type": "reasoning.text", "text": "ab"}]},
    ),
    "parts": (
        {"content": [{"type": "text", "text": "abc"}]},
        {"content": [{"type": "text", "text": "ab"}]},
    ),
    "parts of both kinds": (
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "a"}]},
                {"type": "text", "text": "bc"},
            ]
        },
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "a"}]},
                {"type": "text", "text": "b"},
            ]
        },
    ),
    "thinking": ({"thinking": "abc"}, {"thinking": "ab"}),
    "a refusal": ({"refusal": "abc"}, {"refusal": "ab"}),
    "beside what is no text": (
        {"role": "abc", "content": "abc", "n": 1, "list": [1, None]},
        {"role": "abc", "content": "ab", "n": 1, "list": [1, None]},
    ),
    "a call": (
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
    ),
    "text that no tokens make up": ({"content": "xyz"}, {"content": "xyz"}),
}


@pytest.mark.parametrize("shape", CUT)
def test_every_text_of_a_chunk_is_cut(shape: str) -> None:
    delta, expected = copy.deepcopy(CUT[shape])
    choice = {"index": 0, "delta": delta}
    cut_text({"choices": [choice]}, choice, ["a", "b", "c"], 2, None, chat=True)
    assert choice["delta"] == expected


def test_a_text_is_cut_wherever_a_chunk_has_it() -> None:
    choice = {"text": "abc", "content": "abc", "name": "abc"}
    chunk = {"model": "abc", "choices": [choice], "__verbose": {"content": "abc", "n": [1]}}
    cut_text(chunk, choice, ["a", "b", "c"], 1, None, chat=False)
    assert choice == {"text": "a", "content": "a", "name": "abc"}
    assert chunk["__verbose"] == {"content": "a", "n": [1]}
    assert chunk["model"] == "abc"


@pytest.mark.parametrize(
    "delta", [None, {}, {"content": ""}, {"reasoning": "", "role": "a"}], ids=str
)
def test_what_was_held_back_goes_where_text_is(delta: Any) -> None:
    choice = {"delta": delta}
    cut_text({"choices": [choice]}, choice, ["b", "c"], 1, "a", chat=True)
    name = "reasoning" if delta and "reasoning" in delta else "content"
    assert choice["delta"] == {**(delta or {}), name: "ab"}


def test_text_held_back_for_stop_strings_belongs_to_a_cut_answer() -> None:
    held = HeldText({"stop": ["END"]})
    lags = [held.before(text, [token]) for text, token in (("", "a"), ("", "b"), ("a", "c"))]
    assert lags == ["", "a", "ab"]
    # As when a length limit ends it: nothing of the kept tokens is lost.
    assert kept_text("a", ["c"], 1, "ab") == "abc"
    assert kept_text("ab", ["c", "d"], 1, "ab") == "abc"


def test_nothing_is_held_back_without_stop_strings() -> None:
    bodies: tuple[dict[str, Any], ...] = ({}, {"stop": "x", "include_stop_str_in_output": True})
    bad = ({"stop": stop} for stop in (None, 5, True, 1.5, {}, {"a": "b"}, [], [5, None], ""))
    for body in (*bodies, *bad):
        assert HeldText(body).before("", ["a"]) is None


def test_skipped_special_tokens_are_no_held_back_text() -> None:
    held = HeldText({"stop": "END"})
    held.before("", ["<|a_long_special_token|>"])
    assert held.before("", ["b"]) == ""


def test_keep_tokens_cuts_every_list() -> None:
    choice: dict[str, Any] = {
        "token_ids": [1, 2, 3],
        "logprobs": completion(["a", "b", "c"], [-1.0, -2.0, -3.0], [{}, {}, {}]),
    }
    keep_tokens(choice, 2)
    assert choice["token_ids"] == [1, 2]
    assert choice["logprobs"]["tokens"] == ["a", "b"]
    assert choice["logprobs"]["top_logprobs"] == [{}, {}]


def test_strip_logprobs_leaves_what_was_asked_for() -> None:
    chat = {"logprobs": {"content": [entry("a", -1.0, -1.0, -0.5)]}}
    strip_logprobs(chat, 2)
    assert len(chat["logprobs"]["content"][0]["top_logprobs"]) == 2
    strip_logprobs(chat, 0)
    assert chat["logprobs"]["content"][0]["top_logprobs"] == []
    # A likelier alternative of the same text has taken the sampled token's place.
    text = {"logprobs": completion(["a"], [-1.0], [{"a": -0.5}])}
    strip_logprobs(text, 1)
    assert text["logprobs"]["top_logprobs"] == [{"a": -0.5}]
    strip_logprobs(text, 0)
    assert text["logprobs"]["top_logprobs"] == [{"a": -1.0}]
