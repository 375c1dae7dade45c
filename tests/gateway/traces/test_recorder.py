"""Traces on disk: each finished choice's numbers exactly as they came, and never a word."""

from __future__ import annotations

import json
import logging
import math
import resource
import threading
from array import array
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from espo_gateway.app import running
from espo_gateway.config import Config
from espo_gateway.errors import InvalidRequest
from espo_gateway.stop.gate_json import gate_from_json
from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.replay import first_stops
from espo_gateway.testing import FakeServer, Script, Token
from espo_gateway.traces import recorder as recording
from espo_gateway.traces.recorder import Recorder
from tests.helpers.gateway import (
    BAD,
    COMPLETIONS,
    GOOD,
    LONG,
    client_of,
    completion_body,
    gateway_for,
    post,
    post_stream,
    raw_request,
    until_running,
)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def columns(count: int, value: float = -0.5) -> dict[str, array[float]]:
    return {name: array("d", [value] * count) for name in ("logprobs", "max_logprobs")}


async def test_the_numbers_are_those_received(tmp_path: Path) -> None:
    odd = [0.1 + 0.2, -1e-17, -9999.0, -4.0 / 3.0]
    tokens = [Token(f"secret{i}", x, max(x, -0.1), i) for i, x in enumerate(odd)]
    tokens.insert(2, Token("nothing", None, None))
    path = tmp_path / "traces.jsonl"
    async with (
        FakeServer(Script(tokens)) as server,
        gateway_for(server, record=path) as gateway,
    ):
        status, answer = await post(gateway.url + COMPLETIONS, completion_body())
        assert status == 200
    [line] = lines(path)
    assert line["logprobs"] == [odd[0], odd[1], None, odd[2], odd[3]]
    assert line["max_logprobs"] == [odd[0], max(odd[1], -0.1), None, -0.1, -0.1]
    del line["logprobs"], line["max_logprobs"]
    assert len(line.pop("request")) == 32
    assert len(line.pop("prompt")) == 16
    assert line == {
        "id": answer["id"],
        "index": 0,
        "model": "fake",
        "gate_version": 3,
        "rule": "regret-only",
        "mode": "enforce",
        "prompt_tokens": 3,
        "end": "completed",
        "cut": None,
    }
    assert "secret" not in path.read_text()


@pytest.mark.parametrize("n", [1, 3])
async def test_choices_that_the_gateways_end_breaks_off_are_recorded(
    tmp_path: Path, n: int
) -> None:
    path = tmp_path / "traces.jsonl"
    async with FakeServer(Script([GOOD] * 100), gated=True) as server:
        config = Config((server.url,), port=0, drain_timeout=0.0, record=path)
        async with running(config) as gateway:
            body = completion_body(stream=True, n=n)
            reader, writer = await raw_request(gateway.url, COMPLETIONS, body)
            await until_running(server, n)
            server.release(n)
            for _ in range(n):
                await reader.readuntil(b"data: ")
        writer.close()
    assert [line["end"] for line in lines(path)] == ["aborted"] * n


async def test_requests_that_ask_the_same_are_told_by_the_same_hash(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    asked: list[dict[str, Any]] = [
        {"prompt": "1+1="},
        {"prompt": "1+1=", "temperature": 0.5},
        {"prompt": [2**70, 1]},
    ]
    async with (
        FakeServer(Script([GOOD])) as server,
        gateway_for(server, record=path) as gateway,
    ):
        for fields in asked:
            await post(gateway.url + COMPLETIONS, completion_body(**fields))
    one, same, other = (line["prompt"] for line in lines(path))
    assert one == same != other


@pytest.mark.parametrize("stream", [False, True])
async def test_every_choice_has_the_id_that_its_client_was_told(
    tmp_path: Path, stream: bool
) -> None:
    path = tmp_path / "traces.jsonl"
    numbers = count()

    def named(chunk: dict[str, Any]) -> dict[str, Any]:
        return {**chunk, "id": f"cmpl-{next(numbers)}"}

    async with (
        FakeServer(Script([GOOD] * 3, rewrite=named)) as server,
        gateway_for(server, record=path) as gateway,
    ):
        url, body = gateway.url + COMPLETIONS, completion_body(prompt=["a", "b"], n=2)
        if stream:
            told = {chunk["id"] for chunk in await post_stream(url, {**body, "stream": True})}
        else:
            _, answer = await post(url, body)
            told = {answer["id"]}
    assert len(told) == 1
    assert [line["id"] for line in lines(path)] == [*told] * 4


async def test_every_kind_of_end_is_told_and_a_stop_is_kept_to_its_cut(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    failing = [GOOD] * 6 + [BAD] * 10
    async with FakeServer(LONG) as server:
        server.queue += [
            Script([GOOD] * 5),
            Script([GOOD] * 5, finish_reason="length"),
            Script(failing, per_chunk=16),  # all past the cut is overshoot
            Script([GOOD] * 5, fault="reset", after=3),
            Script(failing),
        ]
        async with gateway_for(server, record=path) as gateway:
            for espo in ({}, {}, {}, {}, {"mode": "shadow"}):
                await post(gateway.url + COMPLETIONS, completion_body(espo=espo))
    ends = [(line["end"], line["cut"], len(line["logprobs"])) for line in lines(path)]
    assert ends == [
        ("completed", None, 5),
        ("length", None, 5),
        ("early_stop", 8, 8),
        ("aborted", None, 3),
        ("completed", 8, 16),
    ]
    stopped, shadow = lines(path)[2], lines(path)[4]
    assert shadow["logprobs"][:8] == stopped["logprobs"]
    gate = gate_from_json(b'{"rule": "regret-only", "beta": 1.0}', has_critic=False)
    logprobs, best = (np.array([shadow[name]]) for name in ("logprobs", "max_logprobs"))
    assert first_stops(gate, Recorded(logprobs, best, np.array([3.0]))).tolist() == [8]


async def test_each_choice_of_a_request_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    async with (
        FakeServer(Script([GOOD] * 5)) as server,
        gateway_for(server, record=path) as gateway,
        client_of(gateway.url) as client,
    ):
        await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "p"}], n=3
        )
    assert sorted(line["index"] for line in lines(path)) == [0, 1, 2]


async def test_an_older_file_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    for _ in range(2):
        async with (
            FakeServer(Script([GOOD] * 5)) as server,
            gateway_for(server, record=path) as gateway,
        ):
            await post(gateway.url + COMPLETIONS, completion_body())
    assert len(lines(path)) == 2


def test_it_ends_at_its_limit_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path / "t.jsonl", megabytes=0.001)
    for number in range(50):
        recorder.write({"index": number}, columns(10))
    recorder.close()
    size = recorder.path.stat().st_size
    assert 800 < size <= 1000
    assert len(lines(recorder.path)) == recorder.written
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "limit of 0.001 MB" in caplog.text


def test_a_full_disk_is_one_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    recorder = Recorder(Path("/dev/full"), megabytes=1)
    for number in range(5):
        recorder.write({"index": number}, columns(10))
    recorder.close()
    assert recorder.written == 0
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t.jsonl", megabytes=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # As a disk with room for 1,000 bytes. The file's own size counts, so others may write.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        for number in range(50):
            recorder.write({"index": number}, columns(10))
        recorder.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert recorder.problem is not None
    assert len(lines(recorder.path)) == recorder.written > 2


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"record: cannot append to .*No such file"):
        Recorder(tmp_path / "no" / "t.jsonl", megabytes=1)


@pytest.mark.parametrize(
    "content", [b'{"version": 3, "beta": 7.0}\n', b"[1]\n", b"a letter", b"\0"]
)
def test_nothing_is_appended_to_what_holds_no_traces(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "gate.json"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"record: .*gate\.json is there and holds no traces"):
        Recorder(path, megabytes=1)
    assert path.read_bytes() == content


def test_a_slow_disk_neither_blocks_nor_fills_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "MAX_WAITING", 100)
    recorder = Recorder(tmp_path / "t.jsonl", megabytes=1)
    goes_on = threading.Event()
    encode = msgspec.json.encode
    monkeypatch.setattr(msgspec.json, "encode", lambda one: (goes_on.wait(), encode(one))[1])
    for number in range(50):
        recorder.write({"index": number}, columns(10))  # returns though nothing is written
    goes_on.set()
    recorder.close()
    assert [line["index"] for line in lines(recorder.path)] == [0, 1, 2, 3, 4]
    assert recorder.report()["dropped"] == 45
    assert caplog.text.count("too slow") == 1


def test_what_json_has_not_is_null(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t.jsonl", megabytes=1)
    for value in (math.nan, math.inf, -math.inf):
        recorder.write({}, columns(1, value))
    recorder.close()
    assert [line["logprobs"] for line in lines(recorder.path)] == [[None]] * 3
