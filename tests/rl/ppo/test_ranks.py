"""Two processes train as one does, and end when one of them is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from espo_gateway.supervisor import free_port
from espo_rl.ppo.trainer import ModelName, PpoTrainer
from tests.helpers import ranks_job
from tests.helpers.models import headed, random_model
from tests.helpers.trainer import Paths, assert_same_update, make_rollouts, trainer

ROOT = Path(__file__).parents[3]


# -- the commands alone ----------------------------------------------------------------------------

SMALL = """
import sys, threading, torch
from torch import distributed
from espo_rl.ppo.ranks import Ranks, collective, follow

class Target:
    def __init__(self):
        self.ranks, self.total = Ranks(), 0

    @collective
    def add(self, one, *, times=1):
        self.total += one * times
        return self.ranks.gather((self.ranks.rank, self.total))

    @collective
    @torch.no_grad()
    def learns(self):
        return self.ranks.gather(torch.is_grad_enabled())

    @collective
    def fail(self, rank):
        if self.ranks.rank == rank:
            raise ValueError(f"rank {rank} fails")
        return self.ranks.gather(0)

distributed.init_process_group("gloo")
target = Target()
if target.ranks.rank:
    follow(target)
    print("followed to", target.total)
else:
    exec(sys.argv[1])
"""


def two_ranks(code: str) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of rank 0, which runs `code`, and of rank 1, which follows."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SMALL, code],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=120) for process in processes]
        return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_calls_of_rank_0_are_made_on_all_ranks() -> None:
    leader, follower = two_ranks(
        "assert target.add(3) == [(0, 3), (1, 3)]\n"
        "assert target.add(2, times=5) == [(0, 13), (1, 13)]\n"
        "threads = [threading.Thread(target=target.add, args=(1,)) for _ in range(20)]\n"
        "[thread.start() for thread in threads], [thread.join() for thread in threads]\n"
        "assert target.learns() == [False, False]\n"
        "target.ranks.stop()\n"
    )
    assert leader[0] == 0, leader[2]
    assert follower[:2] == (0, "followed to 33\n"), follower[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "leader_ends", "leader_says", "message"),
    [
        # Rank 0 is gone without a word, between calls.
        ("target.add(3); import os; os._exit(3)", 3, "", "rank 0 is gone"),
        # It fails within a call that rank 1 is waiting in, and cannot end it in order.
        (
            "try: target.fail(0)\n"
            "except ValueError: target.ranks.stop()\n"
            "try: target.add(1)\n"
            "except RuntimeError as error: print(error, flush=True)\n"
            "sys.exit(4)",
            4,
            "out of step",
            "in gather",
        ),
        # Rank 1 fails: rank 0 must not wait for it.
        ("target.fail(1)", 1, "", "rank 1 fails"),
    ],
)
def test_nobody_waits_for_the_dead(
    code: str, leader_ends: int, leader_says: str, message: str
) -> None:
    leader, follower = two_ranks(code)
    # Gloo may abort a process that ends when its peer has gone; by then the reason is told.
    aborts = {-signal.SIGABRT} if leader_ends != 3 else set()  # os._exit asks nobody
    assert leader[0] in {leader_ends} | aborts, leader[2]
    assert leader_says in leader[1]
    assert follower[0] in (1, -signal.SIGABRT), follower[2]
    assert "followed" not in follower[1]
    assert message in follower[2]


# -- the trainer -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def headed_paths(paths: Paths) -> Paths:
    """With a head of V that is read off the actor, beside a critic that is trained."""
    head = paths.actor.parent / "head"
    headed(random_model(0)).save_pretrained(head)
    return replace(paths, head=head)


@pytest.fixture(scope="module")
def alone(headed_paths: Paths) -> dict[str, Any]:
    """What one process sees of the same updates, without ZeRO and with other micro-batches."""
    paths = headed_paths
    ours = trainer(paths, **{**ranks_job.SETTINGS, "micro_batch_tokens": 60})
    return ranks_job.two_updates(ours, paths.actor.parent / "alone")


def said_by(paths: Paths, weights: dict[str, torch.Tensor]) -> PpoTrainer:
    """A trainer alone, with these weights."""
    ours = trainer(paths, **ranks_job.SETTINGS)
    names: tuple[ModelName, ...] = ("actor", "critic")
    for name in names:
        own = dict(ours.module(name).named_parameters())
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(weights[f"{name}.{key}"])
    return ours


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_train_as_one(headed_paths: Paths, alone: dict[str, Any], stage: int) -> None:
    paths = headed_paths
    folder = paths.actor.parent
    out = folder / f"zero-{stage}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    port = ["--master-port", str(free_port())]
    job = subprocess.run(
        [*torchrun, *port, ranks_job.__file__, str(stage), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert job.returncode == 0, job.stderr
    seen = torch.load(folder / f"zero-{stage}.pt")

    assert_same_update(seen["weights"], alone["weights"])
    for found, expected in zip(seen["metrics"], alone["metrics"], strict=True):
        assert found == pytest.approx(expected, rel=1e-2, abs=1e-4)
    # What the ranks say is what one process says of the same weights: those of two runs may differ
    # in a few, which move logprobs by more than any error in saying them.
    said = said_by(paths, seen["weights"])
    assert seen["logprobs"] == pytest.approx(said.prompt_logprobs(ranks_job.PROBE), abs=1e-4)
    assert seen["values"] == pytest.approx(said.values(ranks_job.PROBE), abs=1e-4)
    expected_values = said.critic_values(make_rollouts())
    for found, expected in zip(seen["critic_values"], expected_values, strict=True):
        assert found == pytest.approx(expected.tolist(), abs=1e-4)

    for name, value in seen["weights"].items():
        torch.testing.assert_close(seen["again"][name], value, atol=1e-6, rtol=0, msg=name)

    for model in ("actor", "critic"):
        saved = load_file(out / "models" / model / "model.safetensors")
        assert saved
        for name, value in saved.items():
            assert torch.equal(value, seen["weights"][f"{model}.{name}"]), name
