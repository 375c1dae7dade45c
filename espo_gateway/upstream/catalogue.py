"""Which of several servers has a model: as they say, asked now and then and when it must be known.

No model is refused here. One that no server lists may be an alias, or loaded a moment ago: it goes
to a server that has not said what it serves, else to any.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from espo_gateway.upstream.server import Upstream

#: Seconds before servers are asked again, for a model that none lists or as one lists none.
_ASKED_AGAIN = 1.0

Models = list[dict[str, Any]]


class Catalogue:
    """The models of some servers.

    ask: what a server says it serves, None when it does not say. clock: seconds, monotonic.
    """

    def __init__(
        self,
        servers: Sequence[Upstream],
        ask: Callable[[Upstream, Mapping[str, str]], Coroutine[Any, Any, Models | None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._servers = servers
        self._ask = ask
        self._clock = clock
        self._asked = float("-inf")
        self._asking: set[asyncio.Task[None]] = set()

    async def learn(self, server: Upstream, headers: Mapping[str, str]) -> None:
        """Ask one server."""
        if (listed := await self._ask(server, headers)) is not None:
            server.models = frozenset(str(model["id"]) for model in listed)

    async def serving(self, model: object, headers: Mapping[str, str]) -> Sequence[Upstream]:
        """The servers that a request for a model may go to; at least one.

        headers: by which the servers may be asked, if need be.
        """
        if not isinstance(model, str) or len(self._servers) == 1:
            return self._servers
        holders = self._holders(model)
        silent = [s for s in self._servers if s.models is None]
        if (not holders or silent) and self._clock() - self._asked >= _ASKED_AGAIN:
            self._asked = self._clock()
            for server in self._servers:
                task = asyncio.create_task(self.learn(server, headers))
                task.add_done_callback(self._asking.discard)
                self._asking.add(task)
        while self._asking and not holders:
            # One that hangs holds up nobody whose model another has.
            await asyncio.wait(self._asking, return_when=asyncio.FIRST_COMPLETED)
            holders = self._holders(model)
        if any(server.available for server in holders):
            return holders
        return [*holders, *(s for s in self._servers if s.models is None)] or self._servers

    def _holders(self, model: str) -> list[Upstream]:
        return [s for s in self._servers if s.models is not None and model in s.models]

    def close(self) -> None:
        """Ask no more."""
        for task in self._asking:
            task.cancel()
