"""Collects rollouts from an OpenAI-compatible server, normally the gateway.

Owns the requests in flight and nothing else. A request that fails for good becomes a rollout with
`EndReason.ERROR`; it never fails the step.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

import numpy as np
import openai
from openai.types import Completion
from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from espo_gateway.stop.gate_json import Mode
from espo_gateway.stop.told import Probe
from espo_gateway.stream.chunks import sampled_tokens
from espo_gateway.stream.request import WHOLE_POLICY
from espo_rl.config import RolloutSection, Stopping, TaskSection
from espo_rl.tags import read_tags
from espo_rl.types import EndReason, Problem, Request, Rollout

#: how the error of a rollout begins that took too long
TIMED_OUT = "no answer within rollout.timeout"
#: stands for the problem in a template
PROBLEM = "{problem}"


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> Any: ...

    def apply_chat_template(self, messages: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Prompter:
    """Problem to prompt token ids, through the chat template or as plain text.

    variables: of the chat template; template: with which a problem's prompt was made. special:
    whether answers are wanted with their special tokens, as a tag is one.
    """

    tokenizer: Tokenizer
    chat: bool = True
    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    template: str = PROBLEM
    thought_tags: Sequence[tuple[str, str]] = ()
    special: bool = False

    @classmethod
    def of(cls, tokenizer: Tokenizer, task: TaskSection) -> Prompter:
        """As the recipe asks."""
        tags = chain(*task.thought_tags, *task.answer_tags)
        return cls(
            tokenizer,
            task.chat,
            task.system,
            task.chat_template_kwargs,
            task.template,
            task.thought_tags,
            special=any(_is_special(tag, tokenizer) for tag in tags),
        )

    def __call__(self, problem: Problem) -> list[int]:
        if not self.chat:
            return self.tokenizer.encode(problem.prompt)
        # The template writes the special tokens itself; adding them again would double them.
        return self.tokenizer.encode(self._chat(problem.prompt), add_special_tokens=False)

    def opened(self, problem: Problem) -> str:
        """The tag of a thought that a prompt opens, as DeepSeek-R1's do; mostly none."""
        if self.chat or self._begun:
            return read_tags(self._begun, self.thought_tags)[0]
        # The data set wrote all of it: a tag before its end may be one that it only speaks of.
        end = problem.prompt.rstrip().casefold()
        return next((tag for tag, _ in self.thought_tags if end.endswith(tag.casefold())), "")

    @cached_property
    def _begun(self) -> str:
        """How every answer begins: what follows the problem, which may itself speak of tags."""
        return (self._chat(PROBLEM) if self.chat else self.template).rpartition(PROBLEM)[2]

    def _chat(self, text: str) -> str:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": text})
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.variables
        )


def _is_special(tag: str, tokenizer: Tokenizer) -> bool:
    """Whether a server leaves it out of its texts unless told otherwise, as Magistral's [THINK]."""
    ids = tokenizer.encode(tag, add_special_tokens=False)
    told, texts = tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)
    return tag in told and tag not in texts


@dataclass(frozen=True)
class ProbePhrase:
    """Problem to what the policy is asked along its rollouts: its reference answer."""

    tokenizer: Tokenizer
    phrase: str
    end: str

    @classmethod
    def of(cls, tokenizer: Tokenizer, stopping: Stopping) -> ProbePhrase:
        """As a recipe has it."""
        return cls(tokenizer, stopping.probe_phrase, stopping.probe_end)

    def __call__(self, problem: Problem) -> Probe:
        phrase, answer = (
            self.tokenizer.encode(text, add_special_tokens=False)
            for text in (self.phrase, problem.answer + self.end)
        )
        return Probe(phrase, answer)


class Collector:
    """Asks for completions, a bounded number at a time.

    Use as an async context manager; the client's connections close with it.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        prompter: Prompter,
        config: RolloutSection,
        *,
        probe: ProbePhrase | None = None,
    ) -> None:
        self._model = model
        self._prompter = prompter
        self._config = config
        self._probe = probe
        self._client = openai.AsyncOpenAI(
            base_url=f"{base_url}/v1",
            api_key="EMPTY",
            timeout=config.timeout,
            max_retries=0,
            # By itself it opens 1,000 connections at most, and lets requests wait for one.
            http_client=openai.DefaultAsyncHttpxClient(
                limits=type(openai.DEFAULT_CONNECTION_LIMITS)(
                    max_keepalive_connections=config.concurrency
                ),
                timeout=config.timeout,
            ),
        )

    async def __aenter__(self) -> Collector:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._client.close()

    async def collect(
        self,
        requests: Sequence[Request],
        *,
        temperature: float,
        top_p: float = 1.0,
        on_done: Callable[[Rollout], None] = lambda rollout: None,
    ) -> list[Rollout]:
        """Ask for them all; rollouts in the order of `requests`. `on_done` is for progress bars.

        `top_p` is for evaluation: what is trained on must be sampled from the whole policy.
        """
        slots = asyncio.Semaphore(self._config.concurrency)

        async def one(request: Request) -> Rollout:
            async with slots:
                rollout = await self.rollout(request, temperature, top_p)
            on_done(rollout)
            return rollout

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(request)) for request in requests]
        return [task.result() for task in tasks]

    async def rollout(self, request: Request, temperature: float, top_p: float = 1.0) -> Rollout:
        """Ask for one, at once."""
        prompt_ids: list[int] = []
        try:
            prompt_ids, espo = self._prompter(request.problem), self._espo(request)
            async for attempt in AsyncRetrying(
                retry=retry_if_exception(_transient),
                stop=stop_after_attempt(self._config.retries),
                wait=wait_exponential_jitter(initial=0.2, max=10.0),
                reraise=True,
            ):
                with attempt:
                    completion = await self._client.completions.create(
                        model=self._model,
                        prompt=prompt_ids,
                        max_tokens=self._config.max_tokens,
                        temperature=temperature,
                        top_p=top_p,
                        presence_penalty=0.0,
                        frequency_penalty=0.0,
                        seed=request.seed,
                        logprobs=1,
                        extra_body={
                            **WHOLE_POLICY,
                            "return_token_ids": True,
                            "skip_special_tokens": not self._prompter.special,
                            "espo": espo,
                        },
                    )
            rollout = read_completion(completion, request.problem, prompt_ids, request.mode)
        # What the tokenizer does not take of a problem is a TypeError.
        except (openai.OpenAIError, ValueError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, openai.APITimeoutError):
                reason = f"{TIMED_OUT} = {self._config.timeout:g} s"
            rollout = Rollout(
                problem=request.problem,
                prompt_ids=prompt_ids,
                token_ids=[],
                logprobs=np.empty(0),
                max_logprobs=np.empty(0),
                text="",
                end=EndReason.ERROR,
                kept=0,
                error=reason,
            )
        rollout.group, rollout.seed = request.group, request.seed
        rollout.history = request.history
        rollout.opened = self._prompter.opened(request.problem)
        return rollout

    def _espo(self, request: Request) -> dict[str, Any]:
        """What the gateway is told."""
        espo: dict[str, Any] = {"mode": request.mode}
        if request.gate is not None:
            espo["gate"] = request.gate
        if request.history is not None:
            espo["history"] = request.history
        if self._probe is not None and (request.problem.answer or self._probe.end):
            espo["probe"] = dataclasses.asdict(self._probe(request.problem))
        return espo


def _transient(error: BaseException) -> bool:
    """Whether the same request may well succeed: one that took too long would do so again."""
    lost = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)
    return isinstance(error, lost) and not isinstance(error, openai.APITimeoutError)


def read_completion(
    completion: Completion, problem: Problem, prompt_ids: list[int], mode: Mode
) -> Rollout:
    """The rollout in a completions answer with logprobs, token ids and perhaps an `espo` record.

    Raises:
        ValueError: the answer has no choice, lacks token ids or logprobs for each of them, or was
            given up by the server.
    """
    if not completion.choices:
        raise ValueError("the server's answer has no choice in it")
    choice = completion.choices[0].to_dict()
    token_ids: Any = choice.get("token_ids")
    tokens = sampled_tokens(choice)
    if not token_ids or len(tokens) != len(token_ids):
        raise ValueError(
            f"{len(token_ids or [])} token ids with {len(tokens)} logprobs: the server must send "
            "both (vLLM with return_token_ids and logprobs)"
        )
    record: Any = choice.get("espo") or {}
    cut, finish = record.get("cut"), choice["finish_reason"]
    if finish not in ("stop", "length"):
        raise ValueError(f"the server gave the completion up: finish_reason {finish!r}")
    audited = cut is not None and mode == "shadow"
    if cut is not None:
        end = EndReason.EARLY_STOP
    else:
        end = EndReason.LENGTH if finish == "length" else EndReason.COMPLETED
    return Rollout(
        problem=problem,
        prompt_ids=prompt_ids,
        token_ids=list(token_ids),
        logprobs=np.array([_number(token.logprob) for token in tokens]),
        max_logprobs=np.array([_number(token.max_logprob) for token in tokens]),
        text=str(choice["text"]),
        end=end,
        kept=cut if audited else len(token_ids),
        audited=audited,
        overshoot=record.get("overshoot", 0),
        gate_version=record.get("gate_version", 0),
        weights_version=record.get("weights_version", ""),
        weights_changes=[
            (at, version)
            for at, version in record.get("weights_changes", [])
            if at < len(token_ids)
        ],
        probes=record.get("probes", []),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
