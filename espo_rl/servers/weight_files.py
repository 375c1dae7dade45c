"""Weights as safetensors files: in shared memory, or on a disk that the servers see.

Owns the bytes in between, written tensor by tensor, so the model is never in this process a second
time beyond that file. The one in shared memory (a memfd) has no name: it is gone with this process,
however that ends.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from espo_gateway.files import written_whole
from espo_gateway.vllm_plugin import BACKEND
from espo_gateway.vllm_plugin.client import WeightClient, WeightSyncError
from espo_rl.ppo.parameters import TensorSpec
from espo_rl.servers.weight_source import Loaded, Tensors, nothing, raise_first

#: safetensors' names of dtypes
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


#: by which a file of ours is known, so that no other is written over
MARK = {"__metadata__": {"made_by": "espo, on the way to servers"}}


class FileTransfer:
    """A `WeightTransfer` by files, which works on any device and for one host or several.

    Args:
        path: a file that the servers can read; shared memory when not given.
    """

    backend = BACKEND

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    async def send(
        self,
        clients: Sequence[WeightClient],
        specs: Sequence[TensorSpec],
        tensors: Tensors,
        version: str,
        loaded: Loaded = nothing,
    ) -> None:
        """See `WeightTransfer`; a server that fails does not keep the others from the weights.

        Raises:
            WeightSyncError: the file cannot be written, or as for every transfer.
        """
        if self._path is not None:
            # A server must never see half a file, not even one that was left by a crash.
            with (
                _write_errors(f"{self._path}: free space or change servers.weights_path"),
                written_whole(self._path) as scratch,
                scratch.open("wb") as file,
            ):
                write_safetensors(file, specs, tensors)
            await _update(clients, str(self._path), version, loaded)
            return
        with os.fdopen(os.memfd_create("espo-weights"), "wb") as file:
            with _write_errors("shared memory: free some, or give servers.weights_path"):
                write_safetensors(file, specs, tensors)
                file.flush()
            await _update(clients, f"/proc/{os.getpid()}/fd/{file.fileno()}", version, loaded)

    async def close(self) -> None:
        """Nothing is held."""


@contextmanager
def _write_errors(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightSyncError(
            f"cannot write the weights ({error.strerror or error}) to {where}"
        ) from error


async def _update(clients: Sequence[WeightClient], path: str, version: str, loaded: Loaded) -> None:
    async with AsyncExitStack() as paused:
        updates = (paused.enter_async_context(client.loaded([path], version)) for client in clients)
        results = await asyncio.gather(*updates, return_exceptions=True)
        results += await asyncio.gather(loaded(), return_exceptions=True)
    # All of them end before the file goes away, and before the first error is raised.
    raise_first(results)


def write_safetensors(
    file: BinaryIO, specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]
) -> int:
    """Write a safetensors file tensor by tensor (the library wants all of them at once).

    Format: https://huggingface.co/docs/safetensors (header's length, JSON header, data).

    Args:
        specs: what comes, in order.
        tensors: name and value, in the order of `specs`; on any device, of any float dtype.

    Returns:
        bytes written.

    Raises:
        ValueError: when the tensors are not those of the specs.
    """
    header: dict[str, object] = {}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        header[spec.name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    if len(header) != len(specs):
        raise ValueError("a name occurs twice among the tensors")
    text = json.dumps(MARK | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for spec, (name, tensor) in zip(specs, tensors, strict=True):
        if (name, tuple(tensor.shape)) != (spec.name, spec.shape):
            raise ValueError(f"expected {spec.name} {spec.shape}, got {name} {tuple(tensor.shape)}")
        whole = tensor.detach().to(device="cpu", dtype=spec.dtype).contiguous()
        file.write(whole.flatten().view(torch.uint8).numpy().data)
    return 8 + len(text) + end


def is_ours(path: Path) -> bool:
    """Whether a file is one that `write_safetensors` wrote."""
    with path.open("rb") as file:
        start = json.dumps(MARK, separators=(",", ":"))[:-1].encode()
        return file.read(8 + len(start))[8:] == start
