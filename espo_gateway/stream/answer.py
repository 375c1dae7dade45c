"""A stream's chunks merged to the one answer a server would have given without streaming. Pure.

What is in no stream is lost: the `routed_experts` of vLLM's completions and chats.
"""

from __future__ import annotations

import json
from typing import Any

from espo_gateway.stream.chunks import Chunk
from espo_gateway.stream.templates import Output

_COMPLETION: Chunk = {"text": "", "logprobs": None, "finish_reason": None, "stop_reason": None}
_CHAT: Chunk = {"logprobs": None, "finish_reason": None, "stop_reason": None}
#: Lists with an entry for each token.
_GROWING = ("token_ids", "sampling_mask")
_MESSAGE: Chunk = {"role": "assistant", "content": None, "refusal": None}
#: Told once, or again and again; anything else that is text comes in pieces.
_CONSTANT = ("role", "id", "type", "name", "format", "index")


class Answer:
    """Takes the chunks of one choice and gives that choice and the answer's other fields.

    Lists and texts grow, any other field keeps the last value it was sent with. Of whatever types
    a server sends, nothing is lost for it.
    """

    #: It can always take more.
    flowing = True

    def __init__(self, *, chat: bool) -> None:
        self.head: Chunk = {}
        self.choice: Chunk = dict(_CHAT if chat else _COMPLETION)
        self._message: Chunk | None = dict(_MESSAGE) if chat else None
        # Joined at the end: adding to a string copies it.
        self._texts: dict[str, list[str]] = {}
        self._calls: dict[int, Chunk] = {}
        self._whole: Chunk | None = None

    def adopt(self, head: Chunk, choice: Chunk) -> None:
        """Take a choice that came in one piece. head: the answer's other fields."""
        self.head, self._whole = head, choice

    def put(self, outputs: list[Output]) -> None:
        """Take what is ready."""
        for output in outputs:
            if isinstance(output, tuple):
                template, text = output
                self._texts.setdefault(template.field, []).append(text)
            else:
                self.add(output)

    async def deliver(self, outputs: list[Output]) -> None:
        """The same."""
        self.put(outputs)

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk."""
        for name, value in chunk.items():
            if value is not None and name not in ("choices", "usage"):
                self.head[name] = value
        choice = chunk["choices"][0]
        for name, value in choice.items():
            if value is None:
                continue
            if name == "text" and self._message is None:
                self._texts.setdefault("text", []).append(value)
            elif name == "delta" and self._message is not None:
                self._add_delta(value)
            elif name == "logprobs":
                self._add_logprobs(value)
            elif name in _GROWING and self.choice.get(name):
                self.choice[name] += value
            else:
                self.choice[name] = value

    def _add_logprobs(self, logprobs: Any) -> None:
        known = self.choice["logprobs"]
        if not (isinstance(known, dict) and isinstance(logprobs, dict)):
            self.choice["logprobs"] = _grown(known, logprobs)
            return
        for name, values in logprobs.items():
            if isinstance(known.get(name), list) and isinstance(values, list):
                known[name] += values
            elif values:
                known[name] = values

    def _add_delta(self, delta: Chunk) -> None:
        assert self._message is not None
        for name, value in delta.items():
            if name == "tool_calls" and isinstance(value, list):
                for call in value:
                    if isinstance(call, dict):
                        self._add_tool_call(call)
            elif name in _CONSTANT:
                self._message[name] = value or self._message.get(name)
            elif isinstance(value, str):
                self._texts.setdefault(name, []).append(value)
            elif value is not None:
                known = self._message.get(name)
                if texts := self._texts.pop(name, None):  # a text that goes on in parts
                    known = _grown(known, "".join(texts))
                self._message[name] = _grown(known, value)

    def _add_tool_call(self, delta: Chunk) -> None:
        index, calls = delta.get("index"), self._calls
        if type(index) is not int:
            # A call begins with its id; what has neither goes on with the last one.
            last = max(calls, default=0)
            known = calls[last]["id"] if last in calls else None
            index = last + 1 if delta.get("id") and known not in (None, delta["id"]) else last
        call = calls.setdefault(
            index, {"id": None, "type": "function", "function": {"arguments": ""}}
        )
        for name, value in delta.items():
            if name == "function" and isinstance(value, dict):
                arguments = value.get("arguments")
                if not isinstance(arguments, str | None):
                    arguments = json.dumps(arguments)
                call["function"] = _grown(call["function"], {**value, "arguments": arguments})
            elif name not in ("index", "function"):
                call[name] = _grown(call.get(name), value, name)

    def finished(self) -> Chunk:
        """The merged choice."""
        if self._whole is not None:
            return self._whole
        texts = {name: "".join(parts) for name, parts in self._texts.items()}
        if self._message is None:
            self.choice.update(texts)
            return self.choice
        message = dict(self._message)
        for name, text in texts.items():
            message[name] = _grown(message.get(name), text)
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        said = any(text for name, text in texts.items() if name != "content")
        if (said or message.get("tool_calls")) and not message["content"]:
            message["content"] = None  # the "" that a stream begins with
        self.choice["message"] = message
        return self.choice


def _grown(known: Any, value: Any, name: str = "") -> Any:
    """What is known of a field, with a later piece of it, which is not read again."""
    if known is None or value is None:
        return known if value is None else value
    if name in _CONSTANT:
        return value or known
    if isinstance(known, str) and isinstance(value, str):
        return known + value
    if isinstance(known, dict) and isinstance(value, dict):
        for inner, piece in value.items():
            known[inner] = _grown(known.get(inner), piece, inner)
        return known
    if isinstance(known, list) or isinstance(value, list):
        parts = known if isinstance(known, list) else _parts(known)
        for piece in value if isinstance(value, list) else _parts(value):
            place = piece.get("index") if isinstance(piece, dict) else None
            same = place is not None and [
                part for part in parts if isinstance(part, dict) and part.get("index") == place
            ]
            if same:
                _grown(same[0], piece)
            else:
                parts.append(piece)
        return parts
    return value


def _parts(value: Any) -> list[Any]:
    """A text, or what else is no list, in a list of parts."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}] if value else []
    return [value]


def merged(answers: list[Answer], usage: Chunk | None, *, chat: bool) -> Chunk:
    """The whole answer from its choices' parts, in the choices' order."""
    head = answers[0].head
    head["object"] = "chat.completion" if chat else "text_completion"
    return {**head, "choices": [a.finished() for a in answers], "usage": usage}


def total_usage(usages: list[tuple[int, Chunk | None]]) -> Chunk | None:
    """The sum of (prompt, usage) over choices; choices of one prompt share its tokens.

    None when any is unknown, and without a detail that any does not tell: a wrong sum would be
    worse.
    """
    if len(usages) == 1:
        return usages[0][1]
    firsts: dict[int, Chunk] = {}
    known = [usage or {} for _, usage in usages]
    for (prompt, _), usage in zip(usages, known, strict=True):
        firsts.setdefault(prompt, {k: v for k, v in usage.items() if k.startswith("prompt")})
    total = _sum([*firsts.values()])
    total |= _sum([{k: v for k, v in u.items() if not k.startswith("prompt")} for u in known])
    prompt_tokens, completion = total.get("prompt_tokens"), total.get("completion_tokens")
    if type(prompt_tokens) is not int or type(completion) is not int:
        return None
    return total | {"total_tokens": prompt_tokens + completion}


def _sum(counts: list[Chunk]) -> Chunk:
    """Field by field, at any depth; of those that all have."""
    total: Chunk = {}
    for name in counts[0]:
        values: list[Any] = [count.get(name) for count in counts]
        if all(isinstance(value, dict) for value in values):
            total[name] = _sum(values)
        elif all(type(value) in (int, float) for value in values):
            total[name] = sum(values)
    return total
