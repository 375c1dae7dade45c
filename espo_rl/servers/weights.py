"""From the trainer's parameters to the servers' weights, and the proof that they arrived.

Owns the bytes in between: a safetensors file in shared memory (a memfd), written tensor by tensor,
so the model is never in this process a second time beyond that file. The file has no name: it is
gone with this process, however that ends. Servers on other machines read an ordinary file instead.

    publisher = WeightPublisher(["http://127.0.0.1:8000"])
    await publisher.publish(tensor_specs(model), gathered(model), version="12")
    await publisher.verify(probe, expected_logprobs, version="12")

A critic's weights go the same way; `verify_values` is their proof.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Self

import torch

from espo_gateway.files import written_whole
from espo_gateway.vllm_plugin.client import WeightClient, WeightSyncError
from espo_rl.ppo.parameters import TensorSpec

#: safetensors' names of dtypes
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


class WeightParityError(WeightSyncError):
    """A server does not compute with the trainer's weights."""


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
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for spec, (name, tensor) in zip(specs, tensors, strict=True):
        if (name, tuple(tensor.shape)) != (spec.name, spec.shape):
            raise ValueError(f"expected {spec.name} {spec.shape}, got {name} {tuple(tensor.shape)}")
        whole = tensor.detach().to(device="cpu", dtype=spec.dtype).contiguous()
        file.write(whole.flatten().view(torch.uint8).numpy().data)
    return 8 + len(text) + end


class WeightPublisher:
    """Brings weights to one or more servers, concurrently, and proves that they are there.

    Args:
        urls: of the servers, without `/v1`.
        path: a file that the servers can read, for servers on other machines; shared memory
            when not given.
        timeout: seconds for one call to a server.
    """

    def __init__(
        self, urls: Sequence[str], *, path: Path | None = None, timeout: float = 120.0
    ) -> None:
        self._clients = [WeightClient(url, timeout=timeout) for url in urls]
        self._path = path

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(client.close() for client in self._clients))

    async def publish(
        self,
        specs: Sequence[TensorSpec],
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        version: str,
    ) -> None:
        """Make every server compute with these weights; requests in flight wait and go on.

        Args:
            specs, tensors: see `write_safetensors`; together the whole model.
            version: a name for these weights, reported by the servers from now on.

        Raises:
            WeightSyncError: when a server refuses or cannot be reached; all are tried first, so
                some may have the new weights: publish again, or stop.
        """
        if self._path is not None:
            # A server must never see half a file, not even one that was left by a crash.
            with written_whole(self._path) as scratch, scratch.open("wb") as file:
                write_safetensors(file, specs, tensors)
            await self._update(str(self._path), version)
            return
        with os.fdopen(os.memfd_create("espo-weights"), "wb") as file:
            write_safetensors(file, specs, tensors)
            file.flush()
            await self._update(f"/proc/{os.getpid()}/fd/{file.fileno()}", version)

    async def _update(self, path: str, version: str) -> None:
        updates = (client.update([path], version) for client in self._clients)
        # All of them end before the file goes away, and before the first error is raised.
        raise_first(await asyncio.gather(*updates, return_exceptions=True))

    async def verify(
        self,
        token_ids: Sequence[int],
        expected_logprobs: Sequence[float],
        *,
        version: str,
        tolerance: float = 1e-3,
    ) -> float:
        """Prove that every server computes with the trainer's weights.

        Args:
            token_ids: a probe, shape [tokens].
            expected_logprobs: the trainer's log π(token | tokens before it), shape [tokens - 1].
            version: what was published.
            tolerance: largest absolute difference; 1e-3 fits float32, bfloat16 needs about 0.1.

        Returns:
            the largest difference found.

        Raises:
            WeightParityError: when a server has another version or computes other logprobs.
        """
        return await self._verify(
            lambda client: client.prompt_logprobs(token_ids),
            expected_logprobs,
            version,
            tolerance,
            "logprob",
        )

    async def verify_values(
        self,
        token_ids: Sequence[int],
        expected_values: Sequence[float],
        *,
        version: str,
        tolerance: float = 1e-3,
    ) -> float:
        """Prove that every critic server computes with the trainer's weights.

        Args:
            token_ids: a probe, shape [tokens].
            expected_values: the trainer's V after each of its tokens, shape [tokens].
            version, tolerance: see `verify`. A critic whose head is zero, as it is before the first
                update, gives 0 with any other weights too.

        Returns:
            the largest difference found.

        Raises:
            WeightParityError: when a server has another version or computes other values.
        """
        prefixes = [token_ids[:end] for end in range(1, len(token_ids) + 1)]
        return await self._verify(
            lambda client: client.values(prefixes), expected_values, version, tolerance, "value"
        )

    async def _verify(
        self,
        ask: Callable[[WeightClient], Awaitable[list[float]]],
        expected: Sequence[float],
        version: str,
        tolerance: float,
        name: str,
    ) -> float:
        async def largest_difference(client: WeightClient) -> float:
            found_version = await client.weight_version()
            if found_version != version:
                raise WeightParityError(
                    f"{client.url} has weights version {found_version!r}, not {version!r}"
                )
            differences = [abs(a - b) for a, b in zip(await ask(client), expected, strict=True)]
            # Asked like this, NaN is too large too.
            too_large = [one for one in differences if not one <= tolerance]
            if too_large:
                raise WeightParityError(
                    f"{client.url} does not compute with the published weights: a {name} of the "
                    f"probe differs by {max(too_large):.3g}, more than {tolerance:g}"
                )
            return max(differences)

        differences = await asyncio.gather(
            *map(largest_difference, self._clients), return_exceptions=True
        )
        raise_first(differences)
        return max(difference for difference in differences if isinstance(difference, float))


def raise_first(results: Iterable[object]) -> None:
    """Raise the first exception among the results of `gather(return_exceptions=True)`."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
