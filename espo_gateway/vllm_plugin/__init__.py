"""What ESPO loads inside vLLM, found by vLLM itself through the `vllm.general_plugins` entry point.

Owns what happens when a vLLM process starts; vLLM and torch are imported when an engine is made,
not here.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path

#: name of our backend in `--weight-transfer-config '{"backend": "espo"}'`
BACKEND = "espo"
#: name of our scheduler in `--scheduler-cls`, and of the `--middleware` that tells of it
SCHEDULER = "espo_gateway.vllm_plugin.scheduler.EspoScheduler"
ENGINE_ROUTE = "espo_gateway.vllm_plugin.admission.EngineRoute"
#: name of our worker in `--worker-cls`, which tells V; in `--additional-config` the folder of the
#: head that it tells it by, and on vLLM's output of a step V by request
VALUE_WORKER = "espo_gateway.vllm_plugin.value_head.ValueWorker"
VALUE_HEAD = "espo_value_head"
VALUES = "espo_values"


#: what is changed inside vLLM, in whatever process it is; functions in this folder
HOOKS = ("admission.check_requests", "admission.tell_weights", "listed_tokens.tell_largest")


def head_folder(additional_config: object) -> Path | None:
    """The folder that `VALUE_HEAD` names in vLLM's setting of that name, if it does."""
    named = isinstance(additional_config, Mapping) and additional_config.get(VALUE_HEAD)
    return Path(named) if isinstance(named, str) else None


def register() -> None:
    """Register what is ours; vLLM calls this in each of its processes, perhaps repeatedly."""
    yield_to_streams()
    import vllm
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.utils.import_utils import resolve_obj_by_qualname

    is_tested, *hooks = (
        resolve_obj_by_qualname(f"espo_gateway.vllm_plugin.{name}")
        for name in ("admission.is_tested", *HOOKS)
    )
    if is_tested(vllm.__version__):  # another one's insides are not known
        for hook in hooks:
            hook()

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "espo_gateway.vllm_plugin.weight_transfer", "SafetensorsWeightTransferEngine"
        )


def yield_to_streams() -> None:
    """Lower the priority of the engine's processes by ESPO_ENGINE_NICE (set on CPU only).

    On a CPU sampling competes with the delivery of what was sampled. When sampling wins, a stop
    reaches the engine many tokens late.
    """
    engine_side = multiprocessing.parent_process() is not None
    api_server = multiprocessing.current_process().name.startswith("ApiServer")
    # Once a process: a second call would add up.
    wanted = os.environ.pop("ESPO_ENGINE_NICE", None) if engine_side and not api_server else None
    if wanted is not None:
        os.nice(int(wanted))
