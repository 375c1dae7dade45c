"""A stop controller, and a run of it without models: gate, sample, observe."""

from __future__ import annotations

import random
from typing import Any

from espo_gateway.stop.rules import Gate
from espo_rl.config import Stopping
from espo_rl.gate.batch_gates import StopController
from tests.helpers.simulated import censored, judged, simulate

AUDIT = 0.25


def controller(**settings: Any) -> StopController:
    return StopController(Stopping(**settings), 1000, random.Random(0))


def bound_of(stopping: StopController) -> float:
    assert stopping.bound_upper is not None
    return stopping.bound_upper


def play(
    stopping: StopController,
    batches: int,
    *,
    rollouts: int = 150,
    seed: int = 0,
    harmless: float = 0.0,
    explained: float = 0.5,
) -> tuple[list[Gate], list[float]]:
    """Gate, sample, observe; returns the gates and the share each stopped."""
    gates, shares = [], []
    for batch in range(batches):
        gate = stopping.gate(f"step-{batch}")
        full = simulate(rollouts, 1000 * seed + batch, harmless=harmless)
        seen = censored(full, gate, stopping.config.audit_share, batch)
        stopping.observe(judged(seen) if stopping.needs_values else seen, 0.4, explained)
        gates.append(gate)
        shares.append(sum(rollout.stopped for rollout in seen) / rollouts)
    return gates, shares
