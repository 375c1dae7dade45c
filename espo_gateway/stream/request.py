"""A client's request: what it asked for, and the single requests that go upstream for it. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from espo_gateway.config import CHAT, COMPLETIONS, MAX_CHOICES, TOKENS
from espo_gateway.errors import InvalidRequest
from espo_gateway.stop.gate_json import Control, control_from_json

Body = dict[str, Any]

#: What samples from the whole policy: where a request does not say so, vLLM takes what the
#: checkpoint's generation_config.json has.
WHOLE_POLICY = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
_BOOL: TypeAdapter[Any] = TypeAdapter(bool)
_INT: TypeAdapter[Any] = TypeAdapter(int)
_TRUTHS = frozenset({"true", "false", "1", "0"})
#: Fields that are read here, and what servers take them for.
_FIELDS = {
    **dict.fromkeys(("stream", "echo", "use_beam_search", "return_token_ids"), _BOOL),
    **dict.fromkeys(("include_reasoning", "include_stop_str_in_output"), _BOOL),
    **dict.fromkeys(("n", "best_of", "seed", "top_logprobs", "prompt_logprobs"), _INT),
}

#: The largest that vLLM takes for a seed.
_LARGEST_SEED = 2**63 - 1

_LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
_ABOUT_LOGPROBS = re.compile("log_?prob|probs$", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """What the client asked to be told, beside the text.

    logprobs: None for none, else the number of alternatives a token (-1: all).
    """

    stream: bool
    usage: bool
    continuous_usage: bool
    logprobs: int | None
    token_ids: bool


@dataclass(frozen=True)
class Single:
    """One upstream request for one choice of the client's.

    body: as the client wrote it, less `espo`, for this one choice.
    prompt_tokens: the prompt's length when the client sent token ids; None: the server will tell.
    """

    index: int
    prompt: int
    body: Body
    prompt_tokens: int | None


@dataclass(frozen=True)
class Plan:
    """How one client request is served.

    unmonitored: why it is passed through as it is, or None. tokens: whether it goes to vLLM's route
    that takes and gives token ids (`tokens.py`).
    """

    chat: bool
    body: Body
    control: Control
    asked: Asked
    unmonitored: str | None
    singles: list[Single]
    tokens: bool = False

    @property
    def path(self) -> str:
        if self.tokens:
            return TOKENS
        return CHAT if self.chat else COMPLETIONS


def plan(body: object, *, chat: bool, max_choices: int = MAX_CHOICES) -> Plan:
    """Read a request's body. Raises InvalidRequest.

    max_choices: one client request may become at most so many upstream requests.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("the request body must be a JSON object")
    control = control_from_json(body.get("espo"))
    body = lax({name: value for name, value in body.items() if name != "espo"}, chat=chat)
    stream, options = stream_asked(body)
    reason = _unmonitored(body, control, chat=chat)
    usage = bool(options.get("include_usage"))
    asked = Asked(
        stream=stream,
        usage=usage,
        # As vLLM reads it: nothing by itself.
        continuous_usage=usage and bool(options.get("continuous_usage_stats")),
        logprobs=_logprobs_asked(body, chat=chat),
        token_ids=body.get("return_token_ids") is True,
    )
    singles = [] if reason else _singles(body, max_choices, chat=chat)
    return Plan(chat, body, control, asked, reason, singles)


def stream_asked(body: Body) -> tuple[bool, Body]:
    """Whether to stream, and with which options. Raises InvalidRequest."""
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise InvalidRequest("stream must be true or false", param="stream")
    options = body.get("stream_options") or None
    if options is not None and not (stream and isinstance(options, dict)):
        # Said here, because upstream every monitored request is a stream.
        raise InvalidRequest(
            "stream_options must be an object, and needs stream=true", param="stream_options"
        )
    return stream, options or {}


def lax(body: Body, *, chat: bool) -> Body:
    """With the fields that are read here as their types, where servers would take them for that.

    vLLM reads "true" and 1 for true, and "2" and 2.0 for 2; what it would refuse stays as it is.
    """
    kinds = {**_FIELDS, "logprobs": _BOOL if chat else _INT}
    for name in kinds.keys() & body.keys():
        body[name] = _lax_value(body[name], kinds[name])
    options = body.get("stream_options")
    if isinstance(options, dict):
        body["stream_options"] = {n: _lax_value(v, _BOOL) for n, v in options.items()}
    return body


def _lax_value(value: object, kind: TypeAdapter[Any]) -> object:
    # It also takes "yes" and "on", which is more likely to be a mistake.
    if isinstance(value, str) and kind is _BOOL and value.lower() not in _TRUTHS:
        return value
    try:
        return value if value is None else kind.validate_python(value)
    except ValidationError:
        return value


def _unmonitored(body: Body, control: Control, *, chat: bool) -> str | None:
    """Why no monitor can follow this request."""
    if control.mode == "off":
        return "asked for"
    if body.get("use_beam_search"):
        return "beam search"
    if body.get("best_of") not in (None, 1, body.get("n")):
        return "best_of"
    if body.get("echo") and not chat:
        return "echo: the prompt's logprobs would be taken for sampled tokens'"
    if chat and body.get("include_reasoning") is False:
        return "include_reasoning=false hides logprobs"
    if chat and not body.get("stream") and body.get("tools") and body.get("tool_choice") != "none":
        # Upstream every monitored request is a stream.
        return "tools without stream: a server may read its calls differently in a stream"
    if reason := about_logprobs(body):
        return reason
    for name in ("prompt_logprobs", "prompt_embeds", "kv_transfer_params", "ec_transfer_params"):
        if body.get(name) is not None:
            return f"{name} cannot be streamed"
    return None


def about_logprobs(fields: Body) -> str | None:
    """Why logprobs may be others than asked for, where they may be."""
    for name, value in fields.items():
        # Such as vLLM's `logprob_token_ids`: listed tokens' logprobs in the place of the likeliest.
        if value and name not in _LOGPROBS and _ABOUT_LOGPROBS.search(name):
            return f"a field about logprobs: {name} may change what they are"
    return None


def _logprobs_asked(body: Body, *, chat: bool) -> int | None:
    if not chat:
        value = body.get("logprobs")
        return int(value) if isinstance(value, int) else None
    if not body.get("logprobs"):
        return None
    top = body.get("top_logprobs")
    return int(top) if isinstance(top, int) else 0


def checked_choices(n: object, prompts: int, max_choices: int) -> int:
    """n, of each prompt. Raises InvalidRequest."""
    n = 1 if n is None else n
    if type(n) is not int or n < 1:
        raise InvalidRequest("n must be a whole number from 1", param="n")
    if n * prompts > max_choices:
        raise InvalidRequest(
            f"n times the number of prompts is {n * prompts}, and this gateway takes "
            f"{max_choices} at most (max_choices); send several requests",
            param="n",
        )
    return n


def _singles(body: Body, max_choices: int, *, chat: bool) -> list[Single]:
    prompts = [None] if chat else _prompts(body.get("prompt"))
    n = checked_choices(body.get("n"), len(prompts), max_choices)
    if n == 1 and len(prompts) == 1:
        return [Single(0, 0, body, _length(body, prompts[0]))]
    # One request with n > 1 cannot be cancelled a choice at a time.
    seed = body.get("seed")
    request_id = body.get("request_id")
    singles = []
    for p, prompt in enumerate(prompts):
        for i in range(n):
            index = p * n + i
            single = {**body, "n": 1}
            if not chat:
                single["prompt"] = prompt
            if "best_of" in body:
                single["best_of"] = 1
            if isinstance(seed, int):
                single["seed"] = child_seed(seed, i)
            if request_id is not None:
                single["request_id"] = f"{request_id}-{index}"
            singles.append(Single(index, p, single, _length(body, prompt)))
    return singles


def child_seed(seed: int, index: int) -> int:
    """A choice's, as vLLM seeds the children of one request; -1 is none, for all of them."""
    child = seed if seed == -1 else seed + index
    # vLLM counts on past what it takes, and torch takes either for the same.
    return child - 2**64 if seed <= _LARGEST_SEED < child else child


def choices_of(planned: Plan) -> int:
    """How many choices the servers will make of it; of what they will refuse, one."""
    if planned.singles:
        return len(planned.singles)
    n = (planned.body["sampling_params"] if planned.tokens else planned.body).get("n")
    prompts = 1 if planned.chat or planned.tokens else len(_prompts(planned.body.get("prompt")))
    return max(1, n * prompts) if isinstance(n, int) else prompts


def _prompts(prompt: object) -> list[Any]:
    """A prompt is text or a list of token ids; a list of either is several prompts."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return prompt
    return [prompt]


def _length(body: Body, prompt: object) -> int | None:
    exact = isinstance(prompt, list) and body.get("truncate_prompt_tokens") is None
    return len(prompt) if exact and isinstance(prompt, list) else None


def upstream_body(single: Single, *, chat: bool, token_ids: bool, alternatives: int = 1) -> Body:
    """The single request as it goes upstream: a stream that carries what the monitor reads.

    Nothing else is touched, so the server samples what it would have sampled without us. A value
    it would refuse is left for it to refuse.

    alternatives: logprobs a token that the rule reads; 0 for no logprobs but the client's.
    """
    body = dict(single.body)
    options: Body = {**(body.get("stream_options") or {}), "include_usage": True}
    if single.prompt_tokens is None:
        # A stream that is cut never reaches its final usage chunk.
        options["continuous_usage_stats"] = True
    if not body.get("stream"):
        # Ignored by a server that does not stream; here it would only delay a stop.
        body.pop("stream_interval", None)
    body["stream"] = True
    body["stream_options"] = options
    if chat and alternatives:
        top = body.get("top_logprobs")
        if body.get("logprobs") or not top:
            body["logprobs"] = True
            # With 1 vLLM sends the sampled token only, and g would always be 0.
            body["top_logprobs"] = at_least(max(alternatives, 2), top)
    elif alternatives:
        body["logprobs"] = at_least(alternatives, body.get("logprobs"))
    if token_ids:
        body["return_token_ids"] = True
    return body


def at_least(count: int, asked: object) -> object:
    """Alternatives to ask for; a negative number is all of them."""
    if asked is None:
        return count
    return max(asked, count) if type(asked) is int and asked >= 0 else asked
