"""The trainer's models as servers have them: what is done when one of these falls."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from espo_gateway.vllm_plugin.client import WeightRouteError
from espo_rl.config import Recipe
from espo_rl.servers.served_models import ServedModels

URL = "http://127.0.0.1:9"


class Fleet:
    """One policy server, which hangs, though its /health answers, until it is ended."""

    policy_urls, critic = (URL,), None

    def __init__(self) -> None:
        self.done: list[str] = []

    async def end(self, url: str) -> None:
        self.done.append(f"end {url}")

    async def down(self) -> list[Any]:
        ended = self.done and self.done[-1].startswith("end")
        return [SimpleNamespace(name="policy server")] if ended else []

    async def restart(self, server: Any, say: Any) -> None:
        self.done.append(f"restart {server.name}")


def served(fleet: Any) -> ServedModels:
    trainer: Any = None
    return ServedModels(
        Recipe.model_validate({"model": {"path": "x"}}),
        fleet,
        trainer,
        asyncio.Lock(),
        [],
        say=lambda text: None,
        on_restart=lambda: fleet.done.append("counted"),
    )


async def test_a_server_without_an_answer_is_started_anew_whatever_its_health_says() -> None:
    fleet, tries = Fleet(), 0

    async def sync() -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise WeightRouteError(URL, "/pause", None, "none within 120 s")
        return "synced"

    async with served(fleet) as models:
        assert await models.attempt(sync) == "synced"
    assert fleet.done == [f"end {URL}", "restart policy server", "counted"]


async def test_a_server_that_refuses_is_not() -> None:
    fleet = Fleet()

    async def sync() -> None:
        raise WeightRouteError(URL, "/update_weights", 400, "not this model")

    async with served(fleet) as models:
        with pytest.raises(WeightRouteError, match="not this model"):
            await models.attempt(sync)
    assert fleet.done == []


async def test_a_call_may_take_as_long_as_a_server_may_hang() -> None:
    recipe = Recipe.model_validate({"model": {"path": "x"}, "servers": {"hang_timeout": 777.0}})
    trainer: Any = None
    fleet: Any = Fleet()
    models = ServedModels(
        recipe, fleet, trainer, asyncio.Lock(), [], say=print, on_restart=lambda: None
    )
    assert [client._timeout for client in models._actor._clients] == [777.0]
