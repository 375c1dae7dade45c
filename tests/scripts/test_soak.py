"""The soak, shortened; and that it would notice."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

import soak_gateway
from soak_gateway import Soak, growth


def run_of(bytes_per_request: float, *, seconds: int = 180, rate: int = 100) -> Soak:
    """A gateway that warms up, breathes by a megabyte, and leaks."""
    rng, soak = random.Random(0), Soak()
    for second in range(seconds):
        done = rate * second
        warm = min(second / seconds / 0.2, 1.0) * 20 * 2**20
        soak.times.append(second)
        soak.done.append(done)
        soak.rss.append(int(warm + rng.uniform(0, 2**20) + bytes_per_request * done))
    return soak


@pytest.mark.parametrize(("leak", "noticed"), [(0, False), (50, False), (1000, True), (5000, True)])
def test_a_leak_is_told_from_a_warm_up(leak: int, noticed: bool) -> None:
    grown, allowed = growth(run_of(leak))
    assert (grown > allowed) == noticed


@pytest.mark.slow
def test_twenty_seconds_leave_nothing_behind() -> None:
    command = [sys.executable, soak_gateway.__file__, "--seconds", "20"]
    told = subprocess.run([*command, "--streams", "128"], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "memory is flat and nothing is left" in told.stdout
