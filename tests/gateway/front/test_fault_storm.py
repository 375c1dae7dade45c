"""Every fault of a server at once, under 200 streams whose clients come and go.

Each request must end with its whole answer, a clear error, or its client's departure, with nothing
left running on either side. Every token's text is its own, so one lost or doubled shows.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any, Literal

import aiohttp
import pytest

from espo_gateway.front.gateway import Gateway
from espo_gateway.testing import Body, FakeServer, Script, Token
from tests.helpers.gateway import chat_body, completion_body, gateway_for, metric, until_running

STREAMS = 200
#: Apart, so that a request's seeds, one for each choice, are nobody else's.
SEEDS = 1000
#: Long against what a busy machine may hold up a healthy stream.
IDLE = 4.0

Ending = Literal["whole", "error"]


def lying(**fields: Any) -> Callable[[Body], Body]:
    """Every choice with these fields."""
    return lambda chunk: {**chunk, "choices": [{**choice, **fields} for choice in chunk["choices"]]}


#: What the script is changed to, and how a request whose client stays must end.
HARMLESS: dict[str, dict[str, Any]] = {
    "none": {},
    "merged": {"per_chunk": 5},
    "split": {"split": 3},
    "merged and split": {"per_chunk": 7, "split": 11},
    "negative index": {"rewrite": lying(index=-7)},
    "strange usage": {"rewrite": lambda chunk: {**chunk, "usage": {"prompt_tokens": -1}}},
    "no token ids": {"token_ids": False},
    "another type": {"content_type": "text/html"},
}
HARMFUL: dict[str, dict[str, Any]] = {
    "429": {"status": 429},
    "500": {"status": 500},
    "503": {"status": 503},
    "reset before headers": {"fault": "reset", "after": 0},
    "no body": {"fault": "no-body"},
    "reset": {"fault": "reset"},
    "stall": {"fault": "stall"},
    "garbage": {"fault": "garbage"},
    "error event": {"fault": "error"},
    "eof": {"fault": "eof"},
    "half a chunk": {"fault": "half"},
    "flood": {"fault": "flood"},
    "no choices": {"rewrite": lambda chunk: {"object": chunk["object"]}},
    "null choice": {"rewrite": lambda chunk: {**chunk, "choices": [None]}},
}
#: Served or refused, as configured.
UNMONITORED: dict[str, dict[str, Any]] = {
    "no logprobs": {"logprobs": False},
    "text for logprobs": {"rewrite": lying(logprobs="none")},
}
#: Gone once they have been tried again.
PASSING = ("429", "503", "reset before headers")
#: Logprobs that are no numbers.
UNREADABLE: dict[str, float | None] = {
    "null": None,
    "NaN": nan,
    "infinite": -inf,
    "placeholder": -9999,
}


@dataclass
class Request:
    """One client's request, and what is known of its answer beforehand.

    faulty: the choice whose stream goes wrong. departs: after how many reads, None to stay.
    """

    number: int
    fault: str
    ending: Ending
    chat: bool
    stream: bool
    n: int
    faulty: int
    departs: int | None
    #: of each choice: its tokens' texts, and after how many of them it must be stopped, if ever
    texts: list[list[str]] = field(default_factory=list, repr=False)
    cuts: list[int | None] = field(default_factory=list)
    scripts: list[Script] = field(default_factory=list, repr=False)

    @property
    def body(self) -> Body:
        fields: Body = {"n": self.n, "seed": SEEDS * self.number, "stream": self.stream}
        return (chat_body if self.chat else completion_body)(**fields)

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def expected(self, index: int) -> str:
        return "".join(self.texts[index][: self.cuts[index]])


def requests_of(seed: int, unmonitored: str) -> list[Request]:
    """Each fault about as often as the others, everything else by chance."""
    rng = random.Random(seed)
    faults: list[tuple[str, Ending]] = [
        *((name, "whole" if unmonitored == "pass" else "error") for name in UNMONITORED),
        *((name, "whole") for name in (*HARMLESS, *(f"passing {name}" for name in PASSING))),
        *((name, "whole") for name in UNREADABLE),
        *((name, "error") for name in HARMFUL),
    ]
    requests = []
    for number in range(STREAMS):
        fault, ending = faults[number % len(faults)]
        n = rng.choice((1, 1, 2, 3))
        request = Request(
            number,
            fault,
            ending,
            chat=rng.random() < 0.5,
            stream=rng.random() < 0.6,
            n=n,
            faulty=rng.randrange(n),
            departs=rng.choice((0, 1, 2, 5, 20)) if rng.random() < 0.3 else None,
        )
        for index in range(n):
            _write_script(request, index, rng)
        requests.append(request)
    rng.shuffle(requests)
    return requests


def _write_script(request: Request, index: int, rng: random.Random) -> None:
    length, fault = rng.randint(20, 60), request.fault if index == request.faulty else "none"
    # z passes 1 with the second bad token in a row.
    bad = rng.randint(6, length - 10) if rng.random() < 0.5 else length
    if fault in UNMONITORED:
        bad = length
    texts = [f"{request.number}.{index}.{t} " for t in range(length)]
    tokens = [
        Token(text, -0.1, None, t) if t < bad else Token(text, -8.0, -0.1, t)
        for t, text in enumerate(texts)
    ]
    if fault in UNREADABLE:
        for t in range(0, bad, 3):
            tokens[t] = tokens[t]._replace(logprob=UNREADABLE[fault])
    changes: dict[str, Any] = {"after": rng.randint(1, min(bad, 15))}
    changes |= {**HARMLESS, **HARMFUL, **UNMONITORED}.get(fault, {})
    request.texts.append(texts)
    request.cuts.append(bad + 2 if bad < length else None)
    request.scripts.append(Script(tokens, **changes))


class Storm:
    """What the servers answer, by the seed of a request's choice, and how often each was asked."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = {request.number: request for request in requests}
        self.asked: Counter[int] = Counter()

    def script(self, body: Body) -> Script:
        seed = body["seed"]
        request = self.requests[seed // SEEDS]
        index = seed % SEEDS
        script = request.scripts[index]
        self.asked[seed] += 1
        passing = request.fault.startswith("passing ") and index == request.faulty
        if passing and self.asked[seed] < 3:
            return Script([], **HARMFUL[request.fault.removeprefix("passing ")])
        return script


@dataclass
class Outcome:
    """What a client got: of each choice the text, its last chunk; the error; whether it left."""

    texts: dict[int, str] = field(default_factory=dict)
    last: dict[int, Body] = field(default_factory=dict)
    error: Body | None = None
    done: bool = False
    left: bool = False


async def client(session: aiohttp.ClientSession, url: str, request: Request) -> Outcome:
    """Send the request; read, or go."""
    outcome = Outcome()
    sending = asyncio.ensure_future(session.post(url + request.path, json=request.body))
    if request.departs is not None and (not request.stream or request.departs == 0):
        for _ in range(50 * request.departs):
            await asyncio.sleep(0)
        if not sending.done():
            sending.cancel()
            await asyncio.wait([sending])
            if sending.cancelled():
                outcome.left = True
                return outcome
    response = await sending
    try:
        if response.content_type == "text/event-stream":
            await _read_stream(response, request, outcome)
        else:
            _take_answer(outcome, response.status, json.loads(await response.read()))
    finally:
        response.close()
    return outcome


async def _read_stream(
    response: aiohttp.ClientResponse, request: Request, outcome: Outcome
) -> None:
    received, reads = b"", 0
    async for data in response.content.iter_any():
        *events, received = (received + data).split(b"\n\n")
        for event in events:
            _take_event(outcome, event)
        reads += 1
        if request.departs is not None and reads >= request.departs:
            outcome.left = not outcome.done
            return
    assert received == b""
    assert outcome.done


def _take_event(outcome: Outcome, event: bytes) -> None:
    assert event.startswith(b"data: ")
    assert not outcome.done, "something after [DONE]"
    if event == b"data: [DONE]":
        outcome.done = True
        return
    chunk = json.loads(event[6:])
    assert outcome.error is None, "something after an error"
    if "error" in chunk:
        outcome.error = chunk["error"]
        return
    (choice,) = chunk["choices"]
    index = choice["index"]
    assert index not in outcome.last, "something after a choice's end"
    text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    outcome.texts[index] = outcome.texts.get(index, "") + text
    if choice.get("finish_reason") is not None:
        outcome.last[index] = choice


def _take_answer(outcome: Outcome, status: int, answer: Body) -> None:
    if status != 200:
        outcome.error = answer["error"]
        return
    outcome.done = True
    for choice in answer["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        outcome.texts[choice["index"]] = text
        outcome.last[choice["index"]] = choice


def check(request: Request, outcome: Outcome) -> None:
    """No token lost or doubled, each stop where the rule says, each end as it must be."""
    for index, text in outcome.texts.items():
        assert request.expected(index).startswith(text)
    for index, choice in outcome.last.items():
        cut = request.cuts[index]
        assert outcome.texts[index] == request.expected(index)
        assert choice["espo"]["cut"] == cut
        assert choice["espo"]["stopped"] == (cut is not None)
        watched = request.fault not in UNMONITORED or index != request.faulty
        assert choice["espo"]["mode"] == ("enforce" if watched else "off")
        assert choice["finish_reason"] == ("stop" if cut is None else "length")
    if outcome.left:
        assert request.departs is not None
    elif request.ending == "whole":
        assert outcome.error is None
        assert outcome.done
        assert sorted(outcome.last) == list(range(request.n))
    else:
        assert outcome.error is not None
        assert outcome.error["message"]
        assert outcome.error["type"]


async def all_idle(gateway: Gateway, servers: list[FakeServer]) -> None:
    """Wait until nothing is under way; a counter that is not released makes this a timeout."""
    for server in servers:
        await until_running(server, 0)
    while await metric(gateway, "espo_gateway_requests_in_flight") or gateway.sessions:
        pass
    assert [server.in_flight for server in gateway.pool.servers] == [0] * len(servers)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "unmonitored"), [(0, "pass"), (1, "refuse")])
async def test_a_storm_of_faults(
    seed: int, unmonitored: str, caplog: pytest.LogCaptureFixture
) -> None:
    requests = requests_of(seed, unmonitored)
    after = Request(STREAMS, "none", "whole", chat=True, stream=True, n=1, faulty=0, departs=None)
    _write_script(after, 0, random.Random(seed))
    storm = Storm([*requests, after])
    # Of this loop: what another test has left behind may be told in the log meanwhile.
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
    # pytest's own timeout is lost in a loop that is never idle.
    async with asyncio.timeout(60), FakeServer(storm.script) as a, FakeServer(storm.script) as b:
        servers, tasks, files = [a, b], asyncio.all_tasks(), open_files()
        async with gateway_for(
            *servers,
            idle_timeout=IDLE,
            first_token_timeout=2 * IDLE,
            # All servers fail all the time here, and none is to be left alone for it.
            breaker_failures=10**6,
            health_interval=0.0,  # its task would be taken for a stuck one
            unmonitored=unmonitored,
        ) as gateway:
            gateways = asyncio.all_tasks()
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                outcomes = await asyncio.gather(
                    *(client(session, gateway.url, request) for request in requests)
                )
                await all_idle(gateway, servers)
                working = [t for t in asyncio.all_tasks() - gateways if _is_ours(t)]
                assert working == []
                served = await metric(gateway, "espo_gateway_requests_total")
                check(after, await client(session, gateway.url, after))
        # What is left of connections ends with their sockets.
        while leaked := asyncio.all_tasks() - tasks:
            await asyncio.wait(leaked)
        while open_files() > files:  # noqa: ASYNC110 (nothing tells that one is closed)
            await asyncio.sleep(0.01)

    for request, outcome in zip(requests, outcomes, strict=True):
        try:
            check(request, outcome)
        except AssertionError as error:
            raise AssertionError(f"{request}\n{outcome}") from error
    left = sum(outcome.left for outcome in outcomes)
    assert 0.05 * STREAMS < left < 0.4 * STREAMS
    # A client that leaves before its request is read is none.
    assert STREAMS - left <= served <= STREAMS
    _check_servers(servers, storm)
    # None of it is the gateway's own failure.
    assert faults == []
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record for record in errors if record.name.startswith("espo_gateway")] == []


def _is_ours(task: asyncio.Task[Any]) -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and "espo_gateway" in code.co_filename


def _check_servers(servers: list[FakeServer], storm: Storm) -> None:
    """The servers' side: each generation is accounted for, and none was asked for too often."""
    for server in servers:
        assert len(server.bodies) > STREAMS / 3
        assert server.finished + server.failed + server.aborted == len(server.bodies)
    for seed, asked in storm.asked.items():
        request = storm.requests[seed // SEEDS]
        faulty = seed % SEEDS == request.faulty
        assert asked <= (_tries(request.fault) if faulty else 1), request


def _tries(fault: str) -> int:
    """How often a choice may be asked for: again only while nothing has come of it."""
    return 3 if fault.removeprefix("passing ") in PASSING else 1
