"""What is held, what goes out, and how the last chunk is made."""

from __future__ import annotations

from typing import Any

import pytest

from espo_gateway.errors import UpstreamProtocolError
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.watch import Watch
from espo_gateway.stream.chunks import sampled_tokens
from espo_gateway.stream.outbox import Outbox
from espo_gateway.stream.record import Record
from espo_gateway.stream.request import plan

HEAD = {"id": "c", "object": "text_completion", "created": 1, "model": "m"}


def outbox(*, hide_ids: bool = False, **fields: Any) -> Outbox:
    planned = plan({"model": "m", "prompt": "p", **fields}, chat=False)
    return Outbox(
        planned.asked, planned.singles[0], chat=False, finish_reason="length", hide_ids=hide_ids
    )


def hold(box: Outbox, texts: list[str], end: int, finish: str | None = None) -> None:
    """A chunk of these tokens, the last of which is token `end`."""
    numbers = {
        "tokens": texts,
        "token_logprobs": [-0.5] * len(texts),
        "top_logprobs": [{text: -0.5, "other": -1.0} for text in texts],
    }
    choice = {
        "index": 7,
        "text": "".join(texts),
        "logprobs": numbers,
        "finish_reason": finish,
        "token_ids": [1] * len(texts),
        "prompt_token_ids": [1, 2],
    }
    box.hold({**HEAD, "choices": [choice]}, choice, sampled_tokens(choice), end)


def record(*, stopped: bool) -> Record:
    watch = Watch(Gate(), 0)
    told: dict[str, Any] = dict.fromkeys(("reason", "probes", "trace"))
    return Record.of(Gate(), watch, mode="enforce", audited=False, stopped=stopped, **told)


def texts(box: Outbox) -> list[str]:
    return [output["choices"][0]["text"] for output in box.ready if isinstance(output, dict)]


def test_what_a_critic_could_still_cut_is_held() -> None:
    box = outbox()
    for end in (1, 2, 3):
        hold(box, ["abc"[end - 1]], end)
    box.release(None, 3)
    assert texts(box) == ["a", "b"]
    box.release(None, None)
    assert texts(box) == ["a", "b", "c"]
    assert not box.held


def test_a_cut_ends_the_chunk_it_falls_in_and_drops_the_rest() -> None:
    box = outbox(logprobs=1)
    hold(box, ["a"], 1)
    hold(box, ["b", "c", "d"], 4)
    hold(box, ["e"], 5)
    box.release(2, 2)
    assert texts(box) == ["a"]
    assert not box.held
    assert box.finish_reason == "length"
    choice = box.finish(record(stopped=True), None)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        "b",
        "length",
        "espo",
    )
    assert choice["logprobs"]["token_logprobs"] == [-0.5]
    assert choice["espo"]["stopped"] is True


def test_a_client_gets_what_it_asked_for() -> None:
    box = outbox(hide_ids=True)
    hold(box, ["a"], 1)
    box.release(None, None)
    [chunk] = box.ready
    assert chunk == {
        **HEAD,
        "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}],
    }
    assert box.head == HEAD


@pytest.mark.parametrize("asked", [True, False])
def test_the_servers_tail_goes_where_the_client_looks(asked: bool) -> None:
    usage = {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1}
    box = outbox(stream=True, stream_options={"include_usage": asked})
    hold(box, ["a"], 1, "stop")
    assert box.complete
    box.release(None, None)
    box.tail = {**HEAD, "choices": [], "usage": usage, "metrics": {"a": 1}}
    last = box.finish(record(stopped=False), usage)
    assert ("metrics" in last) is not asked
    assert "usage" not in last
    assert box.usage_chunk(usage) == box.tail


def test_the_usage_of_a_cut_choice_is_on_its_last_chunk_where_each_has_one() -> None:
    usage = {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1}
    options = {"include_usage": True, "continuous_usage_stats": True}
    box = outbox(stream=True, stream_options=options)
    hold(box, ["a", "b"], 2)
    box.release(1, None)
    assert box.finish(record(stopped=True), usage)["usage"] == usage


def test_a_stream_without_an_end_is_the_upstreams_error() -> None:
    box = outbox()
    hold(box, ["a"], 1)
    box.release(None, None)
    assert box.finish_reason is None
    with pytest.raises(UpstreamProtocolError, match="ended before its choice did"):
        box.finish(record(stopped=False), None)
