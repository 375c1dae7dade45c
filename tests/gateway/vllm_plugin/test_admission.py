"""The API server's part, without vLLM: what it says of itself, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from espo_gateway.errors import InvalidRequest
from espo_gateway.stop.estimate import FEATURES, SuccessEstimator
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import TOLD, Schedule, SourceName, in_order
from espo_gateway.vllm_plugin import SCHEDULER, VALUE_HEAD, admission
from espo_gateway.vllm_plugin.admission import EngineRoute, check_order, is_tested
from espo_gateway.vllm_plugin.head_file import fingerprint
from espo_gateway.vllm_plugin.wire import ROUTE, Order
from tests.helpers.models import headed, random_model

passed: list[str] = []


async def inner(scope: Any, receive: Any, send: Any) -> None:
    passed.append(scope["path"])


async def asked(path: str, **arguments: Any) -> Any:
    """What the route answers; None when the request is passed on."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(**arguments)))
    await EngineRoute(inner)({"type": "http", "path": path, "app": app}, None, send)
    if not sent:
        return None
    head, body = sent
    assert dict(head["headers"])[b"content-length"] == b"%d" % len(body["body"])
    return json.loads(body["body"])


async def test_the_server_says_whether_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_version", lambda name: "0.32.1" if name == "vllm" else None)
    told = {"decides": True, "values": False, "vllm": "0.32.1"}
    assert await asked(ROUTE, scheduler_cls=SCHEDULER) == told
    assert await asked(ROUTE, scheduler_cls=SCHEDULER, additional_config={}) == told
    assert await asked(ROUTE, scheduler_cls=SCHEDULER, additional_config=None) == told
    for other in (None, "a.B"):
        told = await asked(ROUTE, scheduler_cls=other)
        assert told["decides"] is False
        assert SCHEDULER in told["reason"]
    monkeypatch.setattr(admission, "_version", lambda _: "0.33.0")
    told = await asked(ROUTE, scheduler_cls=SCHEDULER)
    assert (told["decides"], "0.33.0" in told["reason"]) == (False, True)


async def test_the_server_says_by_which_head_it_tells_v(tmp_path: Path) -> None:
    one, same, fewer, other = (tmp_path / name for name in "abcd")
    for folder, layers in ((one, 2), (same, 2), (fewer, 1), (other, 2)):
        critic = headed(random_model(0), layers)
        critic.score.weight.data *= 2.0 if folder is other else 1.0
        critic.save_pretrained(folder)
    said: list[str | None] = []
    for folder in (one, same, fewer, other, tmp_path / "none"):
        options = {VALUE_HEAD: str(folder)}
        told = await asked(ROUTE, scheduler_cls=SCHEDULER, additional_config=options)
        assert told["values"] is True
        said.append(told["head"])
    assert said[0] == said[1] == fingerprint(one)
    assert said[-1] is None
    assert len({*said}) == 4


@pytest.mark.parametrize("path", ["/v1/completions", "/health", ROUTE + "/x"])
async def test_all_else_is_passed_on(path: str) -> None:
    passed.clear()
    assert await asked(path, scheduler_cls=SCHEDULER) is None
    assert passed == [path]


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.32.0", True), ("0.32", True), ("0.32.1rc1", True), ("0.320", False), ("0.31.9", False)],
)
def test_versions(version: str, known: bool) -> None:
    assert is_tested(version) is known


@pytest.mark.parametrize(
    ("listed", "wanted", "most", "vocabulary", "said"),
    [
        (None, 20, 20, 100, None),
        (None, 21, 20, 100, "gives 20 logprobs"),
        (None, 50, -1, 100, None),
        (None, 21, 40, 20, "gives 20 logprobs"),
        ([1, 2], 2, 20, 100, "logprob_token_ids"),
    ],
)
def test_what_the_engine_cannot_give(
    listed: Any, wanted: int, most: int, vocabulary: int, said: str | None
) -> None:
    order = Order(Gate(rule="confidence", confidence_top_k=wanted))
    params = SimpleNamespace(logprob_token_ids=listed)
    model = SimpleNamespace(max_logprobs=most, get_vocab_size=lambda: vocabulary)
    if said is None:
        check_order(order, params, model, has_values=False)
        return
    with pytest.raises(InvalidRequest, match=said) as caught:
        check_order(order, params, model, has_values=False)
    assert caught.value.param == "espo_gate"


@pytest.mark.parametrize("sources", [[], ["history"], ["critic"], ["probe"], ["critic", "probe"]])
@pytest.mark.parametrize("has_values", [False, True])
def test_who_is_asked_must_be_in_the_engine(sources: list[SourceName], has_values: bool) -> None:
    weights = (0.0,) * (len(FEATURES) + sum(len(TOLD[name]) for name in sources))
    estimator = SuccessEstimator(weights, 0.0, in_order(sources))
    schedule = Schedule(every=8 if {"critic", "probe"} & {*sources} else 0)
    gate = Gate(rule="success-probability", estimator=estimator, schedule=schedule)
    params = SimpleNamespace(logprob_token_ids=None)
    model = SimpleNamespace(max_logprobs=20, get_vocab_size=lambda: 100)
    if "probe" in sources or ("critic" in sources and not has_values):
        with pytest.raises(InvalidRequest, match=f"{sources[-1]}, which answers beside"):
            check_order(Order(gate), params, model, has_values=has_values)
    else:
        check_order(Order(gate), params, model, has_values=has_values)
