"""What travels with a request whose stop vLLM's engine decides, and what comes back. Pure.

There: an `Order` in the request's `vllm_xargs` (of the tokens route: `sampling_params.extra_args`),
so that a request keeps the gate it came with, and none has to be pushed.

    {"espo_gate": "{\\"rule\\": \\"regret-only\\", \\"beta\\": 2.0}", "espo_mode": "enforce"}

Back: the choice's `stop_reason`, the one field that vLLM hands on from its scheduler to every
route, of each choice by itself, streamed or not. It is "espo" of a choice that was stopped. Who
asks for a record (`espo_record`) finds it there as JSON behind the word, of every choice whose end
the engine has decided; vLLM's own reason is in it. Of an end that vLLM finds outside its engine (a
stop string, a client that leaves) there is none.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

import msgspec

from espo_gateway.errors import InvalidRequest
from espo_gateway.stop.gate_json import Mode, gate_from_json, gate_to_json
from espo_gateway.stop.rules import Gate

#: Fields of `vllm_xargs`, and what each holds.
FIELDS: dict[str, str] = {
    "espo_gate": "a gate as JSON text",
    "espo_mode": f"one of {', '.join(get_args(Mode))}",
    "espo_audit": "a number in [0, 1]",
    "espo_history": "a finite number",
    "espo_record": "0 or 1",
    "espo_trace": "0 or 1",
}
_PREFIX = "espo_"
#: `stop_reason` of a stopped choice.
STOPPED = "espo"
_RECORD = STOPPED + ":"
#: Where the server says whether it decides.
ROUTE = "/espo/engine"

Fields = dict[str, str | int | float]


@dataclass(frozen=True)
class Order:
    """What a request asks of the engine: mode, audit, history and trace as in `Control`.

    record: its `stop_reason` is to carry a record.
    """

    gate: Gate
    mode: Mode = "enforce"
    audit: float = 0.0
    history: float | None = None
    record: bool = False
    trace: bool = False


class Told(msgspec.Struct, omit_defaults=True, kw_only=True, gc=False):
    """What the engine tells of a choice; the fields of a `Record` that it alone knows.

    stop_reason: vLLM's own. fault: why it was not watched to its end.
    trace: g, z, threshold and value of every token. weights: from which token on of which version,
    as vLLM's API server knows, which adds it (`admission.tell_weights`).
    """

    tokens: int
    mode: Mode = "enforce"
    cut: int | None = None
    z: float | None = None
    threshold: float | None = None
    value: float | None = None
    missing: int = 0
    audited: bool = False
    stop_reason: int | str | None = None
    fault: str | None = None
    trace: list[tuple[float | None, float, float | None, float | None]] | None = None
    weights: list[tuple[int, str]] | None = None


def decides_alone(gate: Gate, *, has_values: bool) -> bool:
    """Whether a gate asks nobody beside the engine. has_values: the engine knows a critic's V."""
    return gate.asks <= ({"critic"} if has_values else set())


def order_fields(gate: Gate, *, mode: Mode, history: float | None, trace: bool) -> Fields:
    """For a request whose record is wanted."""
    fields: Fields = {"espo_gate": _text(gate), "espo_mode": mode, "espo_record": 1}
    if history is not None:
        fields["espo_history"] = history
    if trace:
        fields["espo_trace"] = 1
    return fields


def order_of(fields: Mapping[str, Any] | None) -> Order | None:
    """What a request orders; None when it orders nothing, or its mode is "off".

    Raises InvalidRequest naming the field.
    """
    given = {name: value for name, value in (fields or {}).items() if name.startswith(_PREFIX)}
    if not given:
        return None
    for name in given:
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, 1)
            hint = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(FIELDS)}"
            raise InvalidRequest(f"{name}: unknown field; {hint}", param=name)
    mode = _checked(given, "espo_mode", "enforce", get_args(Mode).__contains__)
    audit = _checked(given, "espo_audit", 0.0, lambda x: _is_number(x) and 0.0 <= x <= 1.0)
    history = _checked(given, "espo_history", None, _is_number)
    record, trace = (
        bool(_checked(given, name, 0, lambda x: type(x) in (int, bool) and x in (0, 1)))
        for name in ("espo_record", "espo_trace")
    )
    text = _checked(given, "espo_gate", None, lambda x: type(x) is str)
    if mode == "off":
        return None
    if text is None:
        raise InvalidRequest(
            f"espo_gate: {next(iter(given))} needs {FIELDS['espo_gate']}", param="espo_gate"
        )
    return Order(_gate(text), mode, float(audit), history, record, trace)


def _checked(given: Mapping[str, Any], name: str, default: Any, good: Any) -> Any:
    if name not in given:
        return default
    value = given[name]
    try:
        fits = good(value)
    except TypeError:
        fits = False
    if not fits:
        raise InvalidRequest(f"{name}: must be {FIELDS[name]}, not {value!r:.80}", param=name)
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


@lru_cache(maxsize=256)
def _gate(text: str) -> Gate:
    try:
        gate = gate_from_json(text.encode(), has_critic=True)
    except (InvalidRequest, UnicodeEncodeError) as error:
        raise InvalidRequest(f"espo_gate: {error}", param="espo_gate") from error
    return gate


@lru_cache(maxsize=256)
def _text(gate: Gate) -> str:
    return gate_to_json(gate).decode()


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Told).decode


def stop_reason_of(told: Told) -> str:
    """As it travels."""
    return _RECORD + _encode(told).decode()


def told_by(stop_reason: object) -> Told | None:
    """What a choice's `stop_reason` tells; None when it is none of ours."""
    if type(stop_reason) is not str or not stop_reason.startswith(_RECORD):
        return None
    try:
        return _decode(stop_reason.removeprefix(_RECORD).encode())
    except (msgspec.DecodeError, UnicodeEncodeError):
        return None
