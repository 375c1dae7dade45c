"""What the tests of a critic server share, alone and in the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from espo_gateway.front.gateway import Gateway
from espo_gateway.testing import FakeServer
from espo_gateway.testing.critic import FakeCritic
from tests.helpers.gateway import (
    CRITIC_GATE,
    gateway_for,
)

#: z first passes β·ε = 1 at token 8; there, at 9 and so on, V decides.
# z passes at token 8; the last of the 16 ended the completion, so nothing can stop it any more.
ASKED = list(range(8, 16))
PROMPT = [1, 2, 3]


def total(prefix: list[int]) -> float:
    """A value that tells which prefix it is of."""
    return float(sum(prefix))


def stop_at(token: int) -> Callable[[list[int]], float]:
    """V is low after that many tokens."""
    return lambda prefix: 0.0 if len(prefix) - len(PROMPT) == token else 100.0


FAULTS = {
    "error": "HTTP 500",
    "reset": "broke off",
    "garbage": "malformed",
    "short": "not one score for each of 1",
    "labels": "not one score for each of 1",
    "hang": r"no values within 0\.2 s",
}


class LockedCritic(FakeCritic):
    """Answers only who has its key."""

    key = "right"

    def _check(self, request: web.Request) -> None:
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            raise web.HTTPUnauthorized

    async def _models(self, request: web.Request) -> web.Response:
        self._check(request)
        return await super()._models(request)

    async def _pooling(self, request: web.Request) -> web.StreamResponse:
        self._check(request)
        return await super()._pooling(request)


@asynccontextmanager
async def gateway_with(
    server: FakeServer, critic: FakeCritic, gate: bytes = CRITIC_GATE, **settings: Any
) -> AsyncIterator[Gateway]:
    async with gateway_for(server, gate=gate, critic=critic.url, **settings) as gateway:
        yield gateway
