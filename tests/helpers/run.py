"""A run of `espo_rl.run` as a child process: started, halted, signalled, looked at in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from espo_rl.checkpoints import CheckpointStore
from espo_rl.record.rollout_files import read_rollouts
from espo_rl.types import Rollout

STEPS = 3
SEED = 11
DRIVER = Path(__file__).with_name("drive.py")


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
        """Of the steps; evaluations have rows of their own."""
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "rollout/tokens" in row]


class Run:
    """A run as a child process, in an environment that marks whatever it starts."""

    def __init__(
        self, base: Path, output: Path, *options: str, halt: str | None = None, ranks: int = 1
    ) -> None:
        """halt: a place and a step, such as "rollout:2"; see drive.py."""
        self.output = output
        program = ["-m", "espo_rl.run"] if halt is None else [str(DRIVER), halt]
        if ranks > 1:
            program = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *program]
        self.mark = uuid.uuid4().hex
        # What DeepSpeed in this process's other tests has set is not for the child.
        of_ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        environment = {name: value for name, value in os.environ.items() if name not in of_ranks}
        self.process = subprocess.Popen(
            [
                *(sys.executable, *program, "arithmetic"),
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
            stdin=subprocess.PIPE,
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

    def go_on(self) -> None:
        """After a halt."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

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
            checkpoint=None if newest is None else newest.name,
        )

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("ESPO_TEST_RUN") == self.mark
        except psutil.Error:
            return False


def dumped(ended: Ended) -> list[list[Rollout]]:
    """The rollouts of each step."""
    return [read_rollouts(path)[0] for path in sorted((ended.output / "rollouts").iterdir())]
