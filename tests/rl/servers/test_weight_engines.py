"""Weights by vLLM's own engines: their trainer sides, real but for the transport."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import torch
from aiohttp import web
from vllm.distributed.weight_transfer import ipc_engine, nccl_engine
from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk

from espo_gateway.vllm_plugin.client import WeightClient, WeightRouteError, WeightSyncError
from espo_rl.ppo.parameters import gathered, tensor_specs
from espo_rl.servers.weight_engines import EngineTransfer, in_thread
from espo_rl.servers.weights import WeightPublisher
from tests.helpers.models import random_model
from tests.helpers.weight_routes import UPDATE, Recorder, fail, serving

AGAIN = UPDATE[1:]


@dataclass
class Transport:
    """What NCCL would have been given."""

    groups: list[Any] = field(default_factory=list)
    sent: dict[str, torch.Tensor] = field(default_factory=dict)
    before: Callable[[], object] = lambda: None
    taken_down: int = 0

    def open(self, info: Any) -> Transport:
        self.groups.append(info)
        return self

    def broadcast(self, iterator: Iterator[tuple[str, torch.Tensor]], **_: Any) -> None:
        self.before()
        self.sent = {name: tensor.clone() for name, tensor in iterator}

    def destroy(self) -> None:
        self.taken_down += 1


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Transport:
    transport = Transport()
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", transport.open)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", transport.broadcast)
    return transport


@pytest_asyncio.fixture
async def recorder() -> AsyncIterator[Recorder]:
    async with serving() as recorder:
        yield recorder


def publisher(*servers: Recorder, backend: Any = "nccl", timeout: float = 30.0) -> WeightPublisher:
    transfer = EngineTransfer(backend, timeout=timeout)
    return WeightPublisher([server.url for server in servers], transfer=transfer)


async def publish(to: WeightPublisher, version: str = "1", seed: int = 3) -> None:
    model = random_model(seed)
    await to.publish(tensor_specs(model), gathered(model), version=version)


async def test_nccl_in_vllms_own_order(recorder: Recorder, nccl: Transport) -> None:
    model = random_model(3)
    async with publisher(recorder) as to:
        await to.publish(tensor_specs(model), gathered(model), version="7")
        assert recorder.routes == ["/get_world_size", *UPDATE]
        assert recorder.seen["/finish_weight_update"] == {"weight_version": "7"}
        told: Any = recorder.seen["/update_weights"]
        parameters = dict(model.named_parameters())
        assert told["update_info"]["names"] == list(parameters) == list(nccl.sent)
        assert told["update_info"]["shapes"] == [list(one.shape) for one in parameters.values()]
        for name, tensor in parameters.items():
            assert torch.equal(nccl.sent[name], tensor), name
        # The connection stands; the weights are new ones.
        await publish(to, "8", seed=4)
        assert recorder.routes == ["/get_world_size", *UPDATE, *AGAIN]
        assert recorder.seen["/finish_weight_update"] == {"weight_version": "8"}
        assert torch.equal(nccl.sent["model.norm.weight"], random_model(4).model.norm.weight)
    assert len(nccl.groups) == nccl.taken_down == 1


async def test_all_workers_of_all_servers_have_their_rank(
    recorder: Recorder, nccl: Transport
) -> None:
    async with serving() as other:
        recorder.workers, other.workers = 2, 4
        async with publisher(recorder, other) as to:
            await publish(to)
        said: list[Any] = [one.seen["/init_weight_transfer_engine"] for one in (recorder, other)]
        assert other.routes == recorder.routes
    infos = [body["init_info"] for body in said]
    assert [info["rank_offset"] for info in infos] == [1, 3]
    assert {info["world_size"] for info in infos} == {nccl.groups[0].world_size} == {7}
    assert infos[0]["packed"]
    assert infos[0]["master_address"] == "127.0.0.1"


@pytest.mark.parametrize("route", ["/start_weight_update", "/update_weights", "/pause"])
async def test_what_a_server_refuses_ends_the_wait_of_the_trainer(
    recorder: Recorder, nccl: Transport, route: str
) -> None:
    for_ever = threading.Event()
    nccl.before = for_ever.wait
    async with publisher(recorder) as to:
        recorder.behaviour[route] = fail(500)
        with pytest.raises(WeightRouteError, match="the reason"):
            await publish(to)
        assert recorder.routes[-1] == "/resume"
        # What half-happened is of no more use: a new connection is made.
        recorder.behaviour.clear()
        nccl.before = lambda: None
        await publish(to, "2")
        assert len(nccl.groups) == 2
    for_ever.set()


async def test_what_fails_on_the_trainers_side_resumes_the_server(
    recorder: Recorder, nccl: Transport
) -> None:
    model = random_model(3)
    async with publisher(recorder) as to:
        specs = tensor_specs(model)[::-1]
        with pytest.raises(WeightSyncError, match="metadata"):
            await to.publish(specs, gathered(model), version="1")
    assert recorder.routes[-1] == "/resume"


async def test_a_server_that_refuses_to_connect_is_named(
    recorder: Recorder, nccl: Transport
) -> None:
    recorder.behaviour["/init_weight_transfer_engine"] = fail(400)
    async with publisher(recorder) as to:
        with pytest.raises(WeightRouteError, match=recorder.url):
            await publish(to)
    assert "/pause" not in recorder.routes


async def test_nobody_waits_for_ever(recorder: Recorder, nccl: Transport) -> None:
    for_ever = threading.Event()
    nccl.before = for_ever.wait

    async def hanging(request: web.Request) -> web.Response:
        await asyncio.to_thread(for_ever.wait)
        return web.json_response({})

    recorder.behaviour["/update_weights"] = hanging
    async with publisher(recorder, timeout=0.5) as to:
        with pytest.raises(WeightSyncError, match=r"took longer than 0\.5 s"):
            await publish(to)
    assert recorder.routes[-1] == "/resume"
    for_ever.set()


async def test_ipc_sends_handles_by_the_same_routes(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def producer(
        iterator: Iterator[tuple[str, torch.Tensor]], buffer_size_bytes: int, **_: Any
    ) -> Iterator[PackedIpcChunk]:
        pairs = list(iterator)
        sizes = [tensor.nbytes for _, tensor in pairs]
        assert buffer_size_bytes >= max(sizes)
        yield PackedIpcChunk(
            names=[name for name, _ in pairs],
            shapes=[list(tensor.shape) for _, tensor in pairs],
            dtype_names=["float32"] * len(pairs),
            tensor_sizes=sizes,
            ipc_handle={"gpu": (1, 2)},
        )

    monkeypatch.setattr(ipc_engine, "packed_ipc_producer", producer)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    gpu = SimpleNamespace(uuid="gpu")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    async with publisher(recorder, backend="ipc") as to:
        await publish(to, "7")
    assert recorder.routes == ["/get_world_size", *UPDATE]
    assert recorder.seen["/init_weight_transfer_engine"] == {"init_info": {"packed": True}}
    assert recorder.seen["/finish_weight_update"] == {"weight_version": "7"}
    told: Any = recorder.seen["/update_weights"]
    assert isinstance(told["update_info"]["ipc_handles_pickled"], str)


async def test_a_thread_that_never_ends_is_waited_for_by_nobody() -> None:
    for_ever = threading.Event()
    waiting = asyncio.ensure_future(in_thread(for_ever.wait))
    await asyncio.sleep(0)
    [thread] = [one for one in threading.enumerate() if one.name == "weight transfer"]
    assert thread.daemon
    waiting.cancel()
    for_ever.set()
    thread.join()


async def test_a_client_is_at_rest_after_an_update(recorder: Recorder) -> None:
    async with WeightClient(recorder.url) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.paused():
                raise ZeroDivisionError
    assert recorder.routes == ["/pause", "/resume"]
