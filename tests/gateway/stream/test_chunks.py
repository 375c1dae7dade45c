"""Chunks to sampled tokens, and chunks cut down."""

from __future__ import annotations

import math
from typing import Any

import pytest

from espo_gateway.stream.chunks import SampledToken, decode_chunk, sampled_tokens
from espo_gateway.stream.cut import HeldText, keep_tokens, kept_text, strip_logprobs
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


def test_text_held_back_for_stop_strings_belongs_to_a_cut_answer() -> None:
    held = HeldText({"stop": ["END"]})
    lags = [held.before(text, [token]) for text, token in (("", "a"), ("", "b"), ("a", "c"))]
    assert lags == ["", "a", "ab"]
    # As when a length limit ends it: nothing of the kept tokens is lost.
    assert kept_text("a", ["c"], 1, "ab") == "abc"
    assert kept_text("ab", ["c", "d"], 1, "ab") == "abc"


def test_nothing_is_held_back_without_stop_strings() -> None:
    for body in ({}, {"stop": None}, {"stop": "x", "include_stop_str_in_output": True}):
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
