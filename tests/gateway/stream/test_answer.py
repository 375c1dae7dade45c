"""A stream's chunks merged are what a server would have answered without one, usage and all."""

from __future__ import annotations

from typing import Any

import pytest

from espo_gateway.stream.answer import Answer, total_usage

ODD: list[Any] = ["3", {}, [], 1.5, True]


def usage(prompt: int, completion: int, **details: Any) -> dict[str, Any]:
    total = prompt + completion
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total,
        **details,
    }


@pytest.mark.parametrize(
    ("deltas", "content"),
    [
        ([{"reasoning": "so"}, {"reasoning": " on"}], None),
        ([{"reasoning_content": "so on"}, {"content": ""}], None),
        ([{"refusal": "no"}], None),
        ([{"tool_calls": [{"index": 0, "id": "1"}]}], None),
        ([{"reasoning": "so"}, {"content": "yes"}], "yes"),
        ([{"reasoning": ""}], ""),
        ([], ""),
    ],
    ids=str,
)
def test_what_says_something_else_has_no_content_instead_of_an_empty_one(
    deltas: list[dict[str, Any]], content: str | None
) -> None:
    answer = Answer(chat=True)
    for delta in [{"role": "assistant", "content": ""}, *deltas]:
        answer.add({"choices": [{"index": 0, "delta": delta}]})
    assert answer.finished()["message"]["content"] == content


def test_choices_of_one_prompt_share_its_tokens() -> None:
    usages = [(0, usage(3, 5)), (0, usage(3, 2)), (1, usage(4, 1)), (1, usage(4, 9))]
    assert total_usage([*usages]) == usage(7, 17)


def test_details_are_summed_as_what_they_are_details_of() -> None:
    def one(prompt: int, completion: int, cached: int, thought: int) -> dict[str, Any]:
        return usage(
            prompt,
            completion,
            prompt_tokens_details={"cached_tokens": cached, "audio_tokens": None},
            completion_tokens_details={"reasoning_tokens": thought, "by": {"kind": 1}},
        )

    # Of the second choice all is cached, by the first.
    found = total_usage([(0, one(3, 5, 1, 2)), (0, one(3, 2, 3, 1)), (1, one(4, 1, 0, 0))])
    assert found == usage(
        7,
        8,
        prompt_tokens_details={"cached_tokens": 1},
        completion_tokens_details={"reasoning_tokens": 3, "by": {"kind": 3}},
    )


def test_a_detail_that_one_choice_does_not_tell_is_told_of_none() -> None:
    """Nor is it of one that was cut."""
    details = {"completion_tokens_details": {"reasoning_tokens": 1}, "queue_time": 0.5}
    assert total_usage([(0, usage(3, 5, **details)), (0, usage(3, 2))]) == usage(3, 7)
    both = [(0, usage(3, 5, **details)), (0, usage(3, 2, **details))]
    total = total_usage([*both])
    assert total is not None
    assert total["queue_time"] == 1.0


def test_of_one_choice_it_is_as_the_server_tells_it() -> None:
    for told in (None, {}, usage(3, 5, other="x")):
        assert total_usage([(0, told)]) == told


@pytest.mark.parametrize(
    "odd",
    [
        None,
        {},
        {"prompt_tokens": 3},
        {**usage(3, 5), "completion_tokens": None},
        usage(3, 5, list=[]),
    ]
    + [{**usage(3, 5), "prompt_tokens": one} for one in ODD],
    ids=str,
)
def test_a_usage_that_is_none_makes_no_sum(odd: Any) -> None:
    for usages in ([(0, odd), (0, usage(3, 2))], [(0, usage(3, 2)), (1, odd)]):
        found = total_usage(usages)
        assert found is None or found == usage(3 if usages[0][0] == usages[1][0] else 6, 7)
