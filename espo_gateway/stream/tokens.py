"""vLLM's route for trainers, tokens in and tokens out: what differs from the OpenAI routes. Pure.

`/inference/v1/generate` samples from token ids and answers with them. A chunk has the token ids and
logprobs of a chat's shape, with ids for strings, in a choice like a completion's; text only when it
is asked for. What is asked of the sampler stands in `sampling_params`.

A choice that is cut has no `routed_experts` and `weight_versions`: vLLM tells them at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from espo_gateway.errors import InvalidRequest
from espo_gateway.stop.gate_json import control_from_json
from espo_gateway.stream.answer import Answer
from espo_gateway.stream.chunks import Chunk
from espo_gateway.stream.request import (
    MAX_CHOICES,
    Asked,
    Body,
    Plan,
    Single,
    about_logprobs,
    at_least,
    checked_choices,
    child_seed,
    lax,
    stream_asked,
)

#: Fields, of the request and of its sampling parameters, whose answer no stream carries.
_WHOLE = ("kv_transfer_params", "ec_transfer_params")
_SAMPLED_WHOLE = ("prompt_logprobs", "use_beam_search")

_CHOICE: Chunk = {
    **dict.fromkeys(("finish_reason", "stop_reason", "logprobs", "routed_experts")),
    **dict.fromkeys(("sampling_mask", "weight_versions")),
}
_ANSWER = dict.fromkeys(
    (
        *("request_id", "created", "model", "usage", "prompt_logprobs"),
        *("prompt_token_id_logprobs", "prompt_token_ids", "mm_placeholders", "metrics"),
        *("kv_transfer_params", "ec_transfer_params"),
    )
)


def plan_tokens(body: object, *, max_choices: int = MAX_CHOICES) -> Plan:
    """Read a request's body. Raises InvalidRequest."""
    if not isinstance(body, dict):
        raise InvalidRequest("the request body must be a JSON object")
    control = control_from_json(body.get("espo"))
    body = lax({name: value for name, value in body.items() if name != "espo"}, chat=False)
    sampling = body.get("sampling_params")
    if not isinstance(sampling, dict):
        raise InvalidRequest("sampling_params must be an object", param="sampling_params")
    body["sampling_params"] = sampling = lax(sampling, chat=False)
    stream, options = stream_asked(body)
    reason = "asked for" if control.mode == "off" else about_logprobs(sampling)
    for place, names in ((body, _WHOLE), (sampling, _SAMPLED_WHOLE)):
        for name in names:
            if place.get(name):
                reason = reason or f"{name} cannot be streamed"
    logprobs = sampling.get("logprobs")
    if type(logprobs) is int and logprobs >= 0:
        logprobs = max(logprobs, 1)  # the sampled token is always told
    usage = bool(options.get("include_usage"))
    asked = Asked(
        stream=stream,
        usage=usage,
        continuous_usage=usage and bool(options.get("continuous_usage_stats")),
        logprobs=logprobs if type(logprobs) is int else None,
        token_ids=True,
    )
    singles = [] if reason else _singles(body, max_choices)
    return Plan(False, body, control, asked, reason, singles, tokens=True)


def _singles(body: Body, max_choices: int) -> list[Single]:
    sampling = body["sampling_params"]
    n = checked_choices(sampling.get("n"), 1, max_choices)
    ids = body.get("token_ids")
    # Pictures become tokens, too.
    exact = isinstance(ids, list) and not body.get("content_parts")
    length = len(ids) if exact and isinstance(ids, list) else None
    if n == 1:
        return [Single(0, 0, body, length)]
    singles = []
    seed, request_id = sampling.get("seed"), body.get("request_id")
    for index in range(n):
        own = {**sampling, "n": 1}
        if isinstance(seed, int):
            own["seed"] = child_seed(seed, index)
        single = {**body, "sampling_params": own}
        if request_id is not None:
            single["request_id"] = f"{request_id}-{index}"
        singles.append(Single(index, 0, single, length))
    return singles


def upstream_tokens_body(single: Single, *, alternatives: int = 1) -> Body:
    """As `upstream_body`."""
    body = dict(single.body)
    options: Body = {**(body.get("stream_options") or {}), "include_usage": True}
    if single.prompt_tokens is None:
        options["continuous_usage_stats"] = True
    sampling = dict(body["sampling_params"])
    asked = sampling.get("logprobs")
    if alternatives and (asked is None or type(asked) is int):
        # With 1 vLLM sends the sampled token only, as in a chat.
        sampling["logprobs"] = at_least(max(alternatives, 2), asked)
    return {**body, "stream": True, "stream_options": options, "sampling_params": sampling}


def prompt_ids(single: Single) -> list[int]:
    """For a critic."""
    ids = single.body.get("token_ids")
    return list(ids) if isinstance(ids, list) else []


class TokensAnswer(Answer):
    """The chunks of one choice, merged."""

    def __init__(self) -> None:
        super().__init__(chat=False)
        self.choice = {**_CHOICE, "token_ids": []}


def merged_tokens(
    answers: Sequence[Answer], usage: Chunk | None, *, model: Any, created: int
) -> Chunk:
    """The whole answer. created: seconds since 1970."""
    head = {"model": model, "created": created, **answers[0].head}
    return {**_ANSWER, **head, "choices": [a.finished() for a in answers], "usage": usage}
