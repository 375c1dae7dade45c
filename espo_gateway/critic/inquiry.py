"""What is asked of a critic about one stream: put to it in order, answered in any."""

from __future__ import annotations

import asyncio

from espo_gateway.critic.server import ValueServer, log
from espo_gateway.stream.session import Session

#: Answers one stream may wait for; it is read no further until there are fewer.
MAX_UNANSWERED = 16


class Inquiry:
    """The questions of one session; their answers may come late and out of order."""

    def __init__(self, server: ValueServer, session: Session) -> None:
        self._server = server
        self._session = session
        self._tasks: dict[asyncio.Task[float], int] = {}

    async def proceed(self) -> None:
        """Put new questions, hand over the answers there are; waits only when too many are out."""
        session = self._session
        if session.questions and not (session.prompt_token_ids and session.token_ids):
            session.give_up(
                "the critic reads token ids and the upstream does not send them "
                "(return_token_ids): use vLLM, or another value than 'critic'"
            )
        for token in session.questions:
            # The critic sees the prefix as it was at that token, whatever has arrived since.
            prefix = session.token_ids[:token]
            question = self._server.value(session.prompt_token_ids, prefix)
            self._tasks[asyncio.ensure_future(question)] = token
        session.questions.clear()
        if self._tasks:
            await asyncio.sleep(0)  # lets an answer that is there already be seen
        self._collect()
        while len(self._tasks) > MAX_UNANSWERED:
            await self._wait()

    async def conclude(self) -> None:
        """Wait for every answer that could still move the cut."""
        while self._tasks:
            await self._wait()

    async def _wait(self) -> None:
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        self._collect()

    def _collect(self) -> None:
        for task in [task for task in self._tasks if task.done()]:
            token = self._tasks.pop(task)
            error = task.exception()
            if error is not None:
                log.debug("no value: %r", error)
            self._session.answer(token, None if error is not None else task.result())
        if self._session.decided:
            self.close()

    def close(self) -> None:
        """Drop what is still out."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
