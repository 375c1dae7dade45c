"""What is asked about one stream of the sources there are: put in order, answered in any."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from espo_gateway.stop.told import Answers, SourceName
from espo_gateway.stream.session import Session

log = logging.getLogger(__name__)

#: Asks a source about the token ids of a prompt and of what was sampled. Any exception: no answer.
Ask = Callable[[Sequence[int], Sequence[int]], Awaitable[Sequence[float]]]

#: Answers one stream may wait for; it is read no further until there are fewer.
MAX_UNANSWERED = 16


class Inquiry:
    """The questions of one session; their answers may come late and out of order."""

    def __init__(self, sources: Mapping[SourceName, Ask], session: Session) -> None:
        self._sources = sources
        self._session = session
        self._tasks: dict[asyncio.Task[Answers], int] = {}

    async def proceed(self) -> None:
        """Put new questions, hand over the answers there are; waits only when too many are out."""
        session = self._session
        if session.questions and not (session.prompt_token_ids and session.token_ids):
            session.give_up(
                f"{' and '.join(self._sources)} need token ids and the upstream does not send "
                "them (return_token_ids): use vLLM, or a gate that asks nobody"
            )
        for token in session.questions:
            # They see the prefix as it was at that token, whatever has arrived since.
            question = self._ask(session.prompt_token_ids, session.token_ids[:token])
            self._tasks[asyncio.create_task(question)] = token
        session.questions.clear()
        if self._tasks:
            await asyncio.sleep(0)  # lets an answer that is there already be seen
        self._collect()
        while len(self._tasks) > MAX_UNANSWERED:
            await self._wait()

    async def _ask(self, prompt: Sequence[int], sampled: Sequence[int]) -> Answers:
        """What the sources answer, of those that do."""
        one, *others = (
            self._answer(source, ask, prompt, sampled) for source, ask in self._sources.items()
        )
        # Alone it has no task of its own, so that an answer that is there is seen at once.
        found = await asyncio.gather(one, *others) if others else [await one]
        return {source: answer for source, answer in found if answer is not None}

    async def _answer(
        self, source: SourceName, ask: Ask, prompt: Sequence[int], sampled: Sequence[int]
    ) -> tuple[SourceName, Sequence[float] | None]:
        try:
            return source, await ask(prompt, sampled)
        except Exception as error:
            log.debug("%s: no answer: %r", source, error)
            return source, None

    async def conclude(self) -> None:
        """Wait for every answer that could still move the cut."""
        while self._tasks:
            await self._wait()

    async def _wait(self) -> None:
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        self._collect()

    def _collect(self) -> None:
        for task in [task for task in self._tasks if task.done()]:
            self._session.answer(self._tasks.pop(task), task.result())
        if self._session.decided:
            self.close()

    def close(self) -> None:
        """Drop what is still out."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
