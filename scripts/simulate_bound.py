"""What each bound lets a run lose, by how often the policy is right and how well a rule tells.

    python scripts/simulate_bound.py

Rollouts are simulated: right ones and wrong ones have normal levels, as far apart as the rule's AUC
says. A step has 128 of them, 10 % of the stopped ones are audited, 200 steps are played with each
of eight seeds, and the threshold is `AuditThreshold`'s with the trainer's defaults. Prints a
Markdown table.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from espo_gateway.stop.threshold_control import AuditThreshold, Bound, Outcomes

ROLLOUTS, STEPS, AUDIT_SHARE, SEEDS = 128, 200, 0.1, 8
ACCURACIES = (0.02, 0.05, 0.12, 0.3, 0.5)
AREAS = (0.7, 0.85, 0.95)


@dataclass(frozen=True)
class Played:
    """Shares over a run: of the right rollouts those lost, of the wrong ones those stopped, of the
    steps those with a gate."""

    lost: float
    caught: float
    gated: float


def play(bound: Bound, accuracy: float, area: float, *, seed: int, steps: int = STEPS) -> Played:
    """One simulated run."""
    rng = np.random.default_rng(seed)
    controller = AuditThreshold(bound, window=20, low=-20.0, high=20.0)
    lost = right_ones = caught = wrong_ones = gated = 0
    for _ in range(steps):
        right = rng.random(ROLLOUTS) < accuracy
        levels = rng.normal(np.sqrt(2.0) * ndtri(area) * right).astype(np.float32)
        level = controller.level
        stopped = levels < (-np.inf if level is None else level)
        audited = stopped & (rng.random(ROLLOUTS) < AUDIT_SHARE)
        known = ~stopped | audited
        outcomes = Outcomes(
            levels[known],
            right[known],
            np.where(audited, 1.0 / AUDIT_SHARE, 1.0)[known].astype(np.float32),
            AUDIT_SHARE if stopped.any() else 1.0,
        )
        lost += _count(stopped & right)
        caught += _count(stopped & ~right)
        right_ones += _count(right)
        wrong_ones += _count(~right)
        gated += level is not None
        controller.update(
            outcomes,
            None if level is None else float(stopped.mean()),
            ready=True,
            audits=(_count(audited), _count(audited & right)),
        )
    return Played(lost / max(right_ones, 1), caught / wrong_ones, gated / steps)


def _count(of: NDArray[np.bool_]) -> int:
    return int(of.sum())


def mean(bound: Bound, accuracy: float, area: float) -> Played:
    """Over all seeds."""
    played = [play(bound, accuracy, area, seed=seed) for seed in range(SEEDS)]
    return Played(*np.mean([(one.lost, one.caught, one.gated) for one in played], axis=0))


def main() -> int:
    print("| right | AUC | right lost | wrong caught | steps gated | | right lost | wrong caught |")
    print("|---|---|---|---|---|---|---|---|")
    for accuracy in ACCURACIES:
        for area in AREAS:
            ours = mean(Bound("right-lost"), accuracy, area)
            theirs = mean(Bound("false-positives"), accuracy, area)
            print(
                f"| {accuracy:.0%} | {area} | {ours.lost:.1%} | {ours.caught:.0%} | "
                f"{ours.gated:.0%} | | {theirs.lost:.0%} | {theirs.caught:.0%} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
