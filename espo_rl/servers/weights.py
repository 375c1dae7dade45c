"""From the trainer's parameters to the servers' weights, and the proof that they arrived.

    publisher = WeightPublisher(["http://127.0.0.1:8000"])
    await publisher.publish(tensor_specs(model), gathered(model), version="12")
    await publisher.verify(probe, expected_logprobs, version="12")

A critic's weights go the same way; `verify_values` is their proof. Which way they take is the
`WeightTransfer`'s: `weight_files`, `weight_engines`.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import suppress
from statistics import fmean
from typing import Self
from urllib.parse import urlsplit

import torch

from espo_gateway.addresses import is_loopback
from espo_gateway.vllm_plugin.client import WeightClient, WeightSyncError
from espo_rl.config import Servers
from espo_rl.ppo.parameters import TensorSpec
from espo_rl.servers.weight_engines import EngineTransfer
from espo_rl.servers.weight_files import FileTransfer
from espo_rl.servers.weight_source import Loaded, Tensors, WeightTransfer, nothing, raise_first

#: of a critic's weights beside a policy's
CRITIC_SUFFIX = ".critic"

#: mean |Δ logprob| that is rounding; of 135 M parameters in bfloat16 it is 0.04
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}


class WeightParityError(WeightSyncError):
    """A server does not compute with the trainer's weights."""


class WeightPublisher:
    """Brings weights to one or more servers, concurrently, and proves that they are there.

    Args:
        urls: of the servers, without `/v1`.
        transfer: how; through shared memory when not given.
        timeout: seconds for one call to a server.
        keep_kv: see `WeightClient`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        transfer: WeightTransfer | None = None,
        timeout: float = 120.0,
        keep_kv: bool = False,
    ) -> None:
        self._clients = [WeightClient(url, timeout=timeout, keep_kv=keep_kv) for url in urls]
        self._transfer = transfer or FileTransfer()
        #: fingerprints of what was sent last, by name
        self._sent: dict[str, int] = {}
        #: what was expected of the probe at first, and when it had last moved by more than rounding
        self._earlier: list[Sequence[float]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._transfer.close()
        await asyncio.gather(*(client.close() for client in self._clients))

    async def publish(
        self,
        specs: Sequence[TensorSpec],
        tensors: Tensors,
        *,
        version: str,
        loaded: Loaded = nothing,
    ) -> None:
        """Make every server compute with these weights; requests in flight wait and go on.

        Args:
            specs: what comes, in order. tensors: name and value of each; together the whole model.
            version: a name for these weights, reported by the servers from now on.
            loaded: awaited when all servers have them and none has gone on yet.

        Raises:
            WeightSyncError: when a server refuses or cannot be reached; all are tried first, so
                some may have the new weights: publish again, or stop.
        """
        self._sent.clear()
        if not self._clients:
            return
        noted = self._noted(tensors)
        try:
            await self._transfer.send(self._clients, specs, noted, version, loaded)
        finally:
            # One that is left half-way would hold on to the trainer.
            for one in (noted, tensors):
                if isinstance(one, Generator):
                    with suppress(ValueError):  # a thread that was given up is inside
                        one.close()

    def _noted(self, tensors: Tensors) -> Generator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            self._sent[name] = fingerprint(tensor)
            yield name, tensor

    async def explain(self, tensors: Tensors) -> str:
        """Where weights that are not proven were lost: what left, and what servers hold.

        Args:
            tensors: the trainer's weights as they are now, as they were published.
        """
        digests: dict[str, str] = {}
        stale = []
        for name, tensor in tensors:
            digests[name] = digest(tensor)
            if self._sent.get(name) != fingerprint(tensor):
                stale.append(name)
        if stale:
            return f"not sent: {named(stale)} left the trainer with other numbers than it has now"
        said = []
        for client in self._clients:
            # Some layers are packed, padded or put together there, so not all can be compared.
            held = {key.rpartition(":")[2]: one for key, one in (await client.checksums()).items()}
            shared = digests.keys() & held.keys()
            equal = [name for name in shared if held[name] == digests[name]]
            if not shared:
                reason = "none of its parameters has the name of one of the trainer's"
            elif not equal:
                reason = f"not loaded: none of {named(sorted(shared))} is there as it was sent"
            else:
                reason = f"loaded ({len(equal)} of {len(shared)} compared) but not used"
            said.append(f"{client.url}: {reason}")
        return "; ".join(said)

    async def verify(
        self,
        token_ids: Sequence[int],
        expected_logprobs: Sequence[float],
        *,
        version: str,
        tolerance: float = TOLERANCE["float32"],
    ) -> float:
        """Prove that every server computes with the trainer's weights.

        Args:
            token_ids: a probe, shape [tokens].
            expected_logprobs: the trainer's log π(token | tokens before it), shape [tokens - 1].
            version: what was published.
            tolerance: of the mean absolute difference. The largest one says little in bfloat16,
                where an unlikely token's is ten times the mean (0.04 of a model of 135 M).

        Returns:
            the mean difference found, of the worst server.

        Raises:
            WeightParityError: when a server has another version, computes other logprobs, or such
                as lie nearer to those of earlier weights.
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
        tolerance: float = TOLERANCE["float32"],
    ) -> float:
        """Prove that every critic server computes with the trainer's weights.

        Args:
            token_ids: a probe, shape [tokens].
            expected_values: the trainer's V after each of its tokens, shape [tokens].
            version, tolerance: see `verify`. A critic whose head is zero, as it is before the first
                update, gives 0 with any other weights too.

        Returns:
            the mean difference found, of the worst server.

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
        earlier = [one for one in self._earlier if len(one) == len(expected)]

        async def mean_difference(client: WeightClient) -> float:
            found_version = await client.weight_version()
            if found_version != version:
                raise WeightParityError(
                    f"{client.url} has weights version {found_version!r}, not {version!r}"
                )
            told = await ask(client)
            found = distance(told, expected)
            problem = (
                f"{client.url} does not compute with the published weights: a {name} of the probe "
                f"differs by {found:.3g} in the mean"
            )
            # Asked like this, NaN is too large too.
            if not found <= tolerance:
                raise WeightParityError(f"{problem}, more than {tolerance:g}")
            # In bfloat16 that is more than many steps move it by; mere rounding it is not.
            nearest = min((distance(told, one) for one in earlier), default=math.inf)
            if nearest < found / 2 and found > tolerance / 100:
                raise WeightParityError(
                    f"{problem}, and by {nearest:.3g} from what earlier ones gave"
                )
            return found

        differences = await asyncio.gather(
            *map(mean_difference, self._clients), return_exceptions=True
        )
        raise_first(differences)
        worst = max(difference for difference in differences if isinstance(difference, float))
        if not earlier or distance(expected, earlier[-1]) > 4 * worst:
            self._earlier = [*earlier[:1], list(expected)]
        return worst


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference."""
    return fmean(abs(a - b) for a, b in zip(one, other, strict=True))


def fingerprint(tensor: torch.Tensor) -> int:
    """A sum over a tensor's bits, which costs no more than to read it once."""
    whole = tensor.detach().contiguous().flatten()
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()]
    return int(whole.view(width).sum(dtype=torch.int64))


def digest(tensor: torch.Tensor) -> str:
    """As `WeightClient.checksums` has it."""
    whole = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(whole.view(torch.uint8).numpy().data).hexdigest()


def named(names: Sequence[str]) -> str:
    """The first of some names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def transfer_of(
    config: Servers, urls: Sequence[str], *, suffix: str | None = None
) -> WeightTransfer:
    """The way that a recipe chooses to these servers; suffix: of its file, if that is the way.

    "auto" goes through shared memory, which works on every device of one host; a path, where there
    is one; NCCL to servers on other hosts.
    """
    way = config.weight_transfer
    if way == "auto":
        remote = not all(is_loopback(urlsplit(url).hostname or "") for url in urls)
        way = "nccl" if remote and torch.cuda.is_available() else "shared-memory"
    if (path := config.weights_path) is not None:
        return FileTransfer(path if suffix is None else path.with_suffix(suffix))
    if way in ("ipc", "nccl"):
        # Longer than one call may take, so that the server which hangs is told by it.
        return EngineTransfer(way, timeout=2.0 * config.weights_timeout)
    return FileTransfer()
