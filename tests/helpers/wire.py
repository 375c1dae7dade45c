"""A server that answers with given bytes, and what OpenAI's client makes of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any

from aiohttp import web
from openai import APIError, AsyncOpenAI

from espo_gateway.testing import Fake

DONE = b"data: [DONE]\n\n"


def events(*chunks: Any) -> bytes:
    """As a Python server writes them."""
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


class WireServer(Fake):
    """parts: written one by one. breaks: the connection is lost at the end; hangs: it is not."""

    def __init__(
        self,
        *parts: bytes,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        breaks: bool = False,
    ) -> None:
        super().__init__()
        self.parts: Iterable[bytes] = parts
        self.status = status
        self.headers = {"Content-Type": "text/event-stream", **(headers or {})}
        self.breaks = breaks
        self.hangs = False
        self.bodies: list[dict[str, Any]] = []

    def _add_routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/{path:.*}", self._generate)

    def answer(self, body: dict[str, Any]) -> Iterable[bytes]:
        """What is written; of a subclass, what the request asks for."""
        return self.parts

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(body := await request.json())
        response = web.StreamResponse(status=self.status, headers=self.headers)
        await response.prepare(request)
        for part in self.answer(body):
            await response.write(part)
        if self.hangs:
            await asyncio.Event().wait()
        if self.breaks:
            assert request.transport is not None
            await response.write(b"")
            request.transport.close()
            return response
        await response.write_eof()
        return response


async def heard(client: AsyncOpenAI, body: dict[str, Any]) -> dict[str, Any]:
    """What the official client makes of a chat's or a completion's answer, whole or streamed.

    text: by the name of its field. Of a stream the pieces are put together as its readers do.
    error: in words; status: of an error that came in the place of an answer.
    """
    create: Any = (
        client.chat.completions.create if "messages" in body else client.completions.create
    )
    found: dict[str, Any] = {"text": {}, "calls": {}, "logprobs": []}
    found |= dict.fromkeys(("finish", "usage", "error", "status"))
    try:
        answer = await create(**body)
        if not body.get("stream"):
            _add(found, answer.model_dump())
        else:
            async for chunk in answer:
                _add(found, chunk.model_dump())
    except APIError as error:
        found["error"] = error.message
        found["status"] = getattr(error, "status_code", None)
    except (AttributeError, TypeError, ValueError) as error:
        # What is no JSON is no APIError; and some of what is, its readers cannot read.
        found["error"] = type(error).__name__
    return found


def _add(found: dict[str, Any], chunk: dict[str, Any]) -> None:
    found["usage"] = chunk.get("usage") or found["usage"]
    for choice in chunk.get("choices") or ():
        found["finish"] = choice.get("finish_reason") or found["finish"]
        logprobs = choice.get("logprobs") or {}
        found["logprobs"] += logprobs.get("content") or [*_columns(logprobs)]
        told = choice.get("delta") or choice.get("message") or {"text": choice.get("text")}
        for name, value in told.items():
            if isinstance(value, str) and value and name != "role":
                found["text"][name] = found["text"].get(name, "") + value
        for call in told.get("tool_calls") or ():
            key = call.get("index")
            known = found["calls"].setdefault(len(found["calls"]) if key is None else key, ["", ""])
            function = call.get("function") or {}
            known[0] = function.get("name") or known[0]
            known[1] += function.get("arguments") or ""


def _columns(logprobs: dict[str, Any]) -> Iterable[tuple[Any, ...]]:
    names = ("tokens", "token_logprobs", "top_logprobs")
    return zip(*(logprobs.get(name) or () for name in names), strict=False)
