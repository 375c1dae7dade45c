"""A stream's chunks merged to the one answer a server would have given without streaming. Pure."""

from __future__ import annotations

from espo_gateway.stream.chunks import Chunk
from espo_gateway.stream.templates import Output

_COMPLETION: Chunk = {"text": "", "logprobs": None, "finish_reason": None, "stop_reason": None}
_CHAT: Chunk = {"logprobs": None, "finish_reason": None, "stop_reason": None}
#: Lists with an entry for each token.
_GROWING = ("token_ids", "sampling_mask")
_MESSAGE: Chunk = {"role": "assistant", "content": None, "refusal": None}


class Answer:
    """Takes the chunks of one choice and gives that choice and the answer's other fields.

    Lists and texts grow, any other field keeps the last value it was sent with.
    """

    #: It can always take more.
    flowing = True

    def __init__(self, *, chat: bool) -> None:
        self.head: Chunk = {}
        self.choice: Chunk = dict(_CHAT if chat else _COMPLETION)
        self._message: Chunk | None = dict(_MESSAGE) if chat else None
        # Joined at the end: adding to a string copies it.
        self._texts: dict[str, list[str]] = {}

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
            if name == "text":
                self._texts.setdefault("text", []).append(value)
            elif name == "delta":
                self._add_delta(value)
            elif name == "logprobs":
                self._add_logprobs(value)
            elif name in _GROWING and self.choice.get(name):
                self.choice[name] += value
            else:
                self.choice[name] = value

    def _add_logprobs(self, logprobs: Chunk) -> None:
        known = self.choice["logprobs"]
        if known is None:
            self.choice["logprobs"] = logprobs
            return
        for name, values in logprobs.items():
            if not known.get(name):
                known[name] = values
            elif values:
                known[name] += values

    def _add_delta(self, delta: Chunk) -> None:
        assert self._message is not None
        for name, value in delta.items():
            if value is None:
                continue
            if name == "tool_calls":
                self._add_tool_calls(value)
            elif isinstance(value, str) and name != "role":
                self._texts.setdefault(name, []).append(value)
            else:
                self._message[name] = value

    def _add_tool_calls(self, deltas: list[Chunk]) -> None:
        assert self._message is not None
        calls = self._message.setdefault("tool_calls", [])
        for delta in deltas:
            index = delta.get("index", 0)
            while len(calls) <= index:
                calls.append({"id": None, "type": "function", "function": {"arguments": ""}})
            call = calls[index]
            for name, value in delta.items():
                if name == "function":
                    call["function"]["arguments"] += value.get("arguments") or ""
                    if value.get("name"):
                        call["function"]["name"] = value["name"]
                elif name != "index" and value is not None:
                    call[name] = value

    def finished(self) -> Chunk:
        """The merged choice."""
        texts = {name: "".join(parts) for name, parts in self._texts.items()}
        if self._message is None:
            self.choice.update(texts)
            return self.choice
        message = {**self._message, **texts}
        if "tool_calls" in message and not message["content"]:
            message["content"] = None
        self.choice["message"] = message
        return self.choice


def merged(answers: list[Answer], usage: Chunk | None, *, chat: bool) -> Chunk:
    """The whole answer from its choices' parts, in the choices' order."""
    head = answers[0].head
    head["object"] = "chat.completion" if chat else "text_completion"
    return {**head, "choices": [a.finished() for a in answers], "usage": usage}


def total_usage(usages: list[tuple[int, Chunk | None]]) -> Chunk | None:
    """The sum of (prompt, usage) over choices; choices of one prompt share its tokens.

    None when any is unknown: a wrong sum would be worse.
    """
    if len(usages) == 1:
        return usages[0][1]
    prompts: dict[int, int] = {}
    completion = 0
    for prompt, usage in usages:
        if usage is None:
            return None
        prompts[prompt] = usage["prompt_tokens"]
        completion += usage["completion_tokens"]
    total = sum(prompts.values())
    return {
        "prompt_tokens": total,
        "total_tokens": total + completion,
        "completion_tokens": completion,
    }
