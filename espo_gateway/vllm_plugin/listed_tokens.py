"""Largest logprobs for every request of a batch in which one lists tokens of its own.

An answer probe lists tokens (`logprob_token_ids`). In a step with such a request vLLM's V1 sampler
gathers listed logprobs for the whole batch, and a request that lists none gets its sampled token's
and padding: its regret would be unknown at every token that shares a step with a question.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def tell_largest() -> None:
    """Have vLLM's V1 sampler gather, for a request that lists no tokens, its likeliest; once."""
    from vllm.v1.sample.sampler import Sampler

    gather = Sampler.gather_specific_token_logprobs

    @functools.wraps(gather)
    def with_largest(
        self: Any, logprobs: Any, logprob_token_ids: dict[int, list[int]], sampled: Any
    ) -> Any:
        others = [row for row in range(logprobs.shape[0]) if row not in logprob_token_ids]
        if logprob_token_ids and others:
            width = max(map(len, logprob_token_ids.values()))
            largest = logprobs[others].topk(width, dim=-1).indices.tolist()
            logprob_token_ids = {**logprob_token_ids, **dict(zip(others, largest, strict=True))}
        return gather(self, logprobs, logprob_token_ids, sampled)

    Sampler.gather_specific_token_logprobs = with_largest
