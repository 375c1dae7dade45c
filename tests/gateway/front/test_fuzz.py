"""A fuzzer drives the gateway by its own description: no failure, and answers as described."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from espo_gateway.front.openapi import description
from espo_gateway.testing import FakeServer, Script
from tests.helpers.gateway import FAILING, gateway_for


def document() -> dict[str, Any]:
    """As served, but for fewer choices a request: a thousand take long, and show nothing more."""
    described = copy.deepcopy(description())
    for path in ("/v1/completions", "/v1/chat/completions"):
        body = described["paths"][path]["post"]["requestBody"]
        body["content"]["application/json"]["schema"]["properties"]["n"]["maximum"] = 4
    return described


SCHEMA = schemathesis.openapi.from_dict(document())
OPERATIONS = {
    f"{operation.method} {operation.path}": operation
    for operation in (cast(Ok[Any], found).ok() for found in SCHEMA.get_all_operations())
}
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]

#: What the fake server answers with a 400, as a server does that checks its fields.
_TYPES: dict[str, type | tuple[type, ...]] = {
    "max_tokens": int,
    "max_completion_tokens": int,
    "logprobs": int,
    "top_logprobs": int,
    "stream_options": dict,
    "return_token_ids": bool,
}


def strict(body: dict[str, Any]) -> Script:
    for name, kind in _TYPES.items():
        value = body.get(name)
        if value is not None and (
            not isinstance(value, kind) or (isinstance(value, int) and value < 0)
        ):
            return Script([], status=400)
    return FAILING


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A gateway in a thread of its own: the fuzzer's client blocks."""
    ready: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        async with FakeServer(strict) as server, gateway_for(server) as gateway:
            ready.set_result((gateway.url, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    address, loop, stop = ready.result(10)
    yield address
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    assert not thread.is_alive()


def test_every_route_is_described() -> None:
    assert len(OPERATIONS) == 11
    # Self-contained: no reference leads nowhere.
    text = json.dumps(described := description())
    named = set(re.findall("#/components/schemas/([A-Za-z]+)", text))
    assert named == set(described["components"]["schemas"])


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name, operation in OPERATIONS.items()
        # Without a body nothing can be got wrong.
        for mode in (list(GenerationMode) if operation.body else [GenerationMode.POSITIVE])
    ],
)
def test_fuzz(name: str, mode: GenerationMode, url: str) -> None:
    operation = OPERATIONS[name]
    used: set[int] = set()
    # A generation's other fields are the server's to refuse; a gate is all the gateway's own.
    stricter = [checks.negative_data_rejection] if name.startswith("put") else []

    @settings(
        max_examples=100,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        response = case.call(base_url=url, timeout=10)
        used.add(response.status_code)
        assert response.status_code < 500, response.text
        case.validate_response(response, checks=[*CHECKS, *stricter])

    run()
    assert used
