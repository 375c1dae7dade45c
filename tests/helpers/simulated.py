"""Simulated rollouts whose true success probability is known, and what stopping hides of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from espo_gateway.stop.regret import Array
from espo_gateway.stop.replay import first_stops
from espo_gateway.stop.rules import Gate
from espo_rl.gate.outcomes import recorded_of
from espo_rl.types import EndReason, Problem, Rollout
from replay_bound import cut

LENGTH, SLIP = 40, 0.03


def simulate(count: int, seed: int, *, harmless: float = 0.0) -> list[Rollout]:
    """Streams that fail when they slip: a slip shows as a regret of about 5, then all is calm.

    At token t the true P(success) is 0 after a slip, else (1 - SLIP) to the tokens left.

    harmless: share of the slips that do not make the rollout fail, though they look alike.
    """
    rng = np.random.default_rng(seed)
    rollouts = []
    for number in range(count):
        slips = rng.random(LENGTH) < SLIP
        logprobs = np.where(slips, -5.0, -0.05) - rng.exponential(0.1, LENGTH)
        fatal = slips & (rng.random(LENGTH) >= harmless)
        rollouts.append(
            Rollout(
                problem=Problem("p", "p", "a"),
                prompt_ids=[1] * 5,
                token_ids=[1] * LENGTH,
                logprobs=logprobs,
                max_logprobs=np.full(LENGTH, -0.05),
                text="",
                end=EndReason.COMPLETED,
                kept=LENGTH,
                correct=not fatal.any(),
                group=number,
            )
        )
    return rollouts


def critic_says(rollouts: Sequence[Rollout]) -> list[Array]:
    """P(success) by one who takes every slip for fatal: less than 5 % after one, [tokens] each."""
    left = (1.0 - SLIP) ** np.arange(LENGTH - 1, -1, -1)
    said = []
    for rollout in rollouts:
        doubt = 0.05 * (-1e3 * rollout.logprobs[0] % 1.0)  # its own, whatever is known of it
        slipped = np.cumsum(rollout.logprobs < -4.0) > 0
        said.append(np.where(slipped, doubt, left[: len(slipped)]))
    return said


def judged(rollouts: Sequence[Rollout], values: Sequence[Array] | None = None) -> list[Rollout]:
    """The same, those whose outcome is known with V of each token, [tokens] each: `critic_says`, or
    these values."""
    said = critic_says(rollouts) if values is None else values
    return [
        one if one.correct is None else dataclasses.replace(one, values=some)
        for one, some in zip(rollouts, said, strict=True)
    ]


def cuts(rollouts: Sequence[Rollout], gate: Gate) -> list[int]:
    """Where the gate stops each, 0 for nowhere."""
    return first_stops(gate, recorded_of(judged(rollouts))).tolist()


def censored(
    rollouts: Sequence[Rollout], gate: Gate, audit_share: float, seed: int
) -> list[Rollout]:
    """What training sees of them: stopped ones without an outcome, but for the audited share."""
    rng = random.Random(seed)
    seen = []
    for rollout, kept in zip(rollouts, cuts(rollouts, gate), strict=True):
        if not kept:
            seen.append(rollout)
            continue
        stopped = cut(rollout, kept, audited=rng.random() < audit_share)
        seen.append(dataclasses.replace(stopped, gate_version=gate.version))
    return seen
