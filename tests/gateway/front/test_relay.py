"""The bodies of one client's upstream requests: what is sent, and what they share."""

from __future__ import annotations

import json
from typing import Any

import pytest

from espo_gateway.front.relay import Bodies
from espo_gateway.stream.request import plan
from espo_gateway.testing import FakeServer
from tests.helpers.gateway import COMPLETIONS, FAILING, completion_body, gateway_for, post


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 5},
        {"n": 5, "seed": 3},
        {"n": 3, "request_id": "r"},
        {"n": 2, "seed": 1, "request_id": "r", "prompt": ["a", "b", "a"]},
        {"prompt": [[1, 2], [3]]},
        {"n": 2, "seed": None},
    ],
)
def test_bodies_of_one_prompt_share_all_but_what_tells_them_apart(fields: dict[str, Any]) -> None:
    planned = plan(completion_body(**fields), chat=False)
    bodies = Bodies()
    shared: dict[int, set[int]] = {}
    for single in planned.singles:
        pieces = bodies.encoded(single, dict(single.body))
        assert json.loads(b"".join(pieces)) == single.body
        last = pieces[-1]
        whole = last.obj if isinstance(last, memoryview) else last
        shared.setdefault(single.prompt, set()).add(id(whole))
        assert sum(map(len, pieces[:-1])) < 100
    assert [len(ids) for ids in shared.values()] == [1] * len(shared)


@pytest.mark.parametrize("size", [10, 2**16, 2**22])
async def test_a_body_of_any_size_arrives_whole(size: int) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        body = completion_body(prompt="x" * size, n=3, seed=7)
        assert (await post(gateway.url + COMPLETIONS, body))[0] == 200
        assert sorted(sent["seed"] for sent in server.bodies) == [7, 8, 9]
        assert {sent["prompt"] for sent in server.bodies} == {body["prompt"]}
