"""vLLM's own scheduler, ours in it, driven without a model: a worker that samples by a table."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from espo_gateway.vllm_plugin import VALUE_HEAD, VALUE_WORKER, VALUES
from espo_gateway.vllm_plugin.scheduler import EspoScheduler
from tests.helpers.models import random_checkpoint

BLOCK, EOS, TOP = 16, 3, 8
init_none_hash(sha256)
_hashed = get_request_block_hasher(BLOCK, sha256)


@lru_cache
def vllm_config(
    *, asynchronous: bool, drafts: int = 0, values: bool = False, **options: Any
) -> Any:
    """Of a tiny model on a CPU."""
    path = random_checkpoint(Path(mkdtemp()) / "checkpoint", 0)
    speculative = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 2}
    config: Any = EngineArgs(
        model=str(path),
        **{
            **{"max_model_len": 512, "dtype": "float32", "enforce_eager": True},
            **{"block_size": BLOCK, "max_num_batched_tokens": 512, "max_num_seqs": 256},
            "speculative_config": speculative if drafts else None,
            **options,
        },
    ).create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous
    if values:
        config.additional_config = {VALUE_HEAD: str(path)}
        config.parallel_config.worker_cls = VALUE_WORKER
    return config


@dataclass
class Rollout:
    """What the table has for one request.

    rows: the sampled token's logprob and the largest, falling, of each token.
    values: V of the state that each was sampled in.
    """

    tokens: list[int]
    rows: list[list[float]]
    values: list[float]


def rollout(seed: int, length: int, *, top: int = TOP, ends: bool = False) -> Rollout:
    """Random. ends: its last token is EOS."""
    chance = random.Random(seed)
    tokens, rows = [], []
    for _ in range(length):
        weights = sorted((chance.expovariate(1.0) + 1e-9 for _ in range(20)), reverse=True)
        logprobs = np.log(np.array(weights) / sum(weights)).astype(np.float32).tolist()
        # Mostly the best, sometimes a poor one: z goes up and down.
        chosen = chance.randrange(20) if chance.random() < 0.3 else 0
        rows.append([logprobs[chosen], *logprobs[:top]])
        tokens.append(chance.randrange(10, 60))
    if ends:
        tokens[-1] = EOS
    values = np.random.default_rng(seed).random(length, dtype=np.float32)
    return Rollout(tokens, rows, values.tolist())


@dataclass
class Answer:
    """What a client of the engine has been sent."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    reason: str | None = None
    stop_reason: int | str | None = None


class Engine:
    """The engine core's loop around a scheduler.

    blocks: of the KV cache. values: the worker tells V. deep: steps under way at a time.
    sampled: tokens that the worker has sampled, by request. worker_params: what it is asked.
    """

    def __init__(
        self,
        *,
        asynchronous: bool = True,
        blocks: int = 1000,
        drafts: int = 0,
        values: bool = False,
        **options: Any,
    ) -> None:
        config = vllm_config(asynchronous=asynchronous, drafts=drafts, values=values, **options)
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        self.scheduler: Any = EspoScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
        )
        self.answers: dict[str, Answer] = {}
        self.sampled: dict[str, int] = {}
        self.worker_params: dict[str, SamplingParams] = {}
        self.preempted = 0
        self._deep = 2 if asynchronous else 1
        self._drafts, self._values = drafts, values
        self._table: dict[str, Rollout] = {}
        self._flying: deque[tuple[Any, ModelRunnerOutput]] = deque()

    def add(
        self,
        name: str,
        rollout: Rollout,
        fields: dict[str, Any] | None = None,
        *,
        prompt: Sequence[int] = tuple(range(4, 20)),
        resumable: bool = False,
        **params: Any,
    ) -> None:
        """A request comes. fields: of `vllm_xargs`."""
        sampling = SamplingParams(
            extra_args=fields, **{"max_tokens": len(rollout.tokens), **params}
        )
        sampling.update_from_generation_config({}, EOS)
        self._table[name] = rollout
        self.answers[name], self.sampled[name] = Answer(), 0
        self.scheduler.add_request(
            Request(
                name,
                list(prompt),
                sampling,
                None,
                block_hasher=_hashed,
                resumable=resumable,
            )
        )

    def run(self) -> dict[str, Answer]:
        """Until all is over."""
        while self.scheduler.has_unfinished_requests() or self._flying:
            self.step()
        self.step()
        return self.answers

    def step(self) -> None:
        """Schedule as far ahead as may be, and take the oldest step's output."""
        while len(self._flying) < self._deep:
            scheduled = self.scheduler.schedule()
            if not scheduled.total_num_scheduled_tokens and self._flying:
                break
            self._flying.append((scheduled, self._worked(scheduled)))
        outputs = self.scheduler.update_from_output(*self._flying.popleft())
        for client in outputs.values():
            for output in client.outputs:
                answer = self.answers[output.request_id]
                assert answer.reason is None, "an answer goes on after its end"
                answer.tokens += output.new_token_ids
                if output.new_logprobs is not None:
                    answer.logprobs += output.new_logprobs.logprobs.tolist()
                if output.finish_reason is not None:
                    answer.reason = str(output.finish_reason)
                    answer.stop_reason = output.stop_reason
        if self._drafts and self._deep == 1:
            running = [request.request_id for request in self.scheduler.running]
            drafts = [[7] * self._drafts for _ in running]
            self.scheduler.update_draft_token_ids(DraftTokenIds(running, drafts))

    def _worked(self, scheduled: Any) -> ModelRunnerOutput:
        names = list(scheduled.num_scheduled_tokens)
        self.worker_params |= {n.req_id: n.sampling_params for n in scheduled.scheduled_new_reqs}
        self.preempted += len(scheduled.preempted_req_ids or ())
        tokens: list[list[int]] = []
        rows: list[list[float]] = []
        values: list[float] = []
        starts = [0]
        for name in names:
            request, table = self.scheduler.requests[name], self._table[name]
            drafts = len(scheduled.scheduled_spec_decode_tokens.get(name, ()))
            first = request.num_computed_tokens - request.num_prompt_tokens
            if self._drafts:  # what was accepted of the last ones the worker alone knows
                first = self.sampled[name]
            some = range(first, first)
            if not request.is_prefill_chunk:
                accepted = random.Random(f"{name} {first}").randrange(drafts + 1)
                some = range(first, first + 1 + accepted)
            # Asynchronously the worker samples on past what it does not know to be the end.
            tokens.append([table.tokens[i % len(table.tokens)] for i in some])
            rows += [table.rows[i % len(table.rows)] for i in some]
            values += [table.values[i % len(table.values)] for i in some] or [0.0]
            if not some and not self._drafts:
                rows.append([0.0] * (TOP + 1))  # of a prompt's first part: a row of no meaning
            starts.append(len(rows))
            self.sampled[name] += len(some)
        logprobs = np.array(rows, dtype=np.float32).reshape(-1, TOP + 1)
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=tokens,
            logprobs=LogprobsLists(
                np.zeros_like(logprobs, dtype=np.int32),
                logprobs,
                np.zeros(len(rows), dtype=np.int32),
                starts if self._drafts else None,
            ),
        )
        if self._values:
            setattr(output, VALUES, torch.tensor(values))
        return output
