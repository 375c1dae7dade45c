"""Whatever a client sends, the gateway does not fail: a bad request is the server's to refuse."""

from __future__ import annotations

import logging
import random
from itertools import product
from typing import Any

import aiohttp
import pytest

from tests.helpers.gateway import CHAT, COMPLETIONS, chat_body, completion_body, gateway_for
from tests.helpers.wire import DONE, WireServer, events

CHOICE = {"index": 0, "text": "a", "delta": {"content": "a"}, "finish_reason": "stop"}
ANSWER = events({"id": "c", "object": "x", "created": 1, "model": "m", "choices": [CHOICE]}) + DONE

ODD: list[Any] = [5, -1, 1.5, True, "", "x", [], [None], [5, None, "x"], [[]], {}, {"a": 1}]
FIELDS = [
    *("model", "messages", "prompt", "suffix", "stop", "n", "best_of", "seed", "echo", "user"),
    *("logprobs", "top_logprobs", "prompt_logprobs", "logprob_token_ids", "max_tokens"),
    *("stream", "stream_options", "stream_interval", "tools", "tool_choice", "request_id"),
    *("use_beam_search", "include_stop_str_in_output", "include_reasoning", "return_token_ids"),
    *("truncate_prompt_tokens", "prompt_cache_key", "prompt_embeds", "kv_transfer_params"),
]


@pytest.mark.parametrize(("path", "affinity"), [(CHAT, "session"), (COMPLETIONS, "prefix")])
@pytest.mark.parametrize("field", FIELDS)
async def test_no_value_of_a_field_fails_the_gateway(
    field: str, path: str, affinity: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make = chat_body if path == CHAT else completion_body
    gate = b'{"rule": "regret-only"}'
    async with (
        WireServer(ANSWER) as server,
        gateway_for(server, affinity=affinity, gate=gate) as gateway,
        aiohttp.ClientSession() as session,
    ):
        for value, stream in product(ODD, (False, True)):
            body = make(stream=stream) | {field: value}
            async with session.post(gateway.url + path, json=body) as response:
                text = await response.text()
                # Nothing is wrong with the answer, so whatever is refused is the request.
                assert response.status in (200, 400), (value, text)
                assert response.status == 200 or field in text
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


async def test_nor_do_several() -> None:
    """Of some hundred requests, always the same."""
    draw = random.Random(14)
    async with (
        WireServer(ANSWER) as server,
        gateway_for(server, affinity="prefix") as gateway,
        aiohttp.ClientSession() as session,
    ):
        for _ in range(300):
            fields = {draw.choice(FIELDS): draw.choice(ODD) for _ in range(draw.randint(2, 6))}
            for path, make in ((CHAT, chat_body), (COMPLETIONS, completion_body)):
                async with session.post(gateway.url + path, json=make() | fields) as response:
                    assert response.status in (200, 400), (fields, await response.text())
