"""A `Gate` as JSON and back, and a request's `Control` from JSON, every field checked. Pure.

The one format of a gate: pushed, on disk, and in what a run reports.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec
from pydantic import TypeAdapter, ValidationError

from espo_gateway.errors import InvalidRequest
from espo_gateway.stop.estimate import SuccessEstimator
from espo_gateway.stop.regret import MonitorConfig, RegretStatistics
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import Probe, Schedule

Mode = Literal["enforce", "shadow", "off"]
T = TypeVar("T")

#: Fields of a gate that a request may have of its own.
_CONSTANTS = ("beta", "epsilon", "constant", "p_star", "confidence", "hazard", "min_tokens")


@dataclass(frozen=True)
class Control:
    """What a request asks of the monitor, in its body's `espo`; None: as the gate has it.

    mode: "enforce" cuts; "shadow" decides and reports but never cuts; "off" does not monitor.
    gate: the version of the gate to be watched by, one of the last that were pushed; None: the one
        in force. For clients whose requests of a batch must all have the same, whenever they come.
    audit: a share in [0, 1] of such requests is generated to the end even if the rule stops it.
    trace: list g, z, threshold and value of every token in the record.
    history: log odds that the prompt is solved, by earlier rollouts of it (`told.TOLD`).
    probe: the reference answer, whose likelihood is asked of the server at the tokens of the gate's
        schedule; what it says is listed in the record.
    """

    mode: Mode = "enforce"
    beta: float | None = None
    epsilon: float | None = None
    constant: float | None = None
    p_star: float | None = None
    confidence: float | None = None
    hazard: float | None = None
    min_tokens: int | None = None
    gate: int | None = None
    audit: float | None = None
    trace: bool = False
    history: float | None = None
    probe: Probe | None = None

    def __post_init__(self) -> None:
        if self.audit is not None and not 0.0 <= self.audit <= 1.0:
            raise ValueError(f"audit must lie in [0, 1], not {self.audit}")

    def applied(self, gate: Gate) -> Gate:
        """The gate with this request's constants. Raises InvalidRequest."""
        changes = {name: value for name in _CONSTANTS if (value := getattr(self, name)) is not None}
        if not changes:
            return gate
        try:
            return dataclasses.replace(gate, **changes)
        except ValueError as error:
            raise InvalidRequest(f"espo: {error}", param="espo") from error


_ADAPTERS: dict[type, TypeAdapter[Any]] = {t: TypeAdapter(t) for t in (Gate, Control)}
_NESTED: dict[str, type] = {
    "statistics": RegretStatistics,
    "monitor": MonitorConfig,
    "estimator": SuccessEstimator,
    "free": SuccessEstimator,
    "schedule": Schedule,
    "probe": Probe,
}


def gate_from_json(data: bytes, *, has_critic: bool) -> Gate:
    """Raises InvalidRequest naming the field and what it should be."""
    gate = _checked(Gate, data, "")
    if gate.needs_critic and not has_critic:
        raise InvalidRequest(
            "value: 'critic' needs a critic server and this gateway has none; "
            "start it with --critic URL, or use 'stream' or 'constant'",
            param="value",
        )
    return gate


def control_from_json(value: object) -> Control:
    """From the `espo` field of a request's body. Raises InvalidRequest."""
    return Control() if value is None else _checked(Control, msgspec.json.encode(value), "espo")


def gate_to_json(gate: Gate) -> bytes:
    """What `gate_from_json` reads."""
    return _ADAPTERS[Gate].dump_json(gate)


def gate_to_dict(gate: Gate) -> dict[str, Any]:
    """The same as a part of a larger JSON document."""
    return _ADAPTERS[Gate].dump_python(gate, mode="json")


def _checked(cls: type[T], data: bytes, where: str) -> T:
    try:
        plain = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"not valid JSON: {error}") from error
    _check_names(cls, plain, where)
    try:
        return _ADAPTERS[cls].validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(filter(None, (where, *map(str, first["loc"]))))
        message = first["msg"].removeprefix("Value error, ")
        # The dataclasses' own messages begin with the field; pydantic's do not.
        if first["type"] == "value_error":
            path = ".".join(filter(None, (path, message.split()[0])))
        raise InvalidRequest(f"{path}: {message}", param=path) from error


def _check_names(cls: type, plain: object, where: str) -> None:
    """Refuse unknown fields and numbers that are not finite, at any depth.

    pydantic ignores unknown fields of plain dataclasses, and a misspelt one would silently leave a
    default in force.
    """
    if not isinstance(plain, dict):
        raise InvalidRequest(f"{where or 'the gate'} must be a JSON object", param=where or None)
    names = [field.name for field in dataclasses.fields(cls)]
    for name, value in plain.items():
        path = f"{where}.{name}" if where else name
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(names)}"
            raise InvalidRequest(f"{path}: unknown field; {hint}", param=path)
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(f"{path}: must be a finite number", param=path)
        if isinstance(value, dict) and name in _NESTED:
            _check_names(_NESTED[name], value, path)
