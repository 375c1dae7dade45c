r"""The answer probe: how likely the policy itself finds the reference answer, after a prefix.

The server that samples a stream is asked to go on after the tokens so far and a phrase ("The final
answer is \boxed{"), greedily and for no longer than the answer, and to tell the logprobs of the
answer's tokens. So it reads a cached prefix and a phrase, and samples a few tokens. Where its own
word is not the answer's the rest of the answer is not asked for: what stands is an upper bound.

Who knows the answer is the trainer, which rewards by it. As a reward the same likelihood is in
RLPR (arXiv 2506.18254) and VeriFree (arXiv 2505.21493).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from prometheus_client import CollectorRegistry

from espo_gateway.config import COMPLETIONS
from espo_gateway.critic.metrics import ProbeMetrics
from espo_gateway.critic.server import FailureLog
from espo_gateway.errors import UpstreamError, UpstreamProtocolError
from espo_gateway.stop.told import Probe
from espo_gateway.stream.request import WHOLE_POLICY
from espo_gateway.upstream.pool import UpstreamPool

#: Tokens of the answer that are asked for at most.
LONGEST = 8
#: Log-likelihoods are not told below this: beyond it an answer is as good as impossible.
FLOOR = -20.0


class Probed(NamedTuple):
    """Log-likelihoods, in nats; and how many tokens it took to ask.

    first: of the answer's first token. answer: of it up to where the policy says another thing.
    best: of the first token that the policy says.
    """

    first: float
    answer: float
    best: float
    tokens: int

    @property
    def told(self) -> list[float]:
        """As the source "probe" tells it."""
        return [self.first, self.answer, self.best]


class AnswerProbe:
    """Asks the servers of a pool.

    Args:
        timeout: seconds for one question.
        registry: where its metrics are to be found.
    """

    def __init__(
        self,
        pool: UpstreamPool,
        *,
        timeout: float = 60.0,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._pool = pool
        self._timeout = timeout
        self._failures = FailureLog("answer probe")
        self._metrics = ProbeMetrics(registry)

    async def ask(
        self,
        probe: Probe,
        model: object,
        prefix: Sequence[int],
        *,
        headers: Mapping[str, str] | None = None,
        key: bytes | None = None,
    ) -> Probed:
        """What it says after a prefix, prompt included.

        Args:
            headers: of the request beside its content's type, such as a key.
            key: goes to the server that other requests of this key go to.

        Raises:
            UpstreamError: the server gave no answer.
        """
        data = msgspec.json.encode(probe_body(probe, model, prefix))
        headers = {**(headers or {}), "Content-Type": "application/json"}
        sent: dict[str, Any] = {"headers": headers, "data": data, "key": key, "model": model}
        try:
            with self._metrics.question():
                probed = await self._answer(probe, sent)
        except UpstreamError as error:
            self._failures.tell(error.message)
            raise
        self._metrics.tokens.inc(probed.tokens)
        return probed

    async def _answer(self, probe: Probe, sent: Mapping[str, Any]) -> Probed:
        """Of one request; whatever is wrong with it is an UpstreamError."""
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._pool.open("POST", COMPLETIONS, **sent) as reply,
            ):
                body = await reply.body()
                if reply.status == 200:
                    return read_probe(probe, msgspec.json.decode(body))
                problem = f"HTTP {reply.status}"
        except TimeoutError as error:
            raise UpstreamError(f"no answer within {self._timeout:g} s") from error
        except ValueError as error:  # msgspec's too
            raise UpstreamProtocolError(str(error)) from error
        raise UpstreamProtocolError(problem)


def probe_body(probe: Probe, model: object, prefix: Sequence[int]) -> dict[str, Any]:
    """The request."""
    answer = probe.answer[:LONGEST]
    return {
        "model": model,
        "prompt": [*prefix, *probe.phrase],
        "max_tokens": len(answer),
        "temperature": 0.0,
        "top_p": 1.0,
        **WHOLE_POLICY,
        "logprobs": 1,
        "logprob_token_ids": sorted(set(answer)),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def read_probe(probe: Probe, answer: Any) -> Probed:
    """What the decoded answer says. Raises ValueError: it does not tell the answer's logprobs."""
    try:
        [choice] = answer["choices"]
        sampled, told = choice["token_ids"], choice["logprobs"]["top_logprobs"]
        best = float(choice["logprobs"]["token_logprobs"][0])
        likelihoods: list[float] = []
        for wanted, said, numbers in zip(probe.answer[:LONGEST], sampled, told, strict=False):
            logprob = float(numbers[f"token_id:{wanted}"])
            if not math.isfinite(logprob + best):
                raise ValueError("no number")
            likelihoods.append(max(logprob, FLOOR))
            if said != wanted:
                break
        answered = max(math.fsum(likelihoods), FLOOR)
        return Probed(likelihoods[0], answered, max(best, FLOOR), len(sampled))
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            "the server does not tell the logprobs of given tokens (logprob_token_ids, vLLM 0.31 "
            "and later)"
        ) from error
