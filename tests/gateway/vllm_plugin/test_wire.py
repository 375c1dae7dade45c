"""What travels between gateway and engine arrives as it was sent."""

from __future__ import annotations

import pytest

from espo_gateway.errors import InvalidRequest
from espo_gateway.stop.estimate import FEATURES, SuccessEstimator
from espo_gateway.stop.gate_json import Mode
from espo_gateway.stop.rules import Gate
from espo_gateway.vllm_plugin.wire import (
    Order,
    Told,
    order_fields,
    order_of,
    stop_reason_of,
    told_by,
)

ESTIMATED = Gate(
    rule="success-probability",
    estimator=SuccessEstimator((0.1,) * (len(FEATURES) + 1), 0.3, ("history",)),
)


@pytest.mark.parametrize("gate", [Gate(), Gate(rule="regret-only", beta=1 / 3), ESTIMATED])
@pytest.mark.parametrize("mode", ["enforce", "shadow"])
@pytest.mark.parametrize("history", [None, 0, -1.5])
@pytest.mark.parametrize("trace", [False, True])
def test_an_order_arrives(gate: Gate, mode: Mode, history: float | None, trace: bool) -> None:
    fields = order_fields(gate, mode=mode, history=history, trace=trace)
    assert order_of({**fields, "of another": [1]}) == Order(gate, mode, 0.0, history, True, trace)


def test_a_text_is_read_once() -> None:
    fields = order_fields(Gate(beta=3.25), mode="enforce", history=None, trace=False)
    one, other = order_of(fields), order_of(dict(fields))
    assert one is not None
    assert other is not None
    assert one.gate is other.gate


def test_none_is_ordered() -> None:
    assert order_of(None) is None
    assert order_of({"mine": 1}) is None
    assert order_of({"espo_mode": "off"}) is None


@pytest.mark.parametrize("value", [True, None, [0.5], "0.5", -0.1, float("nan"), float("inf")])
def test_a_wrong_number_is_named(value: object) -> None:
    with pytest.raises(InvalidRequest, match="espo_audit: must be a number in"):
        order_of({"espo_gate": "{}", "espo_audit": value})


@pytest.mark.parametrize(
    "told",
    [
        Told(tokens=3),
        Told(tokens=9, mode="shadow", cut=8, z=0.1 + 0.2, threshold=1e-9, value=0.5, missing=1),
        Told(tokens=1, stop_reason=77, fault="a", trace=[(None, 0.0, None, None)]),
        Told(tokens=4, weights=[(0, "a"), (3, "b")]),
    ],
)
def test_a_record_arrives(told: Told) -> None:
    assert told_by(stop_reason_of(told)) == told


@pytest.mark.parametrize(
    "reason", [None, 5, "espo", "stop", "espo:", "espo:{", "espo:[]", ["espo:"]]
)
def test_what_is_no_record_is_none(reason: object) -> None:
    assert told_by(reason) is None
