"""One side of the benchmark as a child process: a turn for each line that it is sent.

The child's answers are lines of JSON on its standard output; what its libraries print goes to its
standard error. Memory is what one process had resident at most, of a GPU what torch had allocated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from espo_rl.servers.fleet import OF_RANKS

SCRIPTS = Path(__file__).resolve().parents[1]


class SideError(RuntimeError):
    """A side has ended before its time; the message says how its log ends."""


class Side:
    """The parent's end. Use as a context manager, which ends the child."""

    def __init__(self, module: str, arguments: list[str], log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", f"trainer_benchmark.{module}", *arguments]
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # Neither side is one of several ranks, whoever starts this.
                env={
                    name: value
                    for name, value in os.environ.items()
                    if not OF_RANKS.fullmatch(name)
                }
                | {"PYTHONPATH": f"{SCRIPTS.parent}:{SCRIPTS}"},
            )
        self.hello = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60.0)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def turn(self) -> dict[str, Any]:
        """What one step took.

        Raises:
            SideError: the child is gone.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its answer, which is none, says it
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise SideError(f"{self._log} ends:\n{self._log.read_text(errors='replace')[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Turns:
    """The child's end."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def answer(self, **what: Any) -> None:
        print(json.dumps(what), file=self._answers, flush=True)

    def wait(self) -> bool:
        """Until the next turn; False when there is none."""
        return bool(sys.stdin.readline())


@dataclass
class Meter:
    """Seconds of the clock and of this process's processors, and peak memory, by phase."""

    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    peak: float = 0.0  # MB, of all since it was made

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.look()
        _reset_peak()
        started, processor = time.perf_counter(), time.process_time()
        yield
        spent = self.phases.setdefault(name, {"s": 0.0, "processor_s": 0.0, "peak_mb": 0.0})
        spent["s"] += time.perf_counter() - started
        spent["processor_s"] += time.process_time() - processor
        spent["peak_mb"] = max(spent["peak_mb"], self.look())

    def around(self, owner: Any, name: str, phase: str) -> None:
        """Have each call of a method count as the phase."""
        plain: Callable[..., Any] = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return plain(*args, **kwargs)

        setattr(owner, name, measured)

    def look(self) -> float:
        """The peak since the last phase began, in MB."""
        import torch

        if torch.cuda.is_available():
            now = torch.cuda.max_memory_allocated() / 2**20
        else:
            status = Path("/proc/self/status").read_text()
            now = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        self.peak = max(self.peak, now)
        return now


def _reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
