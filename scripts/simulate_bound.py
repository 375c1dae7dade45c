"""What each bound lets a run lose, by how often the policy is right and how well a rule tells.

    python scripts/simulate_bound.py

Rollouts are simulated: right ones and wrong ones have normal levels, as far apart as the rule's AUC
says; half of what else moves a level goes with the prompt. A step has 8 of each of 16 prompts,
which are solved more or less often (beta distributed); 200 steps are played with each of eight
seeds, and the threshold is `AuditThreshold`'s with the trainer's defaults. Audited is one rollout
of each prompt, or each with a chance of 10 %: then a prompt whose rollouts were right may be left
without any that is finished. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from espo_gateway.stop.threshold_control import AuditThreshold, Bound, Outcomes
from espo_rl.gate.audits import Audits

PROMPTS, N, STEPS, AUDIT_SHARE, SEEDS = 16, 8, 200, 0.1, 8
#: Of the beta distribution; the lower, the more prompts are solved always or never.
SPREAD = 2.0
#: Of a level's variance, what goes with the prompt.
ALIKE = 0.5
ACCURACIES = (0.02, 0.05, 0.12, 0.3, 0.5)
AREAS = (0.7, 0.85, 0.95)


@dataclass(frozen=True)
class Played:
    """Shares over a run: of the right rollouts those lost, of the wrong ones those stopped, of the
    steps those with a gate, of the prompts with a right rollout those without a finished one."""

    lost: float
    caught: float
    gated: float
    bare: float


def play(
    bound: Bound, accuracy: float, area: float, audits: Audits, *, seed: int, steps: int = STEPS
) -> Played:
    """One simulated run."""
    rng, chance = np.random.default_rng(seed), random.Random(seed)
    shape = PROMPTS, N
    bare = promising = 0
    controller = AuditThreshold(bound, window=20, low=-20.0, high=20.0)
    lost = right_ones = caught = wrong_ones = gated = 0
    for _ in range(steps):
        solved = rng.beta(SPREAD * accuracy, SPREAD * (1.0 - accuracy), (PROMPTS, 1))
        right = (rng.random(shape) < solved).ravel()
        drawn = np.array(audits.draw(PROMPTS * N, chance))
        of_prompt = np.repeat(rng.normal(size=PROMPTS), N)
        noise = np.sqrt(ALIKE) * of_prompt + np.sqrt(1.0 - ALIKE) * rng.normal(size=right.size)
        levels = (np.sqrt(2.0) * ndtri(area) * right + noise).astype(np.float32)
        level = controller.level
        stopped = levels < (-np.inf if level is None else level)
        audited = stopped & drawn
        known = ~stopped | audited
        outcomes = Outcomes(
            levels[known],
            right[known],
            np.where(audited, 1.0 / audits.share, 1.0)[known].astype(np.float32),
            1.0 if level is None else audits.share,
            np.repeat(np.arange(PROMPTS), N)[known],
        )
        hopeful, finished = (np.any(of.reshape(shape), axis=1) for of in (right, known))
        promising += _count(hopeful)
        bare += _count(hopeful & ~finished)
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
    shares = lost / max(right_ones, 1), caught / wrong_ones, gated / steps
    return Played(*shares, bare / max(promising, 1))


def _count(of: NDArray[np.bool_]) -> int:
    return int(np.sum(of))


def mean(bound: Bound, accuracy: float, area: float, audits: Audits) -> Played:
    """Over all seeds."""
    played = [play(bound, accuracy, area, audits, seed=seed) for seed in range(SEEDS)]
    return Played(*np.mean([tuple(vars(one).values()) for one in played], axis=0))


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    each, by_chance = Audits.of(AUDIT_SHARE, N), Audits(AUDIT_SHARE)
    heads = ["right", "AUC", "right lost", "wrong caught", "steps gated", ""]
    heads += ["right lost", "wrong caught", "prompts without a finished one"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for accuracy in ACCURACIES:
        for area in AREAS:
            ours = mean(Bound("right-lost"), accuracy, area, each)
            assert not ours.bare
            theirs = mean(Bound("false-positives"), accuracy, area, by_chance)
            print(
                f"| {accuracy:.0%} | {area} | {ours.lost:.1%} | {ours.caught:.0%} | "
                f"{ours.gated:.0%} | | {theirs.lost:.0%} | {theirs.caught:.0%} | "
                f"{theirs.bare:.1%} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
