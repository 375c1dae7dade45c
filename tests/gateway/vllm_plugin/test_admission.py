"""The API server's part, without vLLM: what it says of itself, and what it refuses."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from espo_gateway.errors import InvalidRequest
from espo_gateway.stop.rules import Gate
from espo_gateway.vllm_plugin import SCHEDULER, admission
from espo_gateway.vllm_plugin.admission import EngineRoute, check_order, is_tested
from espo_gateway.vllm_plugin.wire import ROUTE, Order

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
    assert await asked(ROUTE, scheduler_cls=SCHEDULER) == {"decides": True, "vllm": "0.32.1"}
    for other in (None, "a.B"):
        told = await asked(ROUTE, scheduler_cls=other)
        assert told["decides"] is False
        assert SCHEDULER in told["reason"]
    monkeypatch.setattr(admission, "_version", lambda _: "0.33.0")
    told = await asked(ROUTE, scheduler_cls=SCHEDULER)
    assert (told["decides"], "0.33.0" in told["reason"]) == (False, True)


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
        check_order(order, params, model)
        return
    with pytest.raises(InvalidRequest, match=said) as caught:
        check_order(order, params, model)
    assert caught.value.param == "espo_gate"
