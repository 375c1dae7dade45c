"""A gateway that finds its gate by itself: statistics, warm-up, row 6, and its state on disk."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from espo_gateway.config import Config
from espo_gateway.errors import InvalidRequest
from espo_gateway.front.gateway import Gateway
from espo_gateway.stop.estimate import FEATURES, SuccessEstimator
from espo_gateway.stop.recorded import Recorded
from espo_gateway.stop.regret import MonitorConfig
from espo_gateway.stop.replay import stop_levels
from espo_gateway.stop.rules import BETA, Gate
from espo_gateway.stop.watch import Verdict, Watch
from espo_gateway.stream.followers import Followed
from espo_gateway.testing import FakeServer, Script
from espo_gateway.tuning.tuner import STEP, Evidence, Tuning
from tests.helpers.gateway import (
    BAD,
    COMPLETIONS,
    GOOD,
    completion_body,
    gateway_for,
    get_text,
    post,
)

Stream = list[tuple[float, float]]


def streams(seed: int, scale: float = 1.0) -> Iterator[Stream]:
    """Endless streams, some of them wild toward the end."""
    rng = np.random.default_rng(seed)
    while True:
        length = int(rng.integers(20, 60))
        wild = rng.random() < 0.5
        regrets = rng.exponential(0.2 * scale, length)
        regrets[length // 2 :] *= rng.uniform(1, 20) if wild else 1.0
        yield [(-0.1 - float(g), -0.1) for g in regrets]


def follow(tuning: Tuning, stream: Stream, gate: Gate | None = None) -> tuple[Evidence, Watch]:
    """As a gateway does: the gate in force at the beginning, to the cut or the end."""
    evidence, watch = tuning.evidence(), Watch(gate or tuning.gate, 3)
    evidence.begin(3)
    followed = Followed(watch, [evidence])
    for t, pair in enumerate(stream, 1):
        followed.push(*pair, last=t == len(stream))
        if watch.cut is not None:
            break
    return evidence, watch


def stopped(tuning: Tuning, source: Iterator[Stream]) -> bool:
    _, watch = follow(tuning, next(source))
    return watch.cut is not None


def tuned(rule: Any = "none", **fields: Any) -> Tuning:
    sizes = {"target": 0.2, "warmup": 80, "window": 16, **fields}
    return Tuning(Gate(rule=rule), **sizes)


# -- the maths -------------------------------------------------------------------------------------


def test_the_first_window_sets_the_statistics() -> None:
    tuning, source = tuned(), streams(0)
    seen: list[Stream] = []
    for number in range(16):
        seen.append(next(source))
        assert tuning.take(*follow(tuning, seen[-1])) == (number == 15)
    regrets = np.concatenate([[m - p for p, m in stream] for stream in seen])
    assert tuning.judging.statistics.mean == pytest.approx(regrets.mean())
    assert tuning.judging.statistics.variance == pytest.approx(regrets.var())
    assert (tuning.gate.rule, tuning.gate.version, tuning.phase) == ("none", 1, "threshold")


@pytest.mark.parametrize("rule", ["none", "value-gated", "surprise"])
def test_after_the_warm_up_the_wished_share_is_stopped(rule: Any) -> None:
    tuning, source = tuned(rule, warmup=400), streams(1)
    for number in range(400):
        assert tuning.gate.rule == "none", f"stopping after {number} of 400"
        evidence, watch = follow(tuning, next(source))
        assert watch.cut is None
        tuning.take(evidence, watch)
    assert tuning.gate.rule == ("regret-only" if rule == "none" else rule)
    held_out = [stopped(tuning, source) for _ in range(2000)]
    assert np.mean(held_out) == pytest.approx(0.2, abs=0.05)


def test_then_each_window_is_row_6_and_row_2() -> None:
    tuning, source = tuned(), streams(2)
    while tuning.phase != "steering":
        tuning.take(*follow(tuning, next(source)))
    for _ in range(5):
        before, cuts, regrets = tuning.judging, [], []
        for number in range(16):
            evidence, watch = follow(tuning, stream := next(source))
            cuts.append(watch.cut is not None)
            regrets += [m - p for p, m in stream[: watch.cut]]
            assert tuning.take(evidence, watch) == (number == 15)
        share = np.mean(cuts)
        expected = min(max(before.beta + STEP * (share - 0.2), BETA.loosest), BETA.strictest)
        assert tuning.gate.beta == pytest.approx(expected)
        assert tuning.share == share
        assert tuning.gate.version == before.version + 1
        assert tuning.gate.statistics.mean == pytest.approx(
            0.99 * before.statistics.mean + 0.01 * np.mean(regrets)
        )


def test_the_share_returns_after_the_streams_have_changed() -> None:
    tuning, source = tuned(window=8, warmup=100), streams(3)
    for _ in range(100):
        tuning.take(*follow(tuning, next(source)))
    wilder = streams(4, scale=3.0)
    at_once = np.mean([stopped(tuning, wilder) for _ in range(500)])
    for _ in range(6000):
        tuning.take(*follow(tuning, next(wilder)))
    later = np.mean([stopped(tuning, wilder) for _ in range(500)])
    assert at_once > 0.3
    assert later == pytest.approx(0.2, abs=0.08)


def test_a_step_waits_for_streams_that_saw_the_last_one() -> None:
    tuning, source = tuned(window=2, warmup=4), streams(5)
    old = [follow(tuning, next(source)) for _ in range(10)]
    assert [tuning.take(*one) for one in old[:3]] == [False, True, False]
    # Judged under other statistics, so no evidence of the threshold.
    assert not any(tuning.take(*one) for one in old[3:])
    assert tuning.levels == []
    tuning.take(*follow(tuning, next(source)))
    assert tuning.take(*follow(tuning, next(source)))
    assert tuning.phase == "steering"


def test_constants_of_a_requests_own_do_not_move_beta() -> None:
    tuning, source = tuned(window=2, warmup=4), streams(6)
    while tuning.phase != "steering":
        tuning.take(*follow(tuning, next(source)))
    beta = tuning.gate.beta
    for _ in range(2):
        own = dataclasses.replace(tuning.gate, beta=0.06)
        tuning.take(*follow(tuning, next(source), own))
    assert (tuning.gate.beta, tuning.share) == (beta, None)


@pytest.mark.parametrize(
    "gate",
    [
        Gate(rule="regret-only", min_tokens=7),
        Gate(rule="value-gated", constant=0.7),
        Gate(rule="value-gated", value="critic", epsilon=0.3),
        Gate(rule="surprise", monitor=MonitorConfig(smoothing=0.8)),
    ],
)
def test_evidence_is_the_sums_and_the_level_of_a_replay(gate: Gate) -> None:
    source = streams(7)
    for _ in range(20):
        stream = next(source)
        evidence = Evidence(gate)
        evidence.begin(3)
        followed = Followed(Watch(dataclasses.replace(gate, rule="none"), 3), [evidence])
        verdicts = {followed.push(None, None), followed.push(math.nan, -0.1)}
        for t, pair in enumerate(stream, 1):
            verdicts.add(followed.push(*pair, last=t == len(stream)))
        logprobs, best = (
            np.array([[math.nan, math.nan, *(pair[k] for pair in stream)]], float) for k in (0, 1)
        )
        completed = np.array([len(stream) + 2])
        recorded = Recorded(logprobs, best, np.array([3.0]), completed_at=completed)
        levels = stop_levels(gate, recorded)
        assert -evidence.highest == levels[0]
        regrets = recorded.regrets[0, 2:]
        assert evidence.count == len(stream)
        assert evidence.total == pytest.approx(regrets.sum())
        assert evidence.squares == pytest.approx((regrets**2).sum())
        assert verdicts == {Verdict.GO}


@pytest.mark.parametrize("rule", ["random", "confidence"])
def test_a_rule_without_beta_is_refused_by_name(rule: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{rule!r} has no β to tune.*regret-only"):
        tuned(rule)


def test_an_estimate_of_what_no_evidence_is_told_is_refused() -> None:
    estimator = SuccessEstimator((0.0,) * (len(FEATURES) + 1), 0.0, sources=("history",))
    gate = Gate(rule="value-gated", value="stream", estimator=estimator)
    with pytest.raises(InvalidRequest, match="target_share: the gate's estimator reads history"):
        Tuning(gate, target=0.2, warmup=80, window=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_share": 0.1, "warmup": 64}, r"warmup: must be more than --window \(64\)"),
        ({"state": Path("state.json")}, "state: has no effect without --target-share"),
        ({"target_share": 1.5}, "target_share"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Config(("http://127.0.0.1:1",), **settings)


# -- in a gateway ----------------------------------------------------------------------------------


def served(seed: int) -> Callable[[Any], Script]:
    """Scripts of which a part fails."""
    rng = np.random.default_rng(seed)

    def script(body: Any) -> Script:
        bad = int(rng.integers(1, 6)) if rng.random() < 0.5 else 0
        return Script([GOOD] * 8 + [BAD] * bad + [GOOD] * 4)

    return script


async def ask(gateway: Gateway, **fields: Any) -> dict[str, Any]:
    status, answer = await post(gateway.url + COMPLETIONS, completion_body(**fields))
    assert status == 200
    return answer["choices"][0]["espo"]


TUNED: dict[str, Any] = {"gate": None, "target_share": 0.25, "warmup": 60, "window": 12}


async def test_it_learns_by_itself_and_stops_about_the_share() -> None:
    async with FakeServer(served(0)) as server, gateway_for(server, **TUNED) as gateway:
        warming = [await ask(gateway) for _ in range(60)]
        assert not any(record["stopped"] for record in warming)
        assert {record["rule"] for record in warming} == {"none"}
        records = [await ask(gateway) for _ in range(120)]
        assert 0.1 < np.mean([record["stopped"] for record in records]) < 0.4
        versions = [record["gate_version"] for record in records]
        assert versions == sorted(versions)
        assert len(set(versions)) == 10
        statistics = json.loads(await get_text(gateway.url + "/espo/statistics"))
        assert statistics["gate"]["rule"] == "regret-only"
        assert statistics["tuning"]["phase"] == "steering"
        assert statistics["tuning"]["finished"] == 180
        assert statistics["tuning"]["warmup_finished"] == 60
        assert 0.0 <= statistics["tuning"]["share_last_window"] <= 1.0


async def test_shadow_requests_are_evidence_and_off_ones_are_none() -> None:
    async with FakeServer(served(1)) as server, gateway_for(server, **TUNED) as gateway:
        for _ in range(20):
            await ask(gateway, espo={"mode": "shadow"})
            await post(gateway.url + COMPLETIONS, completion_body(espo={"mode": "off"}))
        assert gateway.observers.tuning is not None
        assert gateway.observers.tuning.finished == 20


async def test_a_pushed_gate_is_refused_while_tuning() -> None:
    async with (
        FakeServer(served(0)) as server,
        gateway_for(server, **TUNED) as gateway,
        aiohttp.ClientSession() as session,
        session.put(gateway.url + "/espo/gate", data=b"{}") as response,
    ):
        assert response.status == 409
        assert "--target-share" in (await response.json())["error"]["message"]


async def test_what_was_learnt_is_taken_up_again(tmp_path: Path) -> None:
    settings = {**TUNED, "state": tmp_path / "state.json"}
    async with FakeServer(served(2)) as server:
        async with gateway_for(server, **settings) as gateway:
            for _ in range(30):
                await ask(gateway)
        async with gateway_for(server, **settings) as gateway:
            assert gateway.observers.tuning is not None
            assert (gateway.observers.tuning.phase, gateway.observers.tuning.finished) == (
                "threshold",
                30,
            )
            assert len(gateway.observers.tuning.levels) == 18
            for _ in range(30):
                await ask(gateway)
            learnt = gateway.gate
            assert learnt.rule == "regret-only"
        async with gateway_for(server, **settings) as gateway:
            assert gateway.gate == learnt
    assert os.listdir(tmp_path) == ["state.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "damaged, or no state"),
        (b"[]", "damaged, or no state"),
        (b'{"version": 7}', "version 7, and this gateway reads 1"),
        (b'{"version": 1}', "damaged, or no state.*missing required field"),
    ],
)
async def test_a_bad_state_file_is_named_at_the_start(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "s.json").write_bytes(content)
    async with FakeServer(served(0)) as server:
        with pytest.raises(InvalidRequest, match=rf"s\.json .*{message}.*delete it"):
            async with gateway_for(server, **TUNED, state=tmp_path / "s.json"):
                pass


async def test_a_state_of_another_rule_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    async with FakeServer(served(0)) as server:
        async with gateway_for(server, **TUNED, state=path) as gateway:
            await ask(gateway)
        surprise = {**TUNED, "gate": b'{"rule": "surprise"}', "state": path}
        with pytest.raises(InvalidRequest, match=r"rule 'regret-only'.*rule 'surprise'"):
            async with gateway_for(server, **surprise):
                pass
        broken = json.loads(path.read_bytes())
        broken["gate"]["beta"] = -1
        path.write_text(json.dumps(broken))
        with pytest.raises(InvalidRequest, match=r"bad gate: beta"):
            async with gateway_for(server, **TUNED, state=path):
                pass


async def test_a_full_disk_costs_the_state_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    settings = {**TUNED, "state": Path("/dev/full/state.json")}
    async with FakeServer(served(0)) as server:
        with pytest.raises(InvalidRequest, match="cannot be read"):
            async with gateway_for(server, **settings):
                pass
    gone = Path("/nonexistent/state.json")
    async with (
        FakeServer(served(0)) as server,
        gateway_for(server, **{**TUNED, "state": gone}) as gateway,
    ):
        for _ in range(12):
            await ask(gateway)
    assert "cannot write /nonexistent/state.json" in caplog.text


async def test_a_client_that_leaves_is_no_evidence() -> None:
    script = Script([GOOD] * 5, fault="reset", after=3)
    async with FakeServer(script) as server, gateway_for(server, **TUNED) as gateway:
        await post(gateway.url + COMPLETIONS, completion_body())
        assert gateway.observers.tuning is not None
        assert gateway.observers.tuning.finished == 0
