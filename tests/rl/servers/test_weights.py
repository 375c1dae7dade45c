"""The bytes and the order of a weight update; no vLLM needed."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import fmean

import pytest
import pytest_asyncio
import torch
from aiohttp import web
from safetensors.torch import load_file

from espo_gateway.vllm_plugin.client import WeightClient, WeightRouteError, WeightSyncError
from espo_rl.config import Servers
from espo_rl.ppo.parameters import TensorSpec, gathered, tensor_specs
from espo_rl.servers import weight_files
from espo_rl.servers.weight_files import FileTransfer, write_safetensors
from espo_rl.servers.weights import (
    WeightParityError,
    WeightPublisher,
    digest,
    fingerprint,
    transfer_of,
)
from tests.helpers.models import (
    PROBE,
    logprobs,
    random_checkpoint,
    random_critic,
    random_model,
    values,
)
from tests.helpers.weight_routes import UPDATE, Recorder, fail, serving

# Bytes


@pytest.mark.parametrize("tied", [True, False])
def test_memfd_holds_what_hugging_face_saves(tmp_path: Path, tied: bool) -> None:
    model = random_model(1, tied=tied)
    saved = load_file(random_checkpoint(tmp_path, 1, tied=tied) / "model.safetensors")
    with os.fdopen(os.memfd_create("test"), "wb") as file:
        size = write_safetensors(file, tensor_specs(model), gathered(model))
        file.flush()
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        assert os.stat(path).st_size == size
        written = load_file(path)
    assert written.keys() == saved.keys()
    assert ("lm_head.weight" in written) == (not tied)
    for name, tensor in saved.items():
        assert torch.equal(written[name], tensor), name


def test_dtype_of_the_spec_is_what_is_written(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, 2.5], [-3.0, 1e-3]])
    specs = [TensorSpec("odd", torch.float16, (3,)), TensorSpec("w", torch.bfloat16, (2, 2))]
    with (tmp_path / "file").open("wb") as file:
        # Neither contiguous nor of the file's dtype, and an odd number of bytes before it.
        write_safetensors(file, specs, [("odd", torch.ones(3)), ("w", values.T)])
    assert torch.equal(load_file(tmp_path / "file")["w"], values.T.to(torch.bfloat16))


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param([], id="missing"),
        pytest.param([("w", torch.ones(2)), ("x", torch.ones(2))], id="too many"),
        pytest.param([("x", torch.ones(2))], id="another name"),
        pytest.param([("w", torch.ones(2, 1))], id="another shape"),
    ],
)
def test_tensors_that_are_not_the_specs_are_refused(
    tmp_path: Path, tensors: list[tuple[str, torch.Tensor]]
) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(ValueError, match=r"expected w|zip"):
        write_safetensors(file, [TensorSpec("w", torch.float32, (2,))], tensors)


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    spec = TensorSpec("w", torch.float32, (2,))
    with (tmp_path / "file").open("wb") as file, pytest.raises(ValueError, match="twice"):
        write_safetensors(file, [spec, spec], [("w", torch.ones(2)), ("w", torch.ones(2))])


# The order of calls, against a server that only writes down what it is asked


@pytest_asyncio.fixture
async def recorder() -> AsyncIterator[Recorder]:
    async with serving() as recorder:
        yield recorder


async def test_order_of_an_update(recorder: Recorder) -> None:
    async with WeightClient(recorder.url) as client:
        await client.update(["/a", "/b"], version="7")
    assert recorder.routes == UPDATE
    assert recorder.seen["/update_weights"] == {"update_info": {"paths": ["/a", "/b"]}}
    assert recorder.seen["/finish_weight_update"] == {"weight_version": "7"}


@pytest.mark.parametrize("route", ["/pause", *UPDATE[3:6]])
async def test_a_failure_is_raised_and_the_server_resumed(recorder: Recorder, route: str) -> None:
    recorder.behaviour[route] = fail(500)
    async with WeightClient(recorder.url) as client:
        with pytest.raises(WeightRouteError, match="the reason") as error:
            await client.update(["/a"], version="7")
    assert (error.value.url, error.value.route, error.value.status) == (recorder.url, route, 500)
    assert recorder.routes == [*UPDATE[: UPDATE.index(route) + 1], "/resume"]


async def test_a_resume_that_fails_too_is_told(recorder: Recorder) -> None:
    recorder.behaviour["/update_weights"] = fail(500)
    recorder.behaviour["/resume"] = fail(503)
    async with WeightClient(recorder.url) as client:
        with pytest.raises(WeightRouteError, match="/update_weights") as error:
            await client.update(["/a"], version="7")
    assert "still paused" in error.value.__notes__[0]


async def test_no_call_depends_on_the_connection_of_another(recorder: Recorder) -> None:
    """vLLM closes the connection after an error, and what was sent on it meanwhile is lost."""
    async with WeightClient(recorder.url) as client:
        await client.update(["/a"], version="7")
    assert len(set(recorder.client_ports)) == len(UPDATE)


async def test_a_cache_that_was_not_dropped_is_a_failure(recorder: Recorder) -> None:
    recorder.behaviour["/reset_prefix_cache"] = lambda _: web.json_response({"success": False})
    async with WeightClient(recorder.url) as client:
        with pytest.raises(WeightRouteError, match="cache was not dropped"):
            await client.update(["/a"], version="7")
    assert recorder.routes[-1] == "/resume"


async def test_requests_in_flight_keep_their_cache_where_the_scheduler_lets_them(
    recorder: Recorder,
) -> None:
    asked: list[str] = []
    refused: set[str] = set()

    def drop(request: web.Request) -> web.Response:
        asked.append(request.query["reset_running_requests"])
        return web.json_response({"success": asked[-1] not in refused})

    recorder.behaviour["/reset_prefix_cache"] = drop
    async with (
        WeightClient(recorder.url, keep_kv=True) as keeps,
        WeightClient(recorder.url) as drops,
    ):
        await keeps.update(["/a"], version="7")
        refused.add("false")
        await keeps.update(["/a"], version="8")
        await drops.update(["/a"], version="9")
    assert asked == ["false", *("false", "true"), "true"]


async def test_another_weight_transfer_is_refused_before_anything_pauses(
    recorder: Recorder,
) -> None:
    recorder.behaviour["/init_weight_transfer_engine"] = fail(500)
    async with WeightClient(recorder.url) as client:
        with pytest.raises(WeightRouteError):
            await client.update(["/a"], version="7")
    assert recorder.routes == UPDATE[:1]


async def hang(_: web.Request) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_hanging_server_is_an_error_and_is_resumed(recorder: Recorder) -> None:
    recorder.behaviour["/update_weights"] = hang
    async with WeightClient(recorder.url, timeout=0.3) as client:
        with pytest.raises(WeightRouteError, match=r"/update_weights: no answer: none within"):
            await client.update(["/a"], version="7")
    assert recorder.routes[-1] == "/resume"


async def test_a_cancelled_update_resumes_the_server(recorder: Recorder) -> None:
    reached = asyncio.Event()

    async def reach_and_hang(request: web.Request) -> web.Response:
        reached.set()
        return await hang(request)

    recorder.behaviour["/update_weights"] = reach_and_hang
    async with WeightClient(recorder.url) as client:
        update = asyncio.create_task(client.update(["/a"], version="7"))
        await reached.wait()
        update.cancel()
        with pytest.raises(asyncio.CancelledError):
            await update
        assert recorder.routes[-1] == "/resume"


@pytest.mark.parametrize("failing", [False, True])
async def test_who_is_cancelled_while_it_resumes_the_server_resumes_it(
    recorder: Recorder, failing: bool
) -> None:
    reached, going_on, resumed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def resume(_: web.Request) -> web.Response:
        reached.set()
        await going_on.wait()
        resumed.set()
        return web.json_response({})

    recorder.behaviour["/resume"] = resume
    if failing:
        recorder.behaviour["/update_weights"] = fail(500)
    async with WeightClient(recorder.url) as client:
        update = asyncio.create_task(client.update(["/a"], version="7"))
        await reached.wait()
        for _ in range(2):
            update.cancel()
            await asyncio.sleep(0)  # it takes note of it
        going_on.set()
        with pytest.raises(asyncio.CancelledError):
            await update
        assert resumed.is_set()


async def test_a_cancelled_resume_that_fails_is_told(recorder: Recorder) -> None:
    reached, failing = asyncio.Event(), asyncio.Event()

    async def refuse(request: web.Request) -> web.Response:
        reached.set()
        await failing.wait()
        return fail(503)(request)

    recorder.behaviour["/resume"] = refuse
    async with WeightClient(recorder.url) as client:
        update = asyncio.create_task(client.update(["/a"], version="7"))
        await reached.wait()
        update.cancel()
        await asyncio.sleep(0)
        failing.set()
        with pytest.raises(asyncio.CancelledError) as error:
            await update
    assert "still paused" in error.value.__notes__[0]


async def test_a_server_that_is_not_there_is_named() -> None:
    async with WeightClient("http://127.0.0.1:1") as client:
        with pytest.raises(WeightRouteError, match=r"http://127.0.0.1:1/init.*no answer"):
            await client.update(["/a"], version="7")


# Several servers


async def test_all_servers_have_the_weights_before_any_goes_on(recorder: Recorder) -> None:
    seen: list[list[str]] = []

    async def loaded() -> None:
        seen.extend([*one.routes] for one in (recorder, other))

    async with (
        serving() as other,
        WeightPublisher([recorder.url, other.url]) as publisher,
    ):
        await publisher.publish([], [], version="7", loaded=loaded)
        assert seen == [UPDATE[:5]] * 2  # paused, and nothing that could be sampled from
        assert recorder.routes == other.routes == UPDATE


async def test_servers_go_on_whatever_fails_meanwhile(recorder: Recorder) -> None:
    async def loaded() -> None:
        raise RuntimeError("nobody was told")

    async with serving() as other, WeightPublisher([recorder.url, other.url]) as publisher:
        with pytest.raises(RuntimeError, match="nobody was told"):
            await publisher.publish([], [], version="7", loaded=loaded)
        assert recorder.routes == other.routes == UPDATE
        recorder.seen.clear()
        other.behaviour["/update_weights"] = fail(500)
        with pytest.raises(WeightRouteError, match="the reason"):
            await publisher.publish([], [], version="8")
    assert recorder.routes[-1] == other.routes[-1] == "/resume"


# The proof


async def test_verify_returns_the_difference(recorder: Recorder) -> None:
    async with WeightPublisher([recorder.url, recorder.url]) as publisher:
        found = await publisher.verify([4, 5, 6], [-1.0, -1.01], version="1", tolerance=0.1)
        assert found == pytest.approx(0.005)
    async with WeightPublisher([recorder.url, recorder.url]) as publisher:
        # One unlikely token, rounded in bfloat16: no other weights.
        found = await publisher.verify([4, 5, 6], [-1.0, -1.15], version="1", tolerance=0.1)
    assert found == pytest.approx(0.075)


@pytest.mark.parametrize("served", [-1.5, float("nan")])
async def test_verify_refuses_other_logprobs(recorder: Recorder, served: float) -> None:
    recorder.probe_logprob = served
    async with WeightPublisher([recorder.url]) as publisher:
        with pytest.raises(WeightParityError, match="differs by"):
            await publisher.verify([4, 5, 6], [-1.5, -1.0], version="1", tolerance=0.1)


@pytest.mark.parametrize("older", [1, 4])
async def test_verify_refuses_what_earlier_weights_gave(recorder: Recorder, older: int) -> None:
    """Within what rounding may do in bfloat16, so that the tolerance would never tell."""

    def expected(step: int) -> list[float]:
        return [-1.0 - 0.05 * step, -1.0 - 0.05 * step]

    async with WeightPublisher([recorder.url]) as publisher:
        for step in (1, 2, 3, 4):
            recorder.probe_logprob = -1.0 - 0.05 * step + 0.01
            await publisher.verify([4, 5, 6], expected(step), version="1", tolerance=0.3)
            # The same weights once more, and rounded another way.
            recorder.probe_logprob -= 0.02
            await publisher.verify([4, 5, 6], expected(step), version="1", tolerance=0.3)
        recorder.probe_logprob = -1.0 - 0.05 * older + 0.01
        with pytest.raises(WeightParityError, match="from what earlier ones gave"):
            await publisher.verify([4, 5, 6], expected(5), version="1", tolerance=0.3)


async def test_verify_refuses_another_version(recorder: Recorder) -> None:
    async with WeightPublisher([recorder.url]) as publisher:
        with pytest.raises(WeightParityError, match="version '1', not '2'"):
            await publisher.verify([4, 5, 6], [-1.0, -1.0], version="2")


async def test_verify_values_asks_for_each_prefix(recorder: Recorder) -> None:
    async with WeightPublisher([recorder.url]) as publisher:
        found = await publisher.verify_values(
            [4, 5, 6], [4.0, 5.03, 6.0], version="1", tolerance=0.1
        )
    assert found == pytest.approx(0.01)
    assert recorder.seen["/pooling"] == {
        "model": "policy",
        "input": [[4], [4, 5], [4, 5, 6]],
        "use_activation": False,
    }


async def test_verify_values_refuses_other_values(recorder: Recorder) -> None:
    expected = [4.0, 5.0, 6.0]
    async with WeightPublisher([recorder.url]) as publisher:
        await publisher.verify_values([4, 5, 6], expected, version="1")
        with pytest.raises(WeightParityError, match="version '1', not '2'"):
            await publisher.verify_values([4, 5, 6], expected, version="2")
        with pytest.raises(WeightParityError, match="a value of the probe differs by"):
            await publisher.verify_values([4, 5, 6], [4.0, 5.1, 6.0], version="1")
        recorder.pooled = lambda prefix: None if len(prefix) == 2 else float(prefix[-1])
        with pytest.raises(WeightParityError, match="differs by"):
            await publisher.verify_values([4, 5, 6], expected, version="1")


async def test_all_servers_get_the_weights_and_are_checked(recorder: Recorder) -> None:
    model = random_model(3)
    async with serving() as other, WeightPublisher([recorder.url, other.url]) as publisher:
        await publisher.publish(tensor_specs(model), gathered(model), version="1")
        assert recorder.routes == other.routes == UPDATE
        await publisher.verify([4, 5, 6], [-1.0, -1.0], version="1")
        for spoil in (
            lambda: setattr(other, "version", "0"),
            lambda: setattr(other, "probe_logprob", -2.0),
        ):
            spoil()
            with pytest.raises(WeightParityError, match=other.url):
                await publisher.verify([4, 5, 6], [-1.0, -1.0], version="1")
            other.version = "1"


async def test_a_server_that_fails_is_named_and_the_others_get_the_weights(
    recorder: Recorder,
) -> None:
    model = random_model(3)
    async with serving() as bad, WeightPublisher([bad.url, recorder.url]) as publisher:
        bad.behaviour["/update_weights"] = fail(500)
        with pytest.raises(WeightRouteError, match="the reason") as error:
            await publisher.publish(tensor_specs(model), gathered(model), version="1")
    assert error.value.url == bad.url
    assert recorder.routes == UPDATE


async def test_a_server_on_another_machine_reads_a_file(recorder: Recorder, tmp_path: Path) -> None:
    model = random_model(3)
    path = tmp_path / "weights.safetensors"
    async with WeightPublisher([recorder.url], transfer=FileTransfer(path)) as publisher:
        await publisher.publish(tensor_specs(model), gathered(model), version="1")
    assert recorder.seen["/update_weights"] == {"update_info": {"paths": [str(path)]}}
    assert torch.equal(load_file(path)["model.norm.weight"], model.model.norm.weight)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("named", [True, False])
async def test_a_full_disk_is_named_with_the_fix(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weight_files, "write_safetensors", full)
    path, model = tmp_path / "weights", random_model(3)
    transfer = FileTransfer(path if named else None)
    async with WeightPublisher([recorder.url], transfer=transfer) as publisher:
        where = f"to {path}: free space" if named else "to shared memory: free some"
        with pytest.raises(WeightSyncError, match=f"No space left on device.* {where}"):
            await publisher.publish(tensor_specs(model), gathered(model), version="1")
    assert recorder.routes == []
    assert os.listdir(tmp_path) == []


def test_probe_tells_policies_apart() -> None:
    """Else the parity tests with a real server could not fail."""
    one, other = (logprobs(random_model(seed), PROBE) for seed in (0, 1))
    assert fmean(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.5


def test_probe_tells_critics_apart() -> None:
    one, other = (values(random_critic(seed), PROBE) for seed in (0, 1))
    assert fmean(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.5


# Where weights were lost


async def test_what_is_not_proven_is_explained(recorder: Recorder) -> None:
    model = random_model(3)
    parameters = dict(model.named_parameters())
    held = {f"dp0:pp0:pcp0:tp0:{name}": digest(one) for name, one in parameters.items()}
    packed = held | {"dp0:pp0:pcp0:tp0:model.layers.0.self_attn.qkv_proj.weight": "another"}
    async with WeightPublisher([recorder.url]) as publisher:
        await publisher.publish(tensor_specs(model), gathered(model), version="1")
        recorder.checksums = packed
        whole = f"loaded ({len(parameters)} of {len(parameters)} compared)"
        used = await publisher.explain(gathered(model))
        assert used == f"{recorder.url}: {whole} but not used"
        recorder.checksums = packed | {"dp0:pp0:pcp0:tp0:model.norm.weight": "padded"}
        said = await publisher.explain(gathered(model))
        assert f"loaded ({len(parameters) - 1} of {len(parameters)} compared)" in said
        recorder.checksums = dict.fromkeys(held, "old")
        assert "not loaded: none of model.embed_tokens.weight, " in await publisher.explain(
            gathered(model)
        )
        recorder.checksums = {"model.qkv": "1"}
        assert "none of its parameters" in await publisher.explain(gathered(model))
        with torch.no_grad():
            model.model.norm.weight += 1.0
        assert (await publisher.explain(gathered(model))).startswith("not sent: model.norm.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fingerprints_tell_tensors_apart(dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 3).to(dtype)
    assert fingerprint(tensor) == fingerprint(tensor.clone()) == fingerprint(tensor.T.clone().T)
    other = tensor.clone()
    other[2, 1] += 1.0
    assert fingerprint(other) != fingerprint(tensor)
    assert digest(other) != digest(tensor) == digest(tensor.T.clone().T)


HERE, AWAY = "http://127.0.0.1:8000", "http://10.0.0.1:8000"


@pytest.mark.parametrize(
    ("settings", "backend"),
    [
        ({}, "espo"),
        ({"weight_transfer": "shared-memory"}, "espo"),
        ({"weights_path": "/disk/weights"}, "espo"),
        ({"weight_transfer": "ipc"}, "ipc"),
        ({"weight_transfer": "nccl"}, "nccl"),
    ],
)
def test_the_recipe_chooses_the_way(settings: dict[str, object], backend: str) -> None:
    for url in (HERE, AWAY):  # no GPU here
        assert transfer_of(Servers.model_validate(settings), [url]).backend == backend


def test_servers_on_other_hosts_get_them_by_nccl_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # A critic may be elsewhere than the policy: what counts is where these weights go.
    config = Servers(policy_urls=[AWAY], critic_url=HERE)
    assert transfer_of(config, [AWAY]).backend == "nccl"
    assert transfer_of(config, [HERE]).backend == "espo"
