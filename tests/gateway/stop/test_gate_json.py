"""Gates and controls pushed as JSON: what is refused, and how it is told."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import numpy as np
import pytest

from espo_gateway.errors import InvalidRequest
from espo_gateway.stop.estimate import FEATURES, SuccessEstimator
from espo_gateway.stop.gate_json import (
    Control,
    control_from_json,
    gate_from_json,
    gate_to_dict,
    gate_to_json,
)
from espo_gateway.stop.regret import MonitorConfig, RegretStatistics
from espo_gateway.stop.rules import Gate
from espo_gateway.testing import FakeServer
from tests.helpers.gateway import FAILING, GATE, gateway_for


def test_a_gate_survives_the_wire() -> None:
    gate = Gate(
        version=7,
        weights_version="step-7",
        rule="value-gated",
        value="stream",
        statistics=RegretStatistics(mean=0.1, variance=0.3, batches=4),
        monitor=MonitorConfig(clip=3),
        estimator=SuccessEstimator(weights=tuple(i / 7 for i in range(len(FEATURES))), bias=-1.0),
    )
    assert gate_from_json(gate_to_json(gate), has_critic=False) == gate


#: A gate as it lies in rollouts, states and folders of results.
ON_DISK = b"""
{"version": 7, "weights_version": "step-7", "rule": "value-gated",
 "statistics": {"mean": 0.1, "variance": 0.3, "decay": 0.99, "batches": 4},
 "monitor": {"smoothing": 0.9, "clip": 3.0, "delta": 1e-6},
 "beta": 2.5, "epsilon": 0.2, "value": "stream", "constant": 1.0,
 "critic_wrong": -1.0, "critic_right": 1.0,
 "estimator": {"weights": [0.0, 1.5, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25],
               "bias": -1.0},
 "p_star": 0.05, "confidence": 1.0, "confidence_window": 2048, "confidence_top_k": 20,
 "hazard": 0.0, "min_tokens": 4}
"""


def test_a_gate_on_disk_is_written_and_read_as_ever() -> None:
    gate = Gate(
        version=7,
        weights_version="step-7",
        rule="value-gated",
        value="stream",
        statistics=RegretStatistics(mean=0.1, variance=0.3, batches=4),
        monitor=MonitorConfig(clip=3.0),
        beta=2.5,
        critic_wrong=-1.0,
        estimator=SuccessEstimator(weights=(0.0, 1.5, -2.0, *[0.0] * 8, 0.25), bias=-1.0),
    )
    assert gate_from_json(ON_DISK, has_critic=False) == gate
    written, before = gate_to_dict(gate), json.loads(ON_DISK)
    before["estimator"]["sources"] = []
    before["estimator"]["weights"] += [0.0] * 3  # of features that came later
    assert json.loads(gate_to_json(gate)) == written == written | before
    # Before a critic had a unit of its own, and a rule its confidence.
    assert gate_from_json(b'{"rule": "regret-only", "beta": 3}', has_critic=False).critic_wrong == 0


def test_numbers_of_numpy_are_written() -> None:
    gate = Gate(beta=np.float64(2.5), statistics=RegretStatistics(mean=np.float64(0.1)))
    assert gate_from_json(gate_to_json(gate), has_critic=False) == gate


@pytest.mark.parametrize(
    ("gate", "field", "message"),
    [
        ({"betta": 1}, "betta", "did you mean beta?"),
        ({"monitor": {"clp": 1}}, "monitor.clp", "did you mean clip?"),
        ({"xyz": 1}, "xyz", "known fields: version"),
        ({"beta": 0}, "beta", "must be positive"),
        ({"beta": "7"}, "beta", "valid number"),
        ({"version": True}, "version", "valid integer"),
        ({"version": 1.5}, "version", "valid integer"),
        ({"rule": "stop"}, "rule", "'regret-only'"),
        ({"monitor": {"clip": -1}}, "monitor.clip", "must be positive"),
        ({"statistics": {"decay": 1}}, "statistics.decay", r"must lie in \[0, 1\)"),
        (
            {"estimator": {"weights": [1.0], "bias": 0}},
            "estimator.weights",
            f"{len(FEATURES)} entries",
        ),
        ({"rule": "success-probability"}, "rule", "needs an estimator"),
        ({"rule": "value-gated", "value": "critic"}, "value", "needs a critic server"),
        ({"rule": "value-only", "value": "critic"}, "value", "needs a critic server"),
        ({"rule": "random", "hazard": 2}, "hazard", r"must lie in \[0, 1\]"),
        ([], None, "must be a JSON object"),
        ({"monitor": 3}, "monitor", "an object"),
        (
            {"confidence_window": 10**20},
            "confidence_window",
            "valid integer|must lie between 1 and",
        ),
        ({"confidence_window": 2**40}, "confidence_window", "must lie between 1 and"),
        ({"schedule": {"every": 96, "growth": 1e308}}, "schedule.growth", "between 0 and 100"),
        ({"schedule": {"every": 2**40}}, "schedule.every", "must lie between 0 and"),
    ],
)
def test_a_bad_gate_names_the_field(gate: Any, field: str | None, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        gate_from_json(json.dumps(gate).encode(), has_critic=False)
    assert caught.value.param == field
    assert caught.value.status == 400


@pytest.mark.parametrize("data", [b"", b"{", b'{"beta": NaN}', b'{"statistics": {"mean": 1e999}}'])
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"not valid JSON|finite"):
        gate_from_json(data, has_critic=False)


@pytest.mark.parametrize("rule", ["value-gated", "value-only"])
def test_a_critic_makes_its_gate_legal(rule: str) -> None:
    data = json.dumps({"rule": rule, "value": "critic"}).encode()
    assert gate_from_json(data, has_critic=True).needs_critic


def test_a_rule_that_asks_no_critic_needs_none() -> None:
    data = b'{"rule": "regret-only", "value": "critic"}'
    assert not gate_from_json(data, has_critic=False).needs_critic


def test_what_is_nested_too_deep_is_no_gate() -> None:
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        gate_from_json(b"[" * 100_000, has_critic=False)


def test_a_control_replaces_only_what_it_names() -> None:
    gate = Gate(rule="value-gated", beta=3.0, epsilon=0.1)
    control = control_from_json({"beta": 2, "constant": 0.5, "hazard": 0.1, "min_tokens": 9})
    assert control.applied(gate) == Gate(
        rule="value-gated", beta=2.0, epsilon=0.1, constant=0.5, hazard=0.1, min_tokens=9
    )
    assert control_from_json(None) == Control()
    with pytest.raises(InvalidRequest, match="min_tokens must lie between 1 and"):
        control_from_json({"min_tokens": 0}).applied(gate)


async def test_push_and_read_over_http() -> None:
    async with (
        FakeServer(FAILING) as server,
        gateway_for(server, gate=None) as gateway,
        aiohttp.ClientSession(gateway.url) as session,
    ):
        async with session.get("/espo/gate") as response:
            assert (await response.json())["rule"] == "none"
        async with session.put("/espo/gate", data=GATE) as response:
            assert response.status == 200
            assert (await response.json())["beta"] == 1.0
        async with session.put("/espo/gate", data=b'{"beta": -1}') as response:
            assert response.status == 400
            assert (await response.json())["error"]["param"] == "beta"
        assert gateway.gate.version == 3  # a refused gate changes nothing
