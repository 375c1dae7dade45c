"""However a run goes (killed, its servers killed, on two ranks), it comes to the same policy.

The policy server is the suite's own, given by URL, so a run starts in seconds; it keeps the weights
that a killed run left in it, and a resumed run must replace them. The proof is the end: a run that
skipped a step, trained one twice or sampled from other weights ends with another policy.
"""

from __future__ import annotations

import signal
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from espo_rl.tasks.arithmetic import Arithmetic
from tests.helpers.run import SEED, STEPS, Ended, Run, dumped
from tests.helpers.vllm import VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


def assert_same_policy(one: Path, other: Path) -> None:
    ours, theirs = (load_file(path / "actor" / "model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-4, rtol=1e-3)


def assert_whole(ended: Ended) -> None:
    assert ended.code == 0, ended.said
    assert [row["step"] for row in ended.rows] == list(range(1, STEPS + 1))
    assert all(row["sync/parity"] < 1e-3 for row in ended.rows)


@pytest.fixture(scope="module")
def undisturbed(vllm_server: VllmServer, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    output = tmp_path_factory.mktemp("undisturbed")
    ended = Run(vllm_server.path, output, f'servers.policy_urls=["{vllm_server.url}"]').end()
    assert_whole(ended)
    return ended


@pytest.mark.parametrize("place", ["rollout", "update", "sync", "save"])
async def test_a_killed_run_comes_to_what_it_would_have_come_to(
    place: str, undisturbed: Ended, vllm_server: VllmServer, tmp_path: Path
) -> None:
    url = f'servers.policy_urls=["{vllm_server.url}"]'
    run = Run(vllm_server.path, tmp_path, url, halt=f"{place}:2")
    run.until("HALTED")
    run.process.kill()
    killed = run.end(patience=60.0)
    assert killed.left == []
    assert killed.checkpoint == "step-00000001"

    ended = Run(vllm_server.path, tmp_path, url, "--resume", "auto").end()
    assert "after step 1\n" in ended.said
    assert_whole(ended)
    assert ended.left == []
    assert_same_policy(ended.output, undisturbed.output)
    # Of what the kill left half written nothing stays.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]


async def test_a_run_outlives_its_servers(
    undisturbed: Ended, vllm_server: VllmServer, tmp_path: Path
) -> None:
    """In the middle of a step vLLM's engine and the gateway are killed; both are started anew."""
    run = Run(vllm_server.path, tmp_path, halt="rollout:2")
    run.until("HALTED")
    family = psutil.Process(run.process.pid).children(recursive=True)
    engines = [one for one in family if "EngineCore" in one.name() or "EngineCore" in title(one)]
    gateways = [one for one in family if one.cmdline()[1:3] == ["-m", "espo_gateway"]]
    assert engines
    assert gateways
    for process in [*engines, *gateways]:
        process.kill()
    run.go_on()
    ended = run.end(patience=60.0)
    assert_whole(ended)
    assert ended.left == []
    for name in ("policy server", "gateway"):
        assert f"restarting the {name}" in ended.said
    assert_same_policy(ended.output, undisturbed.output)


def title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


async def test_two_ranks_come_to_what_one_does(
    undisturbed: Ended, vllm_server: VllmServer, tmp_path: Path
) -> None:
    url = f'servers.policy_urls=["{vllm_server.url}"]'
    ended = Run(vllm_server.path, tmp_path, url, "deepspeed.zero_stage=3", ranks=2).end()
    assert_whole(ended)
    assert ended.left == []
    assert ended.said.count("step 1/3") == 1
    assert_same_policy(ended.output, undisturbed.output)


async def test_a_step_ahead_is_one_update_old_and_survives_an_interruption(
    vllm_server: VllmServer, tmp_path: Path
) -> None:
    """While the second update is made, the third batch is sampled; it must not be lost."""
    options = [f'servers.policy_urls=["{vllm_server.url}"]', "rollout.max_staleness=1"]
    run = Run(vllm_server.path, tmp_path, *options, halt="update:2")
    run.until("HALTED")
    run.process.send_signal(signal.SIGINT)
    run.until("finishing this step")
    run.go_on()
    interrupted = run.end()
    assert (interrupted.code, interrupted.checkpoint) == (130, "step-00000002")

    ended = Run(vllm_server.path, tmp_path, *options, "--resume", "auto").end()
    assert_whole(ended)
    staleness = [row["rollout/staleness"] for row in ended.rows]
    assert staleness[:2] == [0.0, 1.0]
    assert 0.0 <= staleness[2] <= 1.0  # what was not there yet was asked of the newer weights
    drawn = [rollout.problem.id for batch in dumped(ended) for rollout in batch]
    expected = [problem.id for problem in islice(Arithmetic().training(SEED), 2 * STEPS)]
    assert drawn == [id for id in expected for _ in range(2)]


REFILL = (
    "rollout.schedule=refill",
    "rollout.max_tokens=96",
    # More than a batch, and less than two.
    "rollout.concurrency=6",
)


def assert_nothing_lost(ended: Ended, ahead: int = 1) -> None:
    """Every step has its own prompts, in the order of drawing, each with all its rollouts."""
    assert_whole(ended)
    steps = dumped(ended)
    drawn = [rollout.problem.id for batch in steps for rollout in batch]
    expected = [problem.id for problem in islice(Arithmetic().training(SEED), 2 * STEPS)]
    assert drawn == [id for id in expected for _ in range(2)]
    for step, batch in enumerate(steps):
        assert [rollout.error for rollout in batch] == [""] * 4
        assert len({rollout.gate_version for rollout in batch}) == 1
        for rollout in batch:
            versions = [int(one.removeprefix("step-")) for one in rollout.token_versions]
            assert versions == sorted(versions)
            assert step - ahead <= versions[0] <= versions[-1] <= step


# The third step's first rollout comes while the second is not done.
@pytest.mark.parametrize("place", ["rollout:3", "update:2", "sync:2", "save:2"])
async def test_a_kill_loses_nothing_of_what_is_under_way(
    place: str, vllm_server: VllmServer, tmp_path: Path
) -> None:
    options = [f'servers.policy_urls=["{vllm_server.url}"]', *REFILL]
    run = Run(vllm_server.path, tmp_path, *options, halt=place)
    run.until("HALTED")
    run.process.kill()
    killed = run.end(patience=60.0)
    assert killed.left == []
    assert killed.checkpoint == "step-00000001" or place == "rollout:3"
    assert killed.checkpoint

    ended = Run(vllm_server.path, tmp_path, *options, "--resume", "auto").end()
    assert f"{killed.checkpoint} after step " in ended.said
    assert_nothing_lost(ended)
    assert ended.left == []


async def test_what_was_under_way_when_the_servers_fell_is_asked_again(
    vllm_server: VllmServer, tmp_path: Path
) -> None:
    run = Run(vllm_server.path, tmp_path, *REFILL, halt="rollout:2")
    run.until("HALTED")
    family = psutil.Process(run.process.pid).children(recursive=True)
    for process in family:
        if "EngineCore" in title(process) or process.cmdline()[1:3] == ["-m", "espo_gateway"]:
            process.kill()
    run.go_on()
    ended = run.end(patience=60.0)
    assert_nothing_lost(ended)
    assert ended.left == []
    for name in ("policy server", "gateway"):
        assert f"restarting the {name}" in ended.said


@pytest.mark.parametrize(
    ("threshold", "reason"),
    [
        (("threshold=fixed", "warmup=none", "beta=0.5"), "β = 0.5: as given"),
        (("threshold=share", "target_share=0.5"), "would have stopped 50% of 4 full rollouts"),
    ],
    ids=["fixed", "share"],
)
async def test_a_run_whose_gate_asks_a_critic_server(
    vllm_server: VllmServer, tmp_path: Path, threshold: tuple[str, ...], reason: str
) -> None:
    """Critic and policy are synced alike; here ε is so low that V decides every stop."""
    run = Run(
        vllm_server.path,
        tmp_path,
        f'servers.policy_urls=["{vllm_server.url}"]',
        *("stopping.rule=value-gated", "stopping.value=critic", "stopping.epsilon=0.01"),
        *("ppo.critic_learning_rate=1e-2", "stopping.audit_share=0"),
        *(f"stopping.{setting}" for setting in threshold),
    )
    ended = run.end()
    assert_whole(ended)
    assert ended.left == []
    rollouts = [rollout for batch in dumped(ended) for rollout in batch]
    assert any(rollout.stopped for rollout in rollouts)
    assert any(reason in row["stopping/reason"] for row in ended.rows)


async def test_a_run_asks_the_policy_along_its_rollouts(
    vllm_server: VllmServer, tmp_path: Path
) -> None:
    settings = [
        f'servers.policy_urls=["{vllm_server.url}"]',
        *("stopping.rule=success-probability", "stopping.threshold=audit"),
        *('stopping.sources=["probe", "history"]', "stopping.ask_every=8"),
        "ppo.baseline=probe",
    ]
    ended = Run(vllm_server.path, tmp_path, *settings).end()
    assert_whole(ended)
    rollouts = [rollout for step in dumped(ended) for rollout in step]
    for rollout in rollouts:
        # At the last token of a completed one nothing is left to decide.
        asked = [token for token, *_ in rollout.probes]
        assert asked == [8, 16, 24][: len(asked)]
        assert len(asked) >= (len(rollout.token_ids) - 1) // 8
        assert rollout.history is not None
    assert any(rollout.probes for rollout in rollouts)
