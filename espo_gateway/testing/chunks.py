"""A script's tokens in vLLM's words: chunks, choices, logprobs, usage. Pure."""

from __future__ import annotations

import json

from espo_gateway.testing.script import Body, Script, Token
from espo_gateway.vllm_plugin.wire import STOPPED


def event(chunk: Body) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def limit(body: Body) -> int | None:
    return body.get("max_completion_tokens") or body.get("max_tokens")


def ending(body: Body, script: Script, sent: int) -> tuple[str, int | str | None]:
    if sent == limit(body) and not str(script.stop_reason).startswith(STOPPED):
        return "length", None
    return script.finish_reason, script.stop_reason


def head(chat: bool, *, stream: bool = False) -> Body:
    kind = "chat.completion" if chat else "text_completion"
    return {
        "id": "chatcmpl-1" if chat else "cmpl-1",
        "object": kind + ".chunk" if chat and stream else kind,
        "created": 1,
        "model": "fake",
    }


def usage_of(script: Script, completion: int) -> Body:
    prompt = len(script.prompt_token_ids)
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
    }


def choice_of(
    body: Body, script: Script, tokens: list[Token], chat: bool, *, whole: bool = False
) -> Body:
    text = "".join(token.text for token in tokens)
    choice: Body = {"index": 0, "logprobs": None, "finish_reason": None, "stop_reason": None}
    if not chat:
        choice["text"] = text
    elif whole:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        choice["delta"] = {"content": text}
    asked = body.get("logprobs")
    if script.logprobs and (asked if chat else asked is not None):
        choice["logprobs"] = (_chat_logprobs if chat else _completion_logprobs)(body, tokens)
    if body.get("return_token_ids"):
        choice["token_ids"] = [token.id for token in tokens]
    return choice


def _tops(token: Token) -> list[tuple[str, float | None]]:
    """The sampled token, and the likeliest where it is another."""
    sampled: list[tuple[str, float | None]] = [(token.text, token.logprob)]
    if token.max_logprob is not None:
        sampled.append(("<top>", token.max_logprob))
    return [*sampled, *((f"<other{i}>", logprob) for i, logprob in enumerate(token.others))]


def _completion_logprobs(body: Body, tokens: list[Token]) -> Body:
    return {
        "text_offset": [0] * len(tokens),
        "token_logprobs": [token.logprob for token in tokens],
        "tokens": [token.text for token in tokens],
        "top_logprobs": [dict(_tops(token)[: body["logprobs"] + 1]) for token in tokens],
    }


def _chat_logprobs(body: Body, tokens: list[Token]) -> Body:
    def entry(text: str, logprob: float | None) -> Body:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    top = body.get("top_logprobs") or 0
    return {
        "content": [
            {
                **entry(token.text, token.logprob),
                "top_logprobs": [entry(*alternative) for alternative in _tops(token)[:top]],
            }
            for token in tokens
        ]
    }


def flat(body: Body) -> Body:
    """A request for tokens, in a completion's words."""
    sampling = body.get("sampling_params") or {}
    return {**body, **sampling, "prompt": body.get("token_ids"), "return_token_ids": True}


def as_tokens(chunk: Body, asked: Body) -> Body:
    """A completion, or a chunk of one, in the words of vLLM's route for tokens."""
    names = ("usage",) if asked.get("stream") else ("usage", "created", "model")
    told = {name: chunk[name] for name in names if name in chunk}
    mode = asked.get("output_mode", "tokens")
    choices = []
    for choice in chunk.get("choices", []):
        if (ids := choice.pop("prompt_token_ids", None)) and asked.get("return_token_ids"):
            told["prompt_token_ids"] = ids
        tops = asked["sampling_params"].get("logprobs")
        content = None if choice["logprobs"] is None else _token_logprobs(choice, max(tops, 1))
        kept = ("index", "finish_reason", "stop_reason", "token_ids")
        choices.append(
            {
                **{name: choice[name] for name in kept},
                "logprobs": None if content is None else {"content": content},
                "routed_experts": "AAAA" if choice["finish_reason"] else None,
                "sampling_mask": [[token] for token in choice["token_ids"]],
                "weight_versions": None,
                **({"text": choice["text"]} if mode == "text" else {}),
            }
        )
    request_id = f"generate-tokens-{asked.get('request_id', 'r')}"
    return {"request_id": request_id, "output_mode": mode, "choices": choices, **told}


def _token_logprobs(choice: Body, most: int) -> list[Body]:
    logprobs = choice["logprobs"]
    rows = zip(
        choice["token_ids"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    )
    return [
        {
            "token_id": token,
            "logprob": logprob,
            "rank": 1,
            "top_logprobs": [
                {"token_id": token if i == 0 else 1000 + i, "logprob": top, "rank": i + 1}
                for i, top in enumerate(tops.values())
            ][:most],
        }
        for token, logprob, tops in rows
    ]
