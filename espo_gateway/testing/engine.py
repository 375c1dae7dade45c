"""What a vLLM that decides by itself makes of a script: cut where the request's gate says. Pure."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from espo_gateway.stop.regret import MISSING_LOGPROB
from espo_gateway.testing.chunks import flat, limit
from espo_gateway.testing.script import Body, Script, Token
from espo_gateway.vllm_plugin.monitor import Monitor
from espo_gateway.vllm_plugin.wire import order_of


def decided(script: Script, body: Body) -> Script:
    """The script as the engine would end it. Raises InvalidRequest naming the field."""
    sampling = body.get("sampling_params") or {}
    order = order_of(body.get("vllm_xargs") or sampling.get("extra_args"))
    if order is None or script.status != 200:
        return script
    monitor, most = Monitor(order, len(script.prompt_token_ids)), limit(flat(body))
    tokens = list(islice(script.tokens, most))
    finish_reason = "length" if len(tokens) == most else script.finish_reason
    for count, token in enumerate(tokens, 1):
        last = count == len(tokens) and finish_reason != "length"
        value = script.values[count - 1] if script.values else None
        if monitor.push(_row(token), last=last, value=value):
            tokens, finish_reason = tokens[:count], "length"
            break
    if script.stop_reason in (body.get("stop") or ()):
        return replace(script, tokens=tokens)  # found outside the engine
    stop_reason = monitor.stop_reason(script.stop_reason, len(tokens))
    return replace(script, tokens=tokens, finish_reason=finish_reason, stop_reason=stop_reason)


def _row(token: Token) -> list[float]:
    sampled = MISSING_LOGPROB if token.logprob is None else token.logprob
    top = sampled if token.max_logprob is None else token.max_logprob
    return [sampled, *sorted((top, *token.others), reverse=True)]
