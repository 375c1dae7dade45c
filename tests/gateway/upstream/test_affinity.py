"""Which server a request goes to."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espo_gateway.upstream.affinity import (
    LOAD_FACTOR,
    LOAD_SLACK,
    PREFIX_CHARACTERS,
    PREFIX_TOKENS,
    Affinity,
    affinity_key,
    choose,
    passed_key,
)


@dataclass
class Server:
    url: str
    in_flight: int = 0


keys = st.binary(min_size=1, max_size=16)
idle = st.integers(1, 8).map(lambda n: [Server(f"http://server-{i}:8000") for i in range(n)])
loaded = st.lists(st.integers(0, 50), min_size=1, max_size=8).map(
    lambda loads: [Server(f"http://server-{i}:8000", load) for i, load in enumerate(loads)]
)


@given(idle, keys)
def test_a_key_keeps_its_server_whatever_the_order(servers: list[Server], key: bytes) -> None:
    assert choose(servers, key) == choose(servers[::-1], key)


@given(idle.filter(lambda servers: len(servers) > 1), keys, st.data())
def test_a_server_that_goes_moves_only_its_own_keys(
    servers: list[Server], key: bytes, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(servers))
    before = choose(servers, key)
    after = choose([server for server in servers if server != gone], key)
    assert after == before or before == gone


@given(loaded, keys)
def test_no_key_overloads_a_server(servers: list[Server], key: bytes) -> None:
    mean = sum(server.in_flight for server in servers) / len(servers)
    assert choose(servers, key).in_flight <= LOAD_FACTOR * mean + LOAD_SLACK


@given(loaded)
def test_without_a_key_the_least_loaded(servers: list[Server]) -> None:
    assert choose(servers, None).in_flight == min(server.in_flight for server in servers)


def test_keys_spread_over_the_servers_and_spill_to_the_same_next_one() -> None:
    servers = [Server(f"http://server-{i}:8000") for i in range(4)]
    chosen = [choose(servers, bytes([i])) for i in range(256)]
    assert min(chosen.count(server) for server in servers) > 256 / 4 / 2
    busy = [replace(servers[0], in_flight=9), *servers[1:]]
    moved = [i for i in range(256) if chosen[i] == servers[0]]
    assert all(choose(busy, bytes([i])) == choose(servers[1:], bytes([i])) for i in moved)
    kept = [i for i in range(256) if chosen[i] != servers[0]]
    assert all(choose(busy, bytes([i])) == chosen[i] for i in kept)


def chat(*messages: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


LONG = "x" * PREFIX_CHARACTERS
SESSIONS: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({"X-Session-ID": "a"}, {}),
    ({"x-session-id": "a"}, {"user": "b", "prompt_cache_key": "c"}),
    ({}, {"user": "a"}),
    ({}, {"prompt_cache_key": "a", "user": "b"}),
]


def test_a_session_is_named_by_header_or_body() -> None:
    assert len({affinity_key("session", headers, body) for headers, body in SESSIONS}) == 1
    assert affinity_key("session", {"X-Session-ID": "b"}, {}) != affinity_key(
        "session", *SESSIONS[0]
    )
    assert affinity_key("session", {}, {"prompt": "p", "user": None}) is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"prompt": LONG + "a"}, {"prompt": LONG + "b"}, True),
        ({"prompt": "a" + LONG}, {"prompt": "b" + LONG}, False),
        ({"prompt": [*range(PREFIX_TOKENS), 1]}, {"prompt": [*range(PREFIX_TOKENS), 2]}, True),
        ({"prompt": [1, 2]}, {"prompt": [1, 3]}, False),
        ({"prompt": ["p", "q"]}, {"prompt": "p"}, True),
        ({"prompt": [[1, 2], [3]]}, {"prompt": [1, 2]}, True),
        (chat(("user", "p")), chat(("user", "p"), ("assistant", "a"), ("user", "q")), True),
        (chat(("system", "s"), ("user", "p")), chat(("system", "s"), ("user", "q")), False),
        (chat(("system", LONG), ("user", "p")), chat(("system", LONG), ("user", "q")), True),
    ],
)
def test_what_prompts_begin_with(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    keys = [affinity_key("prefix", {}, body) for body in (one, other)]
    assert None not in keys
    assert (keys[0] == keys[1]) == same
    assert affinity_key("none", {"X-Session-ID": "a"}, one) is None


def test_a_request_that_is_passed_through_has_the_same_key() -> None:
    kinds: tuple[Affinity, ...] = ("session", "prefix")
    for kind in kinds:
        for body in ({"prompt": "p", "user": "a"}, {**chat(("user", "p")), "user": "a"}):
            data = json.dumps(body).encode()
            assert passed_key(kind, {}, data) == affinity_key(kind, {}, body) is not None
    assert passed_key("none", {"X-Session-ID": "a"}, b"{}") is None
    for odd in (None, b"", b"no JSON", b"[1]", b"\xff", b"[" * 100_000):
        assert passed_key("prefix", {}, odd) is None
        assert passed_key("session", {"X-Session-ID": "a"}, odd) is not None


def test_other_endpoints_have_their_prompts_elsewhere() -> None:
    prompts = ("p", ["p", "q"], [1, 2], chat(("user", "p"))["messages"])
    keys = {passed_key("prefix", {}, json.dumps({"input": p}).encode()) for p in prompts}
    assert keys == {
        affinity_key("prefix", {}, body)
        for body in ({"prompt": "p"}, {"prompt": [1, 2]}, chat(("user", "p")))
    }


#: A value of JSON, seldom the right one.
PARTS: list[Any] = [None, True, 3, 1.5, "", "p", LONG * 2, [], {}, {"role": "user"}, {"role": 3}]
odd = st.sampled_from(PARTS) | st.lists(st.sampled_from(PARTS), max_size=3)


@given(
    st.sampled_from(["session", "prefix"]),
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("prompt", "input", "messages", "user", "prompt_cache_key"), odd)
    ),
)
def test_no_body_is_too_odd(kind: Any, body: dict[str, Any]) -> None:
    """What is wrong with it is for the server to say."""
    key = affinity_key(kind, {}, body)
    assert key is None or len(key) == 16
