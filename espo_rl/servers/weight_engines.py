"""Weights from GPU to GPU, by vLLM's own transfer engines: CUDA IPC and NCCL.

vLLM's trainer side knows the order of an update and its payloads
(`vllm.distributed.weight_transfer`). Ours are the wire, as vLLM's has no pause, no more than one
server and no error texts; the versions; and the ends of what would wait for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch

from espo_gateway.supervisor import free_port
from espo_gateway.vllm_plugin.client import WeightClient, WeightSyncError
from espo_rl.ppo.parameters import TensorSpec
from espo_rl.servers.weight_source import Loaded, ParameterSource, Tensors, nothing

T = TypeVar("T")


class EngineTransfer:
    """A `WeightTransfer` by one of vLLM's engines.

    Its connection with the servers is made at the first send, and anew after one that failed.

    Args:
        backend: "ipc": trainer and server use the same GPU; "nccl": they do not.
        timeout: seconds for a send.
    """

    def __init__(self, backend: Literal["ipc", "nccl"], *, timeout: float) -> None:
        self.backend: str = backend
        self._timeout = timeout
        self._source = ParameterSource()
        self._engine: Any = None
        self._wire: Any = None

    async def send(
        self,
        clients: Sequence[WeightClient],
        specs: Sequence[TensorSpec],
        tensors: Tensors,
        version: str,
        loaded: Loaded = nothing,
    ) -> None:
        """See `WeightTransfer`."""
        source = self._source
        source.specs, source.tensors = specs, tensors
        try:
            if self._engine is None:
                self._wire = wire_of(clients, asyncio.get_running_loop())
                self._engine = await self._connected(clients)
            self._wire.version = version
            async with contextlib.AsyncExitStack() as paused:
                for client in clients:
                    await paused.enter_async_context(client.paused())
                await self._waited(self._engine.send_weights)
                await loaded()
        except BaseException:
            # One side may wait in a collective for the other, so this group is of no more use.
            self._engine = None
            raise

    async def close(self) -> None:
        """Take down the connection, if there is one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await in_thread(engine.shutdown)

    async def _connected(self, clients: Sequence[WeightClient]) -> Any:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        if torch.cuda.is_available():
            self._source.device = torch.device("cuda", torch.cuda.current_device())
        workers = [await client.workers() for client in clients]
        self._wire.offsets = list(accumulate(workers, initial=0))[:-1]
        largest = max((spec.num_bytes for spec in self._source.specs), default=0)
        info = init_info(self.backend, clients[0].url, 1 + sum(workers), largest)
        return await self._waited(
            lambda: WeightTransferTrainerFactory.trainer_init(
                info, client=self._wire, source=self._source
            )
        )

    async def _waited(self, step: Callable[[], T]) -> T:
        """What a step that blocks gives; an error of either side, whichever comes first."""
        device = self._source.device

        def on_device() -> T:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a thread has its own
            return step()

        running = asyncio.ensure_future(in_thread(on_device))
        refused = self._wire.refused = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait(
                [running, refused], timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if refused.done():
                refused.result()
            if not running.done():
                raise WeightSyncError(
                    f"weights by {self.backend} took longer than {self._timeout:g} s "
                    "(servers.hang_timeout): a server or a GPU does not answer"
                )
            return running.result()
        except (WeightSyncError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise WeightSyncError(f"weights by {self.backend}: {error!r}") from error
        finally:
            running.cancel()
            refused.cancel()


#: Bytes that are packed together, where no tensor is larger.
PACKED = 1 << 28


def init_info(backend: str, url: str, world_size: int, largest: int) -> Any:
    """vLLM's trainer-side init info; this process is the only sender.

    Both ways are packed: of what ZeRO-3 gathers no more than a buffer is whole at a time.

    Args:
        url: of a server. world_size: its workers, those of all others, and the trainer.
        largest: bytes of the largest tensor; a buffer must hold it.
    """
    packed = max(PACKED, largest)
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=packed)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(
        master_address=own_address(url),
        master_port=free_port(),
        world_size=world_size,
        packed_buffer_size_bytes=packed,
        rank=0,
    )


def own_address(url: str) -> str:
    """The address of this machine that the server of a URL sees."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))  # sends nothing
        return str(probe.getsockname()[0])


def wire_of(clients: Sequence[WeightClient], loop: asyncio.AbstractEventLoop) -> Any:
    """vLLM's client for all servers at once, by ours; its methods are called in another thread.

    version: that finished updates get. offsets: of each server's first worker among all workers.
    refused: is given the first error of a server.
    """
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

    class Wire(HTTPVLLMWeightSyncClient):
        version = ""
        offsets: Sequence[int] = ()
        refused: asyncio.Future[None]

        def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
            if path == "start_weight_update":
                self._each([client.start for client in clients])
            else:
                self._each([_bound(client, path, json) for client in clients])

        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
            bodies = [{"init_info": dict(init_info)} for _ in clients]
            for body, offset in zip(bodies, self.offsets, strict=True):
                if "rank_offset" in init_info:
                    body["init_info"]["rank_offset"] += offset
            route = "init_weight_transfer_engine"
            pairs = zip(clients, bodies, strict=True)
            self._each([_bound(client, route, body) for client, body in pairs])

        def finish_weight_update(self, weight_version: str | None = None) -> None:
            super().finish_weight_update(weight_version or self.version)

        def _each(self, calls: Sequence[Callable[[], Awaitable[Any]]]) -> None:
            async def all_of_them() -> None:
                try:
                    await asyncio.gather(*(call() for call in calls))
                except BaseException as error:
                    if not self.refused.done():
                        self.refused.set_exception(error)
                    raise

            asyncio.run_coroutine_threadsafe(all_of_them(), loop).result()

    return Wire("", timeout=0)


def _bound(
    client: WeightClient, path: str, json: dict[str, Any] | None
) -> Callable[[], Awaitable[Any]]:
    return lambda: client.post(f"/{path}", json=json)


async def in_thread(step: Callable[[], T]) -> T:
    """As `asyncio.to_thread`, but nobody waits for a thread that never ends, not even at exit."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(action: Callable[[Any], None], value: object) -> None:
        def told() -> None:
            if not done.done():
                action(value)

        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody listens
            loop.call_soon_threadsafe(told)

    def work() -> None:
        try:
            result = step()
        except BaseException as error:
            tell(done.set_exception, error)
        else:
            tell(done.set_result, result)

    threading.Thread(target=work, daemon=True, name="weight transfer").start()
    return await done
