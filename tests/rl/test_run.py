"""`python -m espo_rl.run` from outside: what it refuses, and a real run that is stopped twice.

The real one costs three starts of a server: interrupted after a step, killed after another, ended.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from espo_gateway.supervisor import ServerProcess, free_port
from espo_gateway.testing import FakeServer, Script
from espo_rl import run
from espo_rl.checkpoints import CheckpointStore
from espo_rl.config import load_recipe
from espo_rl.record.metrics import undocumented
from espo_rl.servers.fleet import served_model
from espo_rl.servers.server import ServerError
from espo_rl.tasks.arithmetic import Arithmetic
from tests.helpers.models import logprobs, random_checkpoint
from tests.helpers.run import SEED, STEPS, Ended, Run, dumped

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

    @pytest.mark.parametrize(
        ("override", "how"),
        [
            ("model.path=runs/base", "espo_rl.base_model --out runs/base;"),
            ("model.path=runs/base-mixed", "--out runs/base-mixed --min-steps 1;"),
            ("model.path=runs/real/base", "scripts/worked_examples.py"),
            ("model.critic=runs/critic", "espo_rl.pretrain_critic ROLLOUTS"),
            ("model.path=runs/mine", "give a Hugging Face checkpoint's folder"),
            ("model.path=here/mine", "give a Hugging Face checkpoint's folder"),
        ],
    )
    def test_a_missing_model_that_looks_like_one_on_the_hub(
        self,
        monkeypatch: Any,
        capsys: Any,
        recipe: list[str],
        tmp_path: Path,
        override: str,
        how: str,
    ) -> None:
        """In a fresh clone; it is said how it is made, where a recipe that ships says it."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here").mkdir()
        said = refused(monkeypatch, capsys, *recipe, override)
        assert "{}: no folder {}".format(*override.split("=")) in said
        assert how in said

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
        said = refused(monkeypatch, capsys, *recipe, "task.kind=dataset", *overrides)
        assert str(files[missing]) in said
        assert "No such file" in said

    def test_too_few_problems_to_hold_any_out(
        self, monkeypatch: Any, capsys: Any, recipe: list[str], tmp_path: Path
    ) -> None:
        (tmp_path / "train.jsonl").write_text('{"problem": "1", "answer": "1"}\n' * 9)
        overrides = ["task.kind=dataset", f"task.train={tmp_path / 'train.jsonl'}"]
        assert "task.eval" in refused(monkeypatch, capsys, *recipe, *overrides)

    @pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
    def test_an_output_in_use(
        self,
        monkeypatch: Any,
        capsys: Any,
        recipe: list[str],
        tmp_path: Path,
        arguments: list[str],
    ) -> None:
        """Whatever else is asked for; and no model is loaded for it."""
        monkeypatch.setattr("espo_rl.train.Loop", None)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "recipe.json").write_text("{}")
        monkeypatch.setattr(sys, "argv", ["espo_rl.run", *recipe, *arguments])
        capsys.readouterr()
        assert run.main() == 2
        said = "".join(capsys.readouterr())
        assert "run.output" in said
        assert "--resume auto goes on with the run there, --overwrite deletes it" in said

    def test_a_changed_setting(
        self, monkeypatch: Any, capsys: Any, recipe: list[str], tmp_path: Path
    ) -> None:
        monkeypatch.setattr("espo_rl.train.Loop", None)
        before = load_recipe(recipe[0], [*recipe[1:], "run.seed=1"])
        store = CheckpointStore(tmp_path / "out" / "checkpoints")
        store.save(1, {"recipe": before}, lambda folder: None)
        said = refused(monkeypatch, capsys, *recipe, "--resume", "auto", "run.seed=2")
        assert "run.seed = 2, but 1 there" in said

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

LOG_ROW = (
    "step",
    "rollout/accuracy",
    "rollout/stop_share",
    "rollout/tokens",
    "ppo/entropy",
    "ppo/kl",
    "ppo/grad_norm",
    "sync/parity",
)
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


@pytest.fixture(scope="module")
def shared_memory() -> set[str]:
    """What is in shared memory before any run."""
    return set(os.listdir("/dev/shm"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, shared_memory: set[str]) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("run") / "base", 0)


@pytest.fixture(scope="module")
def interrupted(base: Path) -> Ended:
    """Ctrl-C in the second step."""
    run = Run(base, base.parent / "out", halt="rollout:2")
    run.until("HALTED")
    run.process.send_signal(signal.SIGINT)
    run.go_on()
    return run.end()


@pytest.fixture(scope="module")
def impatient(base: Path, interrupted: Ended) -> Ended:
    """Resumed; Ctrl-C twice in the third step, while it updates."""
    run = Run(base, interrupted.output, "--resume", "auto", halt="update:1")
    run.until("HALTED")
    for answer in ("finishing this step", "espo: interrupted"):
        run.process.send_signal(signal.SIGINT)
        run.until(answer)
    return run.end()


@pytest.fixture(scope="module")
def finished(base: Path, impatient: Ended) -> Ended:
    """Resumed, to the end; a kill has left half a row in the log."""
    with (impatient.output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rule": "regr')
    run = Run(base, impatient.output, "--resume", "auto")
    run.until(f"step {STEPS}/{STEPS}")
    return run.end()


class TestRealRun:
    pytestmark: ClassVar = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

    def test_ctrl_c_finishes_the_step_and_saves(self, interrupted: Ended) -> None:
        assert interrupted.code == 130
        said = interrupted.said.splitlines()
        assert "finishing this step, then saving; once more to stop now" in said
        assert said[-1] == "espo: interrupted; go on with --resume auto", interrupted.said
        assert "Traceback" not in interrupted.said
        assert interrupted.checkpoint == "step-00000002"
        assert [row["step"] for row in interrupted.rows] == [1, 2]

    def test_ctrl_c_twice_stops_now(self, impatient: Ended) -> None:
        """The update's thread still hangs where it was halted, and is not waited for."""
        assert impatient.code == 130
        assert "Traceback" not in impatient.said
        assert impatient.checkpoint == "step-00000002"
        assert [row["step"] for row in impatient.rows] == [1, 2]

    def test_nothing_is_left_running(
        self, interrupted: Ended, impatient: Ended, finished: Ended
    ) -> None:
        assert finished.code == 0, finished.said
        for ended in (interrupted, impatient, finished):
            assert ended.family >= 4  # two guards, a gateway and vLLM's processes
            assert ended.left == []

    def test_no_shared_memory_is_left(self, shared_memory: set[str], finished: Ended) -> None:
        assert set(os.listdir("/dev/shm")) <= shared_memory

    def test_resuming_goes_on_after_the_newest_checkpoint(
        self, impatient: Ended, finished: Ended
    ) -> None:
        for after in (impatient, finished):
            assert "step-00000002 after step 2\n" in after.said
        trained = [line for line in finished.said.splitlines() if line.startswith("step ")]
        assert [line.split()[1] for line in trained] == [f"3/{STEPS}"]
        assert finished.checkpoint == f"step-{STEPS:08d}"

    def test_every_step_is_logged_once(self, finished: Ended) -> None:
        assert [row["step"] for row in finished.rows] == [1, 2, 3]
        assert [row["stopping/gate_version"] for row in finished.rows] == [0, 1, 2]
        assert [row["stopping/rule"] for row in finished.rows] == ["none", *["regret-only"] * 2]
        for row in finished.rows:
            assert not undocumented(set(row) - {"step"})
            assert all(math.isfinite(row[key]) for key in LOG_ROW)
            assert row["rollout/errors"] == 0
        assert "stopping is on: " in finished.said

    def test_no_problem_is_drawn_twice(self, finished: Ended) -> None:
        drawn = [rollout.problem.id for batch in dumped(finished) for rollout in batch]
        expected = [problem.id for problem in islice(Arithmetic().training(SEED), 2 * STEPS)]
        assert drawn == [id for id in expected for _ in range(2)]

    def test_the_server_samples_from_the_resumed_weights(self, base: Path, finished: Ended) -> None:
        """Step 3 is the first after a start, when the server holds the base model."""
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        for step, batch in enumerate(dumped(finished)):
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
            assert row["ppo/mismatch_max"] < 1e-3
            assert row["sync/parity"] < 1e-3

    def test_the_summary_holds_what_the_readme_promises(self, finished: Ended) -> None:
        summary = json.loads((finished.output / "summary.json").read_text())
        assert set(SUMMARY_KEYS) <= set(summary)
        assert 0.0 <= summary["accuracy_before"] <= 1.0
        assert 0.0 <= summary["accuracy_after"] <= 1.0
        # Of all steps, those before the kill included.
        assert (
            summary["tokens_generated"] == sum(row["rollout/tokens"] for row in finished.rows) > 0
        )
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
