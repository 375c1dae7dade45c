"""What a request asks for, what goes upstream for it, and which no monitor can follow."""

from __future__ import annotations

from typing import Any

import pytest

from espo_gateway.stream.request import plan, upstream_body
from espo_gateway.stream.tokens import plan_tokens

CHAT: dict[str, Any] = {"model": "m", "messages": []}
TEXT: dict[str, Any] = {"model": "m", "prompt": "p"}


def sent(body: dict[str, Any], *, chat: bool, alternatives: int = 1) -> list[dict[str, Any]]:
    return [
        upstream_body(one, chat=chat, token_ids=False, alternatives=alternatives)
        for one in plan(body, chat=chat).singles
    ]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        # vLLM's
        {"logprob_token_ids": [5, 6]},
        {"prompt_logprob_token_ids": [[5], [6]]},
        {"logprobs_mode": "processed_logits"},
        {"return_logprobs": "all"},
        # SGLang's
        {"return_logprob": True},
        {"top_logprobs_num": 5},
        {"token_ids_logprob": [5]},
        {"logprob_start_len": -1},
        {"return_text_in_logprobs": True},
        # llama.cpp's
        {"n_probs": 5},
        {"post_sampling_probs": True},
        # others'
        {"log_probs": True},
        {"logProbs": 3},
        {"include_logprobs_of": "prompt"},
        {"top_k_logprobs": 3},
    ],
    ids=str,
)
def test_what_changes_the_meaning_of_logprobs_is_not_monitored(
    fields: dict[str, Any], chat: bool
) -> None:
    body = {**(CHAT if chat else TEXT), "logprobs": 1, **fields}
    planned = plan(body, chat=chat)
    assert planned.unmonitored is not None
    assert next(iter(fields)) in planned.unmonitored
    # The counters' label, which must not be the client's to choose.
    assert planned.unmonitored.split(":")[0] == "a field about logprobs"
    assert planned.body == body


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"logprob_token_ids": None},
        {"logprob_token_ids": []},
        {"return_logprob": False},
        {"logprobs": 3},
        {"logprobs": True, "top_logprobs": 3},
        {"logit_bias": {"5": 1}},
        {"xtc_probability": 0.5},
        {"return_token_ids": True, "return_tokens_as_token_ids": True},
        {"best_of": 1},
        {"best_of": 2, "n": 2},
        {"stream_interval": 5},
    ],
    ids=str,
)
def test_what_leaves_logprobs_as_they_are_is_monitored(fields: dict[str, Any], chat: bool) -> None:
    assert plan({**(CHAT if chat else TEXT), **fields}, chat=chat).unmonitored is None


@pytest.mark.parametrize("asked", ["x", {}, [], 2.5, ""], ids=str)
def test_what_is_no_number_is_the_servers_to_refuse(asked: Any) -> None:
    assert sent({**TEXT, "logprobs": asked}, chat=False)[0]["logprobs"] == asked
    body = {**CHAT, "logprobs": True, "top_logprobs": asked}
    assert sent(body, chat=True)[0]["top_logprobs"] == asked


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_tokens_are_not_held_back_for_a_client_that_would_not_notice(
    stream: bool, chat: bool
) -> None:
    body = {**(CHAT if chat else TEXT), "stream": stream, "stream_interval": 100}
    for one in (body, {**body, "n": 2}):
        for single in sent(one, chat=chat):
            assert ("stream_interval" in single) is stream


def test_continuous_usage_is_nothing_by_itself() -> None:
    """As vLLM reads it."""
    for include in (None, False, True):
        options = {"include_usage": include, "continuous_usage_stats": True}
        asked = plan({**TEXT, "stream": True, "stream_options": options}, chat=False).asked
        assert asked.continuous_usage is asked.usage is bool(include)


@pytest.mark.parametrize("n", [1, 2])
def test_the_best_of_as_many_as_are_wanted_is_each_of_them(n: int) -> None:
    for single in sent({**TEXT, "n": n, "best_of": n}, chat=False):
        assert (single["n"], single["best_of"]) == (1, 1)
    assert "best_of" in (plan({**TEXT, "n": n, "best_of": n + 1}, chat=False).unmonitored or "")


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [
        (7, [7, 8, 9]),
        (None, [None] * 3),
        # No seed, so that no choice may have one.
        (-1, [-1, -1, -1]),
        # A child's -1 is none to vLLM's engine, too.
        (-2, [-2, -1, 0]),
        # What is sent must be a seed, and 2**63 and -2**63 are the same one.
        (2**63 - 2, [2**63 - 2, 2**63 - 1, -(2**63)]),
        # The server's to refuse.
        (2**63, [2**63, 2**63 + 1, 2**63 + 2]),
    ],
)
def test_choices_are_seeded_as_vllm_seeds_them(seed: int | None, seeds: list[int | None]) -> None:
    for body, chat in ((CHAT, True), (TEXT, False)):
        assert [one["seed"] for one in sent({**body, "n": 3, "seed": seed}, chat=chat)] == seeds
    tokens = plan_tokens({"token_ids": [1], "sampling_params": {"n": 3, "seed": seed}})
    assert [one.body["sampling_params"]["seed"] for one in tokens.singles] == seeds


@pytest.mark.parametrize(
    ("fields", "monitored"),
    [
        ({"tools": [{"type": "function"}]}, False),
        ({"tools": [{"type": "function"}], "tool_choice": "auto"}, False),
        ({"tools": [{"type": "function"}], "tool_choice": "required"}, False),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, True),
        ({"tools": [{"type": "function"}], "stream": True}, True),
        ({"tools": []}, True),
        ({"tools": None}, True),
    ],
    ids=str,
)
def test_a_call_is_read_as_the_client_asked_for_it(fields: dict[str, Any], monitored: bool) -> None:
    """Servers read calls out of a stream in another way than out of a whole answer."""
    planned = plan({**CHAT, **fields}, chat=True)
    assert (planned.unmonitored is None) is monitored
    assert plan({**TEXT, **fields}, chat=False).unmonitored is None
