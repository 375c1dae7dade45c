"""V from the policy's own hidden state, told by vLLM's worker with every sampled token.

    vllm serve MODEL --worker-cls espo_gateway.vllm_plugin.value_head.ValueWorker \\
        --additional-config '{"espo_value_head": "FOLDER"}'

The head (`head_file.py`) stands on the policy's first layers. Their states vLLM keeps where a draft
model would read them (`SupportsEagle3`), compiled or not, so that V costs one product a token. It
goes to the scheduler on the step's output, beside the logprobs.

V is of the state that a token is sampled in, as V(s_t) is in the paper: a critic server, asked
about the same token, has read that as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.platforms import current_platform

from espo_gateway.vllm_plugin import VALUES, head_folder
from espo_gateway.vllm_plugin.head_file import read_head

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class ValueHead:
    """A head on the states of a model that vLLM runs.

    Raises ValueError: it is of another model, or this one does not show its states.
    """

    def __init__(self, folder: Path, runner: Any) -> None:
        model = runner.get_model()
        text = model.get_language_model() if hasattr(model, "get_language_model") else model
        body = getattr(text, "model", text)
        config = runner.model_config.hf_text_config
        try:
            layers, weights = read_head(
                folder, layers=config.num_hidden_layers, hidden_size=config.hidden_size
            )
        except ValueError as error:
            raise ValueError(f"--value-head {error}") from error
        if not supports_eagle3(model) or not hasattr(body, "norm"):
            raise ValueError(
                f"--value-head: vLLM does not show the hidden states of {type(model).__name__}; "
                "serve V with --critic in another process"
            )
        self._runner, self._norm = runner, body.norm
        self._weights = weights.to(runner.device)
        # What vLLM does for a draft model that reads them.
        model.set_aux_hidden_state_layers((layers,))
        runner.use_aux_hidden_state_outputs = True

    @torch.inference_mode()
    def values(self) -> torch.Tensor | None:
        """V by row of the step that has been computed and not yet sampled, on the host: there as
        soon as its tokens are. None where there is no such step."""
        state = self._runner.execute_model_state
        if state is None or not state.aux_hidden_states:
            return None
        rows = self._runner.query_start_loc.gpu[1 : state.logits.shape[0] + 1] - 1
        states = self._norm(state.aux_hidden_states[0][rows])
        values = states.float() @ self._weights
        host = torch.empty(values.shape, pin_memory=values.is_cuda)
        return host.copy_(values, non_blocking=True)


class ValueWorker(Worker):  # type: ignore[misc, valid-type, unused-ignore]  # the base is the platform's
    """vLLM's worker of the platform, whose outputs carry V."""

    def load_model(self, *arguments: Any, **named: Any) -> None:
        super().load_model(*arguments, **named)
        folder = head_folder(self.vllm_config.additional_config)
        self._value_head = None if folder is None else ValueHead(folder, self.model_runner)

    def sample_tokens(self, grammar_output: Any) -> Any:
        values = None if self._value_head is None else self._value_head.values()
        output = super().sample_tokens(grammar_output)
        # Scheduled asynchronously it is filled in later, and then handed on.
        setattr(getattr(output, "_model_runner_output", output), VALUES, values)
        return output
