"""V by a head on the actor's own layers, as policy servers with `--value-head` tell it.

head = ValueHead(actor, policy, folder)  # before it is wrapped, adapted or sharded
values = head(engine, batch)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from espo_gateway.vllm_plugin.head_file import read_head
from espo_rl.ppo.policy import Policy
from espo_rl.ppo.samples import MicroBatch


class ValueHead:
    """A head beside the model: what it stands on is read as the model goes by.

    Raises:
        ValueError: it is of another model, or this one is not made of `layers` and a `norm`.
    """

    def __init__(self, model: Any, policy: Policy, folder: Path) -> None:
        config, body = model.config.get_text_config(), model.base_model
        layers, self._weights = read_head(
            folder, layers=config.num_hidden_layers, hidden_size=config.hidden_size
        )
        if not hasattr(body, "layers") or not hasattr(body, "norm"):
            raise ValueError(
                f"stopping.value_head: {type(model).__name__} does not show its hidden states as "
                "`layers` and a `norm`: ask a critic server, without stopping.value_head"
            )
        self._policy = policy
        self._places: Tensor | None = None
        self._seen: Tensor | None = None  # the states, and then V
        body.layers[layers - 1].register_forward_hook(self._keep)
        # Within its own call, as ZeRO-3 has its weight whole there alone.
        body.norm.register_forward_hook(self._read)

    def __call__(self, model: Any, batch: MicroBatch) -> Tensor:
        """V of the state that each kept token was sampled in, row after row, [kept tokens].

        model: the one that it was made of, or the engine that holds it.
        """
        view = batch.view(packs=self._policy.packs)
        self._places = view.before
        try:
            self._policy.go_by(model, view)
            values = self._seen
        finally:
            self._places = self._seen = None
        assert values is not None
        return values

    def _keep(self, _module: Any, _given: Any, state: Any) -> None:
        if self._places is not None:
            state = state[0] if isinstance(state, tuple) else state
            self._seen = state.flatten(0, 1).index_select(0, self._places)

    def _read(self, norm: Any, _given: Any, _normed: Any) -> None:
        if self._seen is not None:
            self._seen = norm.forward(self._seen).float() @ self._weights.to(self._seen.device)
