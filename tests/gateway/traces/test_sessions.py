"""Sessions: their turns stand together in a recording, and may be watched as one rollout."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from espo_gateway.stop.gate_json import gate_from_json
from espo_gateway.stop.replay import first_stops
from espo_gateway.testing import FakeServer, Script
from espo_gateway.traces import sessions
from espo_gateway.traces.reader import Traces, read_outcomes, read_traces
from tests.helpers.gateway import (
    BAD,
    CHAT,
    COMPLETIONS,
    FAILING,
    GATE,
    GOOD,
    advance,
    chat_body,
    completion_body,
    gateway_for,
    get_text,
    until_asked,
)

#: z is 0.79 at its end, and the gate stops above 1.
WORSE = Script([GOOD] * 6 + [BAD])
#: By itself it goes on; after the other it is stopped at its first token.
BAD_FIRST = Script([BAD] + [GOOD] * 9)


async def ask(
    url: str, session: str | None, path: str = COMPLETIONS, **fields: Any
) -> dict[str, Any]:
    body = chat_body(**fields) if path == CHAT else completion_body(**fields)
    headers = {} if session is None else {"X-Session-ID": session}
    async with (
        aiohttp.ClientSession() as client,
        client.post(url + path, json=body, headers=headers) as response,
    ):
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


async def ask_two_at_once(server: FakeServer, url: str) -> None:
    """Two turns of one session, of 4 tokens and of 1; the second ends first."""
    server.queue += [Script([GOOD] * 4), Script([BAD])]
    first = asyncio.create_task(ask(url, "a"))
    await until_asked(server, 1)
    second = asyncio.create_task(ask(url, "a"))
    await until_asked(server, 2)
    await advance(server, 2)
    await second
    await advance(server, 3)
    await first


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def turns(path: Path) -> list[tuple[str | None, int | None, int]]:
    return [(line.get("session"), line.get("turn"), line["index"]) for line in lines(path)]


def traces(path: Path) -> Traces:
    [found] = read_traces([path], outcome="correct", known=None)
    return found


# -- the file --------------------------------------------------------------------------------------


async def test_the_turns_of_a_session_stand_together(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    async with FakeServer(WORSE) as server, gateway_for(server, record=path) as gateway:
        for session in ("a", "b", "a", None, "b", "a"):
            await ask(gateway.url, session)
        await ask(gateway.url, "b", CHAT, n=2)
    assert turns(path) == [
        (None, None, 0),  # whoever has no session does not wait
        *[("b", 1, 0), ("b", 2, 0), ("b", 3, 0), ("b", 3, 1)],
        *[("a", 1, 0), ("a", 2, 0), ("a", 3, 0)],
    ] or turns(path) == [
        (None, None, 0),
        *[("a", 1, 0), ("a", 2, 0), ("a", 3, 0)],
        *[("b", 1, 0), ("b", 2, 0), ("b", 3, 0), ("b", 3, 1)],
    ]
    assert all("carried" not in line and "token_ids" not in line for line in lines(path))


async def test_turns_stand_in_the_order_they_began(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    async with FakeServer(WORSE, gated=True) as server, gateway_for(server, record=path) as gateway:
        await ask_two_at_once(server, gateway.url)
    assert [(line["turn"], len(line["logprobs"])) for line in lines(path)] == [(1, 4), (2, 1)]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("asked", [False, True])
async def test_token_ids_are_recorded_where_that_is_wanted(
    tmp_path: Path, path: str, asked: bool
) -> None:
    wanted, plain = tmp_path / "ids.jsonl", tmp_path / "plain.jsonl"
    answers = []
    for file, wish in ((wanted, "sessions"), (plain, "none")):
        async with (
            FakeServer(FAILING) as server,
            gateway_for(server, record=file, record_ids=wish) as gateway,
        ):
            for session in ("a", None):
                fields = {"return_token_ids": True} if asked else {}
                answers.append(await ask(gateway.url, session, path, **fields))
    [other, of_session] = lines(wanted)
    assert of_session["token_ids"] == [1, 1, 1, 1, 1, 1, 2, 2]  # up to the cut
    assert len(of_session["prompt_token_ids"]) == of_session["prompt_tokens"]
    assert not [line for line in (other, *lines(plain)) if "token_ids" in line]
    # The client gets what it would get without.
    assert ["token_ids" in answer["choices"][0] for answer in answers] == [asked] * 4


@pytest.mark.parametrize("told", [["1"], [None], [1.5], [2**70], [[1]], [True], None], ids=str)
async def test_ids_that_are_none_cost_no_answer(tmp_path: Path, told: object) -> None:
    def rewrite(chunk: dict[str, Any]) -> dict[str, Any]:
        for choice in chunk["choices"]:
            choice["token_ids"] = choice["prompt_token_ids"] = told
        return chunk

    path = tmp_path / "t.jsonl"
    script = dataclasses.replace(WORSE, rewrite=rewrite)
    async with (
        FakeServer(script) as server,
        gateway_for(server, record=path, record_ids="sessions") as gateway,
    ):
        answer = await ask(gateway.url, "a")
    assert answer["choices"][0]["finish_reason"] == "stop"
    [line] = lines(path)
    assert len(line["logprobs"]) == 7
    assert all(type(token) is int for token in line["token_ids"] + line["prompt_token_ids"])


@pytest.mark.parametrize("name", ["x" * 129, "x" * 8000, "with space", "\xe9\xff", '"}', "\t|"])
async def test_an_odd_name_is_told_by_a_short_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / "t.jsonl"
    async with FakeServer(WORSE) as server, gateway_for(server, record=path) as gateway:
        for session in (name, name, "plain", name[:-1] + "!"):
            await ask(gateway.url, session)
    found = lines(path)
    assert all(1 <= len(line["session"]) <= 128 for line in found)
    assert sorted(line["turn"] for line in found) == [1, 1, 1, 2]
    assert "plain" in {line["session"] for line in found}
    assert len({line["session"] for line in found}) == 3


@pytest.mark.parametrize(
    ("limit", "most"), [("MAX_SESSIONS", 2), ("MAX_NUMBERS", 2 * 3 * 14)], ids=str
)
async def test_the_session_used_least_recently_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    monkeypatch.setattr(sessions, limit, most)
    path = tmp_path / "t.jsonl"
    async with FakeServer(WORSE) as server, gateway_for(server, record=path) as gateway:
        for number in range(40):
            await ask(gateway.url, f"s{number // 2}")
            assert gateway.observers.sessions is not None
            assert len(gateway.observers.sessions) <= 6
        await ask(gateway.url, "s0")
    expected = [(f"s{number}", turn, 0) for number in range(20) for turn in (1, 2)]
    # What comes back after it was over begins anew.
    assert turns(path) == [*expected, ("s0", 1, 0)]


async def test_what_is_idle_is_over(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    settings: dict[str, Any] = {"session_idle": 1e-9, "carry_over": "session"}
    async with FakeServer(WORSE) as server, gateway_for(server, record=path, **settings) as gateway:
        server.queue += [WORSE, BAD_FIRST, WORSE]
        for _ in range(3):
            await ask(gateway.url, "a")
            assert gateway.observers.sessions is not None
    assert turns(path) == [("a", 1, 0)] * 3
    assert [line["carried"] for line in lines(path)] == [0, 0, 0]


async def test_what_is_idle_is_written_without_another_request(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    async with (
        FakeServer(WORSE) as server,
        gateway_for(server, record=path, session_idle=1e-9) as gateway,
    ):
        await ask(gateway.url, "a")
        kept = gateway.observers.sessions
        assert kept is not None
        while len(kept):
            await get_text(gateway.url + "/health")
    assert turns(path) == [("a", 1, 0)]


async def test_a_session_with_a_turn_under_way_is_not_idle(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    async with (
        FakeServer(WORSE, gated=True) as server,
        gateway_for(server, record=path, session_idle=1e-9) as gateway,
    ):
        await ask_two_at_once(server, gateway.url)
    assert turns(path) == [("a", 1, 0), ("a", 2, 0)]


async def test_nothing_is_kept_where_nothing_is_wanted() -> None:
    async with FakeServer(WORSE) as server, gateway_for(server) as gateway:
        await ask(gateway.url, "a")
        assert gateway.observers.sessions is None


# -- a monitor that goes on ------------------------------------------------------------------------


async def stopped_at(url: str, session: str | None, **fields: Any) -> int | None:
    answer = await ask(url, session, **fields)
    cut: int | None = answer["choices"][0]["espo"]["cut"]
    return cut


@pytest.mark.parametrize("record", [False, True])
async def test_a_monitor_goes_on_from_turn_to_turn(tmp_path: Path, record: bool) -> None:
    path = tmp_path / "t.jsonl"
    settings: dict[str, Any] = {"record": path} if record else {}
    async with (
        FakeServer(WORSE) as server,
        gateway_for(server, carry_over="session", **settings) as gateway,
    ):
        server.queue += [WORSE, BAD_FIRST, BAD_FIRST, WORSE, BAD_FIRST, BAD_FIRST]
        assert await stopped_at(gateway.url, "a") is None
        assert await stopped_at(gateway.url, "b") is None  # of another
        assert await stopped_at(gateway.url, "a") == 1
        assert await stopped_at(gateway.url, "a") is None  # a rollout that was stopped is over
        assert await stopped_at(gateway.url, None) is None
        assert await stopped_at(gateway.url, "a") == 1
    if record:
        found = {(line.get("session"), line.get("turn")): line for line in lines(path)}
        assert [found["a", turn]["carried"] for turn in (1, 2, 3, 4)] == [0, 7, 0, 7]
        assert found["b", 1]["carried"] == 0


async def test_by_itself_a_monitor_does_not_go_on(tmp_path: Path) -> None:
    async with (
        FakeServer(WORSE) as server,
        gateway_for(server, record=tmp_path / "t.jsonl") as gateway,
    ):
        server.queue += [WORSE, BAD_FIRST]
        assert [await stopped_at(gateway.url, "a") for _ in range(2)] == [None, None]


async def test_the_record_tells_of_the_turn_alone() -> None:
    async with FakeServer(WORSE) as server, gateway_for(server, carry_over="session") as gateway:
        server.queue += [WORSE, Script([GOOD] * 5)]
        await ask(gateway.url, "a")
        answer = await ask(gateway.url, "a", espo={"trace": True})
    record = answer["choices"][0]["espo"]
    zs = [token["z"] for token in record["trace"]]
    assert zs == pytest.approx([0.79 * 0.9**k for k in range(1, 6)])
    assert (record["tokens"], record["z"]) == (5, pytest.approx(zs[-1]))
    assert answer["usage"]["completion_tokens"] == 5


async def test_several_choices_and_requests_at_once_begin_anew() -> None:
    async with (
        FakeServer(WORSE, gated=True) as server,
        gateway_for(server, carry_over="session") as gateway,
    ):
        server.queue += [WORSE, BAD_FIRST, BAD_FIRST, BAD_FIRST, BAD_FIRST]
        first = asyncio.create_task(stopped_at(gateway.url, "a"))
        await advance(server, 7)
        assert await first is None
        both = asyncio.create_task(ask(gateway.url, "a", n=2))
        await until_asked(server, 3)
        third = asyncio.create_task(stopped_at(gateway.url, "a"))
        await until_asked(server, 4)
        await advance(server, 30)
        answer = await both
        assert await third is None
    assert [choice["espo"]["cut"] for choice in answer["choices"]] == [None, None]


@pytest.mark.parametrize("choices", [1, 2])
async def test_a_try_that_failed_is_no_turn(tmp_path: Path, choices: int) -> None:
    path = tmp_path / "t.jsonl"
    async with (
        FakeServer(WORSE) as server,
        gateway_for(server, record=path, carry_over="session", attempts=1) as gateway,
    ):
        await ask(gateway.url, "a")
        for status in (429, 500, 400):
            server.queue += [dataclasses.replace(WORSE, status=status)] * choices
            async with (
                aiohttp.ClientSession() as client,
                client.post(
                    gateway.url + COMPLETIONS,
                    json=completion_body(n=choices),
                    headers={"X-Session-ID": "a"},
                ) as response,
            ):
                assert response.status >= 400
            server.queue.clear()
        server.queue.append(BAD_FIRST)
        assert await stopped_at(gateway.url, "a") == 1
    assert [(line["turn"], line["carried"]) for line in lines(path)] == [(1, 0), (2, 7)]


async def test_what_follows_requests_at_once_begins_anew() -> None:
    async with (
        FakeServer(WORSE, gated=True) as server,
        gateway_for(server, carry_over="session") as gateway,
    ):
        server.queue += [Script([GOOD] * 4), WORSE, BAD_FIRST]
        first = asyncio.create_task(ask(gateway.url, "a"))
        await until_asked(server, 1)
        second = asyncio.create_task(ask(gateway.url, "a"))
        await advance(server, 11)
        await asyncio.gather(first, second)
        third = asyncio.create_task(stopped_at(gateway.url, "a"))
        await advance(server, 10)
        assert await third is None


# -- read back -------------------------------------------------------------------------------------


async def recorded(path: Path, **settings: Any) -> list[dict[str, Any]]:
    """Three turns of one session between two other requests."""
    async with FakeServer(WORSE) as server, gateway_for(server, record=path, **settings) as gateway:
        server.queue += [Script([GOOD] * 3), WORSE, WORSE, BAD_FIRST, FAILING]
        answers = [await ask(gateway.url, session) for session in (None, "a", "a", "a", None)]
    return answers


async def test_turns_are_replayed_as_they_were_watched(tmp_path: Path) -> None:
    gate = gate_from_json(GATE, has_critic=False)
    path = tmp_path / "alone.jsonl"
    await recorded(path)
    alone = traces(path)
    assert sorted(alone.lengths) == [3, 7, 7, 8, 10]
    assert sorted(first_stops(gate, alone.recorded)) == [0, 0, 0, 0, 8]
    # Turns of one session share their beginning, so they stand in one fold; all ask the same here.
    assert len(set(alone.keys.tolist())) == 1

    path = tmp_path / "carried.jsonl"
    answers = await recorded(path, carry_over="session")
    carried = traces(path)
    cuts = [answer["choices"][0]["espo"]["cut"] for answer in answers]
    assert cuts == [None, None, None, 1, 8]
    stops = first_stops(gate, carried.recorded).tolist()
    whole = dict(zip(carried.lengths.tolist(), stops, strict=True))
    assert whole == {3: 0, 7 + 7 + 1: 7 + 7 + 1, 8: 8}
    # A turn that ended by itself was exempt from a stop at its end, here too.
    assert carried.recorded.completed_at is not None
    ends = {tuple(row[row > 0]) for row in carried.recorded.completed_at}
    assert ends == {(3,), (7, 14), ()}


async def test_what_has_lost_its_beginning_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    await recorded(path, carry_over="session")
    kept = [line for line in lines(path) if line.get("turn") != 1]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert sorted(traces(path).lengths) == [3, 8]


async def test_an_outcome_may_be_a_sessions(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "t.jsonl", tmp_path / "outcomes.jsonl"
    async with (
        FakeServer(WORSE) as server,
        gateway_for(server, record=path, carry_over="session") as gateway,
    ):
        for session in ("a", "b"):
            await ask(gateway.url, session)
    outcomes.write_text('{"session": "a", "correct": true}\n{"session": "b", "correct": false}\n')
    known = read_outcomes(outcomes, "correct")
    [found] = read_traces([path], outcome="correct", known=known)
    assert sorted(found.correct) == [0.0, 1.0]
    assert np.isfinite(found.correct).all()
