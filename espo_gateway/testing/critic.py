"""`FakeCritic`: a critic server on a real port that values prefixes as told, or misbehaves.

async with FakeCritic(lambda prefix: 0.5) as critic:
    ...                                 # talk to critic.url, as --critic of a gateway
    critic.fault = "hang"
assert [len(prefixes) for prefixes in critic.requests] == [3, 1]
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, Literal

from aiohttp import web

from espo_gateway.testing import Fake

#: What can go wrong with a request: an error status, no answer, a dropped connection, an answer
#: that is no JSON, one with a value too few, one with two labels.
Fault = Literal["error", "hang", "reset", "garbage", "short", "labels"]


class FakeCritic(Fake):
    """Answers `/pooling` as vLLM does, all prefixes of a request by `value`.

    value: from a prefix's token ids to V; NaN is sent as null.
    gated: a request is answered only as `release` allows.
    max_model_len: told to clients; a request with a longer prefix is refused whole.

    Attributes:
        fault: how the requests to come go wrong; may be changed at any time.
        requests: the prefixes of each request; questions: how many in all.
        running, most: requests under way, and the most there were at once.
        aborted: requests whose client left.
    """

    def __init__(
        self,
        value: Callable[[list[int]], float],
        *,
        fault: Fault | None = None,
        gated: bool = False,
        max_model_len: int = 2**20,
        port: int = 0,
    ) -> None:
        super().__init__(gated=gated, port=port)
        self.value, self.fault, self.max_model_len = value, fault, max_model_len
        self.requests: list[list[list[int]]] = []
        self.questions = self.running = self.most = self.aborted = 0

    def _add_routes(self, app: web.Application) -> None:
        app.router.add_post("/pooling", self._pooling)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "critic", "max_model_len": self.max_model_len}]})

    async def _pooling(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert body["model"] == "critic"
        assert body["use_activation"] is False
        prefixes: list[list[int]] = body["input"]
        self.requests.append(prefixes)
        await self._count(running=1, questions=len(prefixes))
        self.most = max(self.most, self.running)
        try:
            if self._permits is not None:
                await self._permits.acquire()
            return await self._answer(request, prefixes)
        except asyncio.CancelledError:
            await asyncio.shield(self._count(aborted=1))
            raise
        finally:
            await asyncio.shield(self._count(running=-1))

    async def _answer(self, request: web.Request, prefixes: list[list[int]]) -> web.StreamResponse:
        if self.fault == "hang":
            await asyncio.Event().wait()
        if self.fault == "reset":
            return self._drop(request)
        if self.fault == "garbage":
            return web.Response(text="{not json", content_type="application/json")
        too_long = any(len(prefix) > self.max_model_len for prefix in prefixes)
        if self.fault == "error" or too_long:
            status = 400 if too_long else 500
            return web.json_response({"error": {"message": "as scripted"}}, status=status)
        data: list[dict[str, Any]] = []
        for index, prefix in enumerate(prefixes):
            value = self.value(prefix)
            scores = [None if math.isnan(value) else value] * (2 if self.fault == "labels" else 1)
            data.append({"index": index, "object": "pooling", "data": scores})
        return web.json_response({"data": data[1:] if self.fault == "short" else data})
