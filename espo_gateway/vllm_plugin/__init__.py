"""What ESPO loads inside vLLM, found by vLLM itself through the `vllm.general_plugins` entry point.

Owns the registration only; vLLM and torch are imported when an engine is made, not here.
"""

from __future__ import annotations

#: name of our backend in `--weight-transfer-config '{"backend": "espo"}'`
BACKEND = "espo"


def register() -> None:
    """Register the weight transfer engine; vLLM calls this in each process, perhaps repeatedly."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "espo_gateway.vllm_plugin.weight_transfer", "SafetensorsWeightTransferEngine"
        )
