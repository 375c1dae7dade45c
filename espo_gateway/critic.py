"""The seam for a critic server: V(s_t) asked for elsewhere, while the stream goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from espo_gateway.session import Session

log = logging.getLogger(__name__)

#: Answers one stream may wait for; it is read no further until there are fewer.
MAX_UNANSWERED = 16


class ValueServer(Protocol):
    """Anything that can value a prefix."""

    async def value(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        """V after the prompt and these sampled tokens. Any exception means: no answer."""


class Inquiry:
    """The questions of one session; their answers may come late and out of order."""

    def __init__(self, server: ValueServer, session: Session) -> None:
        self._server = server
        self._session = session
        self._tasks: dict[asyncio.Task[float], int] = {}

    async def proceed(self) -> None:
        """Put new questions, hand over the answers there are; waits only when too many are out."""
        session = self._session
        for token in session.questions:
            # The critic sees the prefix as it was at that token, whatever has arrived since.
            prefix = session.token_ids[:token]
            question = self._server.value(session.prompt_token_ids, prefix)
            self._tasks[asyncio.ensure_future(question)] = token
        session.questions.clear()
        if self._tasks:
            await asyncio.sleep(0)  # lets an answer that is there already be seen
        self._collect()
        while len(self._tasks) > MAX_UNANSWERED and not session.decided:
            await self._wait()

    async def conclude(self) -> None:
        """Wait for every answer that could still move the cut."""
        while self._tasks and not self._session.decided:
            await self._wait()

    async def _wait(self) -> None:
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        self._collect()

    def _collect(self) -> None:
        for task in [task for task in self._tasks if task.done()]:
            token = self._tasks.pop(task)
            error = task.exception()
            if error is not None:
                log.warning("the critic gave no value: %r", error)
            self._session.answer(token, None if error is not None else task.result())

    def close(self) -> None:
        """Drop what is still out."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
