"""The gateway's own surface as OpenAPI 3.1, for `GET /openapi.json`.

What the gateway itself reads is described by the types it checks with. What it hands on is the
servers' to describe, and open here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter

from espo_gateway.config import MAX_CHOICES
from espo_gateway.stop.gate_json import Control
from espo_gateway.stop.rules import Gate
from espo_gateway.stream.record import Record

Schema = dict[str, Any]

_JSON = "application/json"


@dataclass(frozen=True)
class ErrorDetail:
    """message: what is wrong, and the fix. param: the field at fault."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


@dataclass(frozen=True)
class Error:
    """OpenAI's error shape."""

    error: ErrorDetail


@dataclass(frozen=True)
class Health:
    status: Literal["ok"]


@dataclass(frozen=True)
class Reloaded:
    """What is in force now."""

    api_keys: int
    gate_version: int


@cache
def description() -> Schema:
    """The whole document."""
    components: Schema = {}
    for cls in (Gate, Control, Record, Error, Health, Reloaded):
        schema = TypeAdapter(cls).json_schema(ref_template="#/components/schemas/{model}")
        components |= schema.pop("$defs", {})
        components[cls.__name__] = schema
    for name in ("Gate", "Control", "RegretStatistics", "MonitorConfig", "SuccessEstimator"):
        components[name]["additionalProperties"] = False
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "espo_gateway",
            "version": "1",
            "description": "An OpenAI-compatible gateway that ends failing generations. Any other "
            "request under /v1/ is passed through to a server.",
        },
        "paths": {
            "/v1/completions": {"post": _generation("prompt", {})},
            "/v1/chat/completions": {"post": _generation("messages", {"type": "array"})},
            "/v1/models": {"get": _operation("What the servers serve.", {"type": "object"})},
            "/espo/gate": {
                "get": _operation("The gate in force.", _ref("Gate"), admin=True),
                "put": _operation(
                    "Put a gate in force, for the requests that come.",
                    _ref("Gate"),
                    body=_ref("Gate"),
                    admin=True,
                ),
            },
            "/espo/reload": {
                "post": _operation(
                    "Read the key files and the gate's again: all of it, or nothing.",
                    _ref("Reloaded"),
                    admin=True,
                )
            },
            "/espo/statistics": {
                "get": _operation(
                    "What tuning has learnt, and what was recorded; null where that is off.",
                    {
                        "type": "object",
                        "required": ["gate", "tuning", "recording"],
                        "properties": {
                            "gate": _ref("Gate"),
                            "tuning": {"type": ["object", "null"]},
                            "recording": {"type": ["object", "null"]},
                        },
                    },
                    admin=True,
                )
            },
            "/health": {"get": _open("The process lives.", _ref("Health"))},
            "/ready": {"get": _ready()},
            "/metrics": {"get": _operation("For Prometheus.", None)},
            "/openapi.json": {"get": _operation("This document.", {"type": "object"})},
        },
        "components": {
            "schemas": components,
            "securitySchemes": {
                "api_key": {"type": "http", "scheme": "bearer"},
                "admin_key": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _generation(prompt: str, prompt_schema: Schema) -> Schema:
    body = {
        "type": "object",
        "required": ["model", prompt],
        "properties": {
            "model": {"type": "string"},
            prompt: prompt_schema,
            "n": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_CHOICES},
            "stream": {"type": ["boolean", "null"]},
            "espo": {"anyOf": [_ref("Control"), {"type": "null"}]},
        },
    }
    choice = {"type": "object", "properties": {"espo": _ref("Record")}}
    answer = {
        "type": "object",
        "required": ["choices"],
        "properties": {"choices": {"type": "array", "items": choice}},
    }
    operation = _operation("A generation that may be stopped.", answer, body=body)
    content = operation["responses"]["200"]["content"]
    content["text/event-stream"] = {}
    return operation


def _ready() -> Schema:
    state = {
        "type": "object",
        "required": ["status", "upstreams"],
        "properties": {"status": {"type": "string"}, "upstreams": {"type": "array"}},
    }
    operation = _open("A request would be served.", state)
    operation["responses"]["503"] = {
        "description": "It would not; `status` says why.",
        "content": {_JSON: {"schema": state}},
    }
    return operation


def _open(summary: str, answer: Schema) -> Schema:
    return {**_operation(summary, answer), "security": []}


def _operation(
    summary: str, answer: Schema | None, *, body: Schema | None = None, admin: bool = False
) -> Schema:
    """answer: the schema of a JSON answer; None for plain text."""
    content = {"text/plain": {}} if answer is None else {_JSON: {"schema": answer}}
    operation: Schema = {
        "summary": summary,
        # One of them may also be switched off.
        "security": [{}, {"admin_key": []} if admin else {"api_key": []}],
        "responses": {
            "200": {"description": "Done.", "content": content},
            "default": {
                "description": "An error, the gateway's or the server's.",
                "content": {_JSON: {"schema": _ref("Error")}},
            },
        },
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": body}}}
    return operation


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
