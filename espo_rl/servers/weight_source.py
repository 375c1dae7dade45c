"""What weights on their way to the servers are, and what brings them there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch

from espo_gateway.vllm_plugin.client import WeightClient
from espo_rl.ppo.parameters import TensorSpec

#: Names and values, in the order of their specs, each whole only while it is used.
Tensors = Iterable[tuple[str, torch.Tensor]]
#: Awaited while no server samples.
Loaded = Callable[[], Awaitable[None]]


async def nothing(*_: object) -> None:
    """Nobody is to be told."""


class WeightTransfer(Protocol):
    """One way from the trainer to the servers.

    backend: the server's `--weight-transfer-config '{"backend": ...}'`.
    """

    backend: str

    async def send(
        self,
        clients: Sequence[WeightClient],
        specs: Sequence[TensorSpec],
        tensors: Tensors,
        version: str,
        loaded: Loaded = nothing,
    ) -> None:
        """Make every server compute with these weights, under that version.

        loaded: awaited when all have them and none has gone on yet.

        Raises:
            WeightSyncError: a server refuses or cannot be reached, or it takes too long. Servers
                are resumed; some may have the new weights.
        """

    async def close(self) -> None:
        """Give up what is held between two sends."""


class ParameterSource:
    """vLLM's `WeightSource`, structurally: what is sent next, declared before it is gathered.

    Under ZeRO-3 iterating is a collective, which rank 0 has the other ranks take part in.
    """

    def __init__(self) -> None:
        self.specs: Sequence[TensorSpec] = ()
        self.tensors: Tensors = ()
        self.device = torch.device("cpu")

    def metadata(self) -> Sequence[TensorSpec]:
        """Name, dtype and shape of each, in the order of iteration."""
        return self.specs

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for spec, (name, tensor) in zip(self.specs, self.tensors, strict=True):
            yield name, tensor.to(device=self.device, dtype=spec.dtype)


def raise_first(results: Iterable[object]) -> None:
    """Raise the first exception among the results of `gather(return_exceptions=True)`."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
