"""V(s_t) from a critic server, asked while the stream goes on.

An `Inquiry` puts the questions of one stream and takes its answers; a `CriticServer` sends the
questions of all streams together. What cannot be answered has no value, and without a value nothing
stops: a critic that is slow, wrong or gone costs stops, never tokens or a request.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, Self

import msgspec
from prometheus_client import CollectorRegistry

from espo_gateway.critic.metrics import CriticMetrics
from espo_gateway.errors import EXCERPT, UpstreamError, UpstreamProtocolError
from espo_gateway.upstream.connection import Limits
from espo_gateway.upstream.pool import UpstreamPool
from espo_gateway.vllm_plugin.pooling import ROUTE, pooled_values, pooling_body

log = logging.getLogger(__name__)

#: Requests at a time: while the server works on one, the next is on its way.
CONCURRENCY = 2
#: Limits of one request. A prefix is sent whole, and writing it must not hold up the streams.
BATCH_QUESTIONS, BATCH_TOKENS = 256, 2**17
#: Seconds between two lines of the log about questions without answer.
LOG_INTERVAL = 30.0

_HEADERS = {"Content-Type": "application/json"}


class ValueServer(Protocol):
    """Anything that can value a prefix."""

    async def value(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        """V after the prompt and these sampled tokens. Any exception means: no answer."""


class EngineCritic:
    """Of servers that know V themselves: what the gateway decides in their place goes without."""

    async def value(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        """Raises UpstreamError, always."""
        raise UpstreamError("only the servers know V (critic 'engine')")


class FailureLog:
    """Questions without a value, told to the log now and then. name: of the critic."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._untold, self._next = 0, 0.0

    def tell(self, problem: str, questions: int = 1) -> None:
        """Take note of that many."""
        self._untold += questions
        now = time.monotonic()
        if self._untold and now >= self._next:
            log.warning("%s: %s; %d questions without a value", self._name, problem, self._untold)
            self._untold, self._next = 0, now + LOG_INTERVAL


class _Model(NamedTuple):
    name: str
    longest: float  # tokens it can read


class CriticServer:
    """V from a vLLM pooling server; an async context manager.

    What is asked while requests are under way goes into the next one. When a request fails, all
    that waits gets no value, and until one succeeds they are sent singly, with only the first
    questions to come; the others get no value at once. So nobody waits for a server that hangs.

        async with CriticServer("http://127.0.0.1:8001") as critic:
            value = await critic.value(prompt_token_ids, token_ids)

    Args:
        timeout: seconds for one request, may be changed at any time; a reload of the critic's
            weights holds requests up.
        registry: where its metrics are to be found.
        headers: of all that it is asked, such as a key.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        registry: CollectorRegistry | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.timeout = timeout
        limits = Limits(first=timeout, idle=timeout)
        self._pool = UpstreamPool([url], limits=limits, headers=headers)
        self.url = self._pool.servers[0].url
        self._model: _Model | None = None
        #: questions not yet sent: the prefix each asks about
        self._waiting: dict[asyncio.Future[float], list[int]] = {}
        self._requests: set[asyncio.Task[None]] = set()
        self._woken = self._failing = False
        self._failures = FailureLog("critic")
        self._metrics = CriticMetrics(registry)
        self._metrics.waiting.set_function(lambda: len(self._waiting))

    async def __aenter__(self) -> Self:
        await self._pool.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for request in self._requests:
            request.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)
        await self._pool.__aexit__()

    @property
    def headers(self) -> Mapping[str, str]:
        """Of all that it is asked; may be changed at any time."""
        return self._pool.headers

    @headers.setter
    def headers(self, headers: Mapping[str, str]) -> None:
        self._pool.headers = headers

    async def answers(self) -> bool:
        """Whether the server answers at all, within a few seconds."""
        return await self._pool.probe(self._pool.servers[0])

    async def value(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        """V after the prompt and these sampled tokens; cancel it to take the question back.

        Raises:
            UpstreamError: the server gave no value.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[float] = loop.create_future()
        self._waiting[answer] = [*prompt_token_ids, *token_ids]
        if not self._woken:
            # Not now: what others ask in this turn of the event loop joins the same request.
            self._woken = True
            loop.call_soon(self._send)
        try:
            with self._metrics.question():
                return await answer
        finally:
            self._waiting.pop(answer, None)

    def _send(self) -> None:
        """Send what waits, as far as requests may be under way."""
        self._woken = False
        while self._waiting and len(self._requests) < (1 if self._failing else CONCURRENCY):
            request = asyncio.create_task(self._ask(self._batch()))
            self._requests.add(request)
            request.add_done_callback(self._done)
        if self._failing:
            refused, self._waiting = self._waiting, {}
            self._fail(refused, f"{self.url} gives no values at the moment")

    def _done(self, request: asyncio.Task[None]) -> None:
        self._requests.discard(request)
        self._send()

    def _batch(self) -> dict[asyncio.Future[float], list[int]]:
        batch: dict[asyncio.Future[float], list[int]] = {}
        tokens = 0
        for answer, prefix in self._waiting.items():
            tokens += len(prefix)
            if batch and (len(batch) == BATCH_QUESTIONS or tokens > BATCH_TOKENS):
                break
            batch[answer] = prefix
        for answer in batch:
            del self._waiting[answer]
        return batch

    async def _ask(self, batch: dict[asyncio.Future[float], list[int]]) -> None:
        try:
            async with asyncio.timeout(self.timeout):
                model = await self._served()
                # One that is too long would have the whole request refused.
                asked = {a: prefix for a, prefix in batch.items() if len(prefix) <= model.longest}
                problem = f"a prefix is longer than its --max-model-len of {model.longest}"
                self._fail(batch.keys() - asked.keys(), f"{self.url}: {problem}")
                values = await self._request(model.name, list(asked.values())) if asked else []
        except Exception as error:
            excerpt = ""
            if isinstance(error, TimeoutError):
                problem = f"{self.url}: no values within {self.timeout:g} s"
            elif isinstance(error, UpstreamError):
                problem, excerpt = error.message, error.excerpt
            else:
                log.exception("a request to the critic failed")
                problem = repr(error)
            self._failing = True
            self._model = None  # another server may come back
            self._metrics.requests.labels("failed").inc()
            self._fail(batch, problem, excerpt)
            return
        self._failing = False
        self._metrics.requests.labels("answered").inc()
        for answer, value in zip(asked, values, strict=True):
            if not math.isfinite(value):
                self._fail([answer], f"{self.url}: a value is no number")
            elif not answer.done():
                answer.set_result(value)

    async def _served(self) -> _Model:
        """The served model, asked of the server once."""
        if self._model is None:
            [listed, *_] = await self._pool.models(self._pool.servers[0]) or [{}]
            if "id" not in listed:
                raise UpstreamProtocolError(f"{self.url}/v1/models names no model")
            self._model = _Model(str(listed["id"]), listed.get("max_model_len") or math.inf)
        return self._model

    async def _request(self, model: str, prefixes: list[list[int]]) -> list[float]:
        data = msgspec.json.encode(pooling_body(model, prefixes))
        headers = {**self.headers, **_HEADERS}
        async with self._pool.open("POST", ROUTE, headers=headers, data=data) as response:
            body = await response.body()
            try:
                if response.status == 200:
                    return pooled_values(msgspec.json.decode(body), len(prefixes))
                problem = f"HTTP {response.status}"
            except ValueError as error:  # msgspec's too
                problem = str(error)
        excerpt = body[:EXCERPT].decode(errors="replace")
        raise UpstreamProtocolError(f"{self.url}{ROUTE}: {problem}", excerpt=excerpt)

    def _fail(
        self, answers: Iterable[asyncio.Future[float]], problem: str, excerpt: str = ""
    ) -> None:
        """End questions without a value; the log hears of it now and then."""
        unanswered = 0
        for answer in answers:
            if not answer.done():
                # One each: an exception raised in many tasks collects the tracebacks of all.
                answer.set_exception(UpstreamError(problem, excerpt=excerpt))
                unanswered += 1
        self._failures.tell(problem, unanswered)
