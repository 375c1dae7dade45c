"""`python -m espo_rl.run` from outside: what it refuses, and a real run that is stopped twice.

The real one costs three starts of a server: interrupted after a step, killed after another, ended.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import uuid
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from models import logprobs, random_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from espo_gateway.supervisor import ServerProcess, free_port
from espo_gateway.testing import FakeServer, Script
from espo_rl import run
from espo_rl.checkpoints import CheckpointStore
from espo_rl.servers import ServerError, served_model
from espo_rl.tasks import Arithmetic

# -- refused before any work -----------------------------------------------------------------------


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(ServerProcess, "start", refuse)
    # Nor is anything asked of a network that may not be there.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> str:
    """What a run says that must end with code 2."""
    monkeypatch.setattr(sys, "argv", ["espo_rl.run", *arguments])
    capsys.readouterr()  # what making the checkpoint said
    assert run.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("espo: ")
    assert "Traceback" not in said
    return said


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    """Arguments of a run that would start."""
    return [
        "arithmetic",
        f"model.path={random_checkpoint(tmp_path / 'base', 0)}",
        f"run.output={tmp_path / 'out'}",
    ]


@pytest.mark.usefixtures("nothing_starts")
class TestRefused:
    def test_an_unknown_key(self, monkeypatch: Any, capsys: Any, recipe: list[str]) -> None:
        said = refused(monkeypatch, capsys, *recipe, "rollout.prompts=3")
        assert "rollout.prompts: no such key" in said
        assert "prompts_per_step" in said

    @pytest.mark.parametrize("key", ["model.path", "model.critic"])
    def test_a_missing_model(
        self, monkeypatch: Any, capsys: Any, recipe: list[str], tmp_path: Path, key: str
    ) -> None:
        said = refused(monkeypatch, capsys, *recipe, f"{key}={tmp_path / 'nothing'}")
        assert f"{key}: no folder {tmp_path / 'nothing'}" in said
        assert "espo_rl.base_model" in said

    def test_a_missing_model_in_a_folder_here(
        self, monkeypatch: Any, capsys: Any, recipe: list[str], tmp_path: Path
    ) -> None:
        """`runs/base` looks like a name on the hub; with a folder `runs` here it is none."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        said = refused(monkeypatch, capsys, *recipe, "model.path=runs/base")
        assert "model.path: no folder runs/base" in said

    def test_a_folder_that_is_no_model(
        self, monkeypatch: Any, capsys: Any, recipe: list[str], tmp_path: Path
    ) -> None:
        said = refused(monkeypatch, capsys, *recipe, f"model.path={tmp_path}")
        assert "model.path" in said

    def test_an_output_that_cannot_be_written(
        self, monkeypatch: Any, capsys: Any, recipe: list[str], tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        said = refused(monkeypatch, capsys, *recipe, f"run.output={tmp_path / 'file' / 'out'}")
        assert "run.output" in said
        assert "choose another folder" in said

    @pytest.mark.parametrize("missing", ["train", "eval"])
    def test_a_missing_task_file(
        self, monkeypatch: Any, capsys: Any, recipe: list[str], tmp_path: Path, missing: str
    ) -> None:
        files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "eval")}
        for name, path in files.items():
            if name != missing:
                path.write_text('{"problem": "1", "answer": "1"}\n')
        overrides = [f"task.{name}={path}" for name, path in files.items()]
        said = refused(monkeypatch, capsys, *recipe, "task.kind=jsonl", *overrides)
        assert str(files[missing]) in said
        assert "No such file" in said

    def test_too_few_problems_to_hold_any_out(
        self, monkeypatch: Any, capsys: Any, recipe: list[str], tmp_path: Path
    ) -> None:
        (tmp_path / "train.jsonl").write_text('{"problem": "1", "answer": "1"}\n' * 9)
        overrides = ["task.kind=jsonl", f"task.train={tmp_path / 'train.jsonl'}"]
        assert "task.eval" in refused(monkeypatch, capsys, *recipe, *overrides)

    def test_a_missing_recipe(self, monkeypatch: Any, capsys: Any) -> None:
        assert "arithmetic" in refused(monkeypatch, capsys, "no-such-recipe")


async def test_a_policy_server_that_is_not_there_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerError, match=url):
        await served_model(url)


async def test_the_served_models_name_is_asked_for() -> None:
    async with FakeServer(Script([])) as server:
        assert await served_model(server.url) == "fake"


# -- a real run ------------------------------------------------------------------------------------

STEPS = 3
SEED = 11
LOG_ROW = ("step", "accuracy", "stop_share", "tokens", "entropy", "kl", "parity", "grad_norm")
SUMMARY_KEYS = (
    "accuracy_before",
    "accuracy_after",
    "tokens_generated",
    "tokens_without_stopping",
    "stop_rate",
    "false_positive_rate",
    "explained_variance",
    "seconds",
    "versions",
    "seed",
)


@dataclass(frozen=True)
class Ended:
    """A run that has ended: exit code, what it said, which of its processes still live then."""

    code: int
    said: str
    left: list[psutil.Process]
    family: int  # processes that it had while it ran
    output: Path
    checkpoint: str | None  # newest, at its end

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(row) for row in (self.output / "metrics.jsonl").read_text().splitlines()]


class Run:
    """A run as a child process, in an environment that marks whatever it starts."""

    def __init__(self, base: Path, output: Path, *options: str) -> None:
        self.output = output
        self.mark = uuid.uuid4().hex
        # What DeepSpeed in this process's other tests has set is not for the child.
        ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        environment = {name: value for name, value in os.environ.items() if name not in ranks}
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "espo_rl.run", "arithmetic"),
                *(f"model.path={base}", f"run.output={output}"),
                *(f"run.steps={STEPS}", f"run.seed={SEED}"),
                *("rollout.prompts_per_step=2", "rollout.n=2", "rollout.max_tokens=24"),
                *("stopping.warmup_batches=1", "stopping.rule=regret-only"),
                "stopping.threshold=share",
                *("checkpoints.every=1", "evaluation.problems=4", "ppo.learning_rate=1e-3"),
                # A random policy is always wrong, so no advantage moves it; the bonus does.
                "ppo.entropy_bonus=0.1",
                *options,
            ],
            env={**environment, "ESPO_TEST_RUN": self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said: list[str] = []
        self.family: set[psutil.Process] = set()

    def until(self, beginning: str) -> None:
        """Read on until a line begins so; take down what processes there are then."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith(beginning):
                self.family.update(psutil.Process(self.process.pid).children(recursive=True))
                return
        raise AssertionError(f"the run ended before {beginning!r}:\n{''.join(self.said)}")

    def end(self, *, patience: float = 0.0) -> Ended:
        """Read to its end. What is still there `patience` seconds after it counts as left."""
        self.said.append(self.process.communicate()[0])
        marked = [process for process in psutil.process_iter() if self._is_marked(process)]
        left = psutil.wait_procs({*self.family, *marked}, timeout=patience)[1]
        newest = CheckpointStore(self.output / "checkpoints").newest()
        return Ended(
            code=self.process.returncode,
            said="".join(self.said),
            left=left,
            family=len(self.family),
            output=self.output,
            checkpoint=newest and newest.name,
        )

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("ESPO_TEST_RUN") == self.mark
        except psutil.Error:
            return False


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("run") / "base", 0)


@pytest.fixture(scope="module")
def interrupted(base: Path) -> Ended:
    """Ctrl-C after the first step."""
    started = Run(base, base.parent / "out")
    started.until(f"step 1/{STEPS}")
    started.process.send_signal(signal.SIGINT)
    return started.end()


@pytest.fixture(scope="module")
def killed(base: Path, interrupted: Ended) -> Ended:
    """Resumed, and killed after the second step, perhaps while it writes the checkpoint."""
    assert interrupted.checkpoint == "step-00000001"
    started = Run(base, interrupted.output, "--resume", "auto")
    started.until(f"step 2/{STEPS}")
    started.process.kill()
    return started.end(patience=60.0)


@pytest.fixture(scope="module")
def finished(base: Path, killed: Ended) -> Ended:
    """Resumed, to the end; the kill has left half a row in the log."""
    with (killed.output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rule": "regr')
    started = Run(base, killed.output, "--resume", "auto")
    started.until(f"step {STEPS}/{STEPS}")
    return started.end()


def last_state(ended: Ended) -> dict[str, Any]:
    """The loop's state in the newest checkpoint."""
    assert ended.checkpoint is not None
    path = ended.output / "checkpoints" / ended.checkpoint / "loop.pkl"
    return pickle.loads(path.read_bytes())


real = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


class TestRealRun:
    pytestmark = real

    def test_ctrl_c_leaves_nothing_but_a_checkpoint(self, interrupted: Ended) -> None:
        assert interrupted.code == 130
        assert interrupted.said.splitlines()[-1] == (
            "espo: interrupted; go on with --resume auto"
        ), interrupted.said
        assert "Traceback" not in interrupted.said
        assert interrupted.family >= 4  # two guards, a gateway and vLLM's processes
        assert interrupted.left == []

    def test_a_kill_takes_the_servers_along(self, killed: Ended) -> None:
        assert killed.code == -signal.SIGKILL
        assert killed.family >= 4
        assert killed.left == []

    def test_a_finished_run_leaves_no_process(self, finished: Ended) -> None:
        assert finished.code == 0, finished.said
        assert finished.family >= 4
        assert finished.left == []

    def test_resuming_goes_on_after_the_newest_checkpoint(
        self, interrupted: Ended, killed: Ended, finished: Ended
    ) -> None:
        for before, after in ((interrupted, killed), (killed, finished)):
            assert before.checkpoint is not None
            step = int(before.checkpoint.removeprefix("step-"))
            assert f"{before.checkpoint} after step {step}\n" in after.said
            trained = [line for line in after.said.splitlines() if line.startswith("step ")]
            assert trained[0].startswith(f"step {step + 1}/")
        assert killed.checkpoint in ("step-00000001", "step-00000002")
        assert finished.checkpoint == f"step-{STEPS:08d}"

    def test_every_step_is_logged_once(self, finished: Ended) -> None:
        assert [row["step"] for row in finished.rows] == [1, 2, 3]
        assert [row["gate_version"] for row in finished.rows] == [0, 1, 2]
        assert [row["rule"] for row in finished.rows] == ["none", *["regret-only"] * 2]
        for row in finished.rows:
            assert all(math.isfinite(row[key]) for key in LOG_ROW)
            assert row["errors"] == 0

    def test_no_problem_is_drawn_twice(self, finished: Ended) -> None:
        state = last_state(finished)
        batches = state["stopping"]._recent
        drawn = [rollout.problem.id for batch in batches for rollout in batch]
        expected = [problem.id for problem in islice(Arithmetic().training(SEED), 2 * STEPS)]
        assert drawn == [id for id in expected for _ in range(2)]
        assert (state["step"], state["drawn"]) == (STEPS, 2 * STEPS)

    def test_the_server_samples_from_the_resumed_weights(self, base: Path, finished: Ended) -> None:
        """Steps 2 and 3 are the first after a start, when the server holds the base model."""
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        for step, batch in enumerate(last_state(finished)["stopping"]._recent):
            assert {rollout.weights_version for rollout in batch} == {f"step-{step}"}
            differences = [
                np.abs(
                    np.array(logprobs(model, rollout.prompt_ids + rollout.token_ids))[
                        len(rollout.prompt_ids) - 1 :
                    ]
                    - rollout.logprobs
                ).max()
                for rollout in batch
            ]
            if step == 0:
                assert max(differences) < 1e-3
            else:
                assert min(differences) > 0.05
        # ... but from what the trainer held then, which is proven after each sync as well.
        for row in finished.rows:
            assert row["mismatch_max"] < 1e-3
            assert row["parity"] < 1e-3

    def test_the_summary_holds_what_the_readme_promises(self, finished: Ended) -> None:
        summary = json.loads((finished.output / "summary.json").read_text())
        assert set(SUMMARY_KEYS) <= set(summary)
        assert 0.0 <= summary["accuracy_before"] <= 1.0
        assert 0.0 <= summary["accuracy_after"] <= 1.0
        # Of all steps, those before the kill included.
        assert summary["tokens_generated"] == sum(row["tokens"] for row in finished.rows) > 0
        assert summary["errors"] == 0
        assert summary["seed"] == SEED
        assert {"start", "rollout", "update", "sync"} <= set(summary["seconds"])
        assert {"torch", "transformers", "deepspeed"} <= set(summary["versions"])
        assert "tokens generated" in finished.said

    def test_the_trained_models_load_in_transformers(self, base: Path, finished: Ended) -> None:
        actor = AutoModelForCausalLM.from_pretrained(finished.output / "actor")
        critic = AutoModelForSequenceClassification.from_pretrained(finished.output / "critic")
        tokenizer = AutoTokenizer.from_pretrained(finished.output / "actor")
        assert tokenizer.decode(tokenizer.encode("358c")) == "358c"
        untrained = AutoModelForCausalLM.from_pretrained(base)
        ids = [2, *tokenizer.encode("358c"), 3]
        assert logprobs(actor.eval(), ids) != pytest.approx(
            logprobs(untrained.eval(), ids), abs=0.05
        )
        assert critic.score.weight.abs().max() > 0  # it began as zeros

    def test_the_folder_tells_the_rest(self, finished: Ended) -> None:
        names = {path.name for path in finished.output.iterdir()}
        assert {"recipe.json", "tensorboard", "logs", "checkpoints"} <= names
        kept = sorted(path.name for path in (finished.output / "checkpoints").iterdir())
        assert kept == ["step-00000002", "step-00000003"]
