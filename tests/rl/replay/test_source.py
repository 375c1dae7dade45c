"""Where a replay reads its rollouts: the processes that share the work."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

KILLED = """
import multiprocessing, os, signal
from espo_rl.replay.source import processes

if __name__ == "__main__":
    processes().submit(os.getpid).result()
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_the_other_processes_end_with_it_however_it_ends(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    done = subprocess.run(
        [sys.executable, tmp_path / "killed.py"],
        stdout=subprocess.PIPE,  # which is at its end when all have ended
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    left = [psutil.Process(pid) for pid in map(int, done.stdout.split()) if psutil.pid_exists(pid)]
    assert done.stdout.split()
    assert psutil.wait_procs(left, timeout=30)[1] == []
