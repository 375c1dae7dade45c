"""What is asked next and which step trains on it, on a simulated engine: no length has a say in it.

The engine of the simulation samples a token of everything under way in each tick, which takes the
longer the more that is; weights change at the end of an update, which takes a while.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espo_gateway.stop.gate_json import Mode
from espo_gateway.stop.rules import Gate
from espo_rl.rollouts.batch import Batch
from espo_rl.rollouts.queue import BatchQueue
from espo_rl.types import EndReason, Problem, Rollout

N = 4


@dataclass
class Simulation:
    """A run: `length` of each seed's rollout; prompts a step; what a tick and an update take."""

    length: Callable[[int], int]
    steps: int
    prompts: int = 8
    ahead: int = 0
    slots: int = 16
    tick: float = 1.0  # and a tenth of it for each rollout under way
    update: float = 40.0

    time: float = 0.0
    version: int = 0
    drawn: int = 0
    trained: list[list[Rollout]] = field(default_factory=list)
    #: by seed, the version of each token sampled so far
    under_way: dict[int, list[int]] = field(default_factory=dict)

    def run(self) -> Simulation:
        self.queue = BatchQueue(self.ahead, self.draw)
        for step in range(1, self.steps + 1):
            batch = self.queue.next(step - 1, self.steps)
            assert batch.step == step
            while batch.waiting:
                self.sample()
            self.queue.batches.popleft()
            trained = self.time + self.update
            while self.time < trained and any(self.queue.wanted(())):
                self.sample()
            self.time = max(self.time, trained)
            self.version += 1
            self.trained.append(batch.all)
        return self

    def draw(self, step: int) -> Batch:
        batch = Batch(step, first_seed=1000 * step, gate=Gate(version=step))
        problems = [Problem(str(self.drawn + i), "", "") for i in range(self.prompts)]
        self.drawn += self.prompts
        modes: list[Mode] = ["enforce"] * (self.prompts * N)
        batch.ask(problems, N, modes)
        return batch

    def sample(self) -> None:
        """One tick."""
        for _, request in self.queue.wanted(list(self.under_way)):
            if len(self.under_way) < self.slots:
                self.under_way[request.seed] = []
        self.time += self.tick * (1 + 0.1 * len(self.under_way))
        for batch in self.queue.batches:
            for seed in [seed for seed in batch.waiting if seed in self.under_way]:
                versions = self.under_way[seed]
                versions.append(self.version)
                if len(versions) == self.length(seed):
                    request = batch.waiting[seed]
                    batch.put(
                        Rollout(
                            problem=request.problem,
                            prompt_ids=[1],
                            token_ids=self.under_way.pop(seed),
                            logprobs=np.zeros(0),
                            max_logprobs=np.zeros(0),
                            text="",
                            end=EndReason.COMPLETED,
                            kept=len(versions),
                            group=request.group,
                            seed=seed,
                        )
                    )


@cache
def heavy_tailed(seed: int) -> int:
    return 5 + int(np.random.default_rng(seed).pareto(1.5) * 20) % 200


lengths = st.integers(0, 10_000).map(lambda of: lambda seed: 1 + hash((of, seed)) % 30)


@settings(max_examples=40)
@given(lengths, st.integers(1, 3), st.integers(1, 20), st.integers(1, 3), st.integers(0, 80))
def test_a_step_gets_what_it_would_have_got_whatever_is_long(
    length: Callable[[int], int], ahead: int, slots: int, prompts: int, update: int
) -> None:
    def run(ahead: int) -> Simulation:
        return Simulation(length, 4, prompts, ahead, slots, update=float(update)).run()

    batch, refill = run(0), run(ahead)
    for one, other in zip(batch.trained, refill.trained, strict=True):
        # Lengths and so rewards, as both follow from the seed here, to the last one.
        assert [(r.seed, r.kept) for r in one] == [(r.seed, r.kept) for r in other]
        assert [r.problem.id for r in one] == [r.problem.id for r in other]
        # Whole groups.
        assert [r.group for r in other] == [g for g in range(prompts) for _ in range(N)]
    assert refill.time <= batch.time
    assert not refill.under_way
    for step, rollouts in enumerate(refill.trained, 1):
        for rollout in rollouts:
            ages = [step - 1 - version for version in rollout.token_ids]
            assert all(0 <= age <= ahead for age in ages)
    assert all(
        version == step
        for step, rollouts in enumerate(batch.trained)
        for rollout in rollouts
        for version in rollout.token_ids
    )


@cache
def of_the_demo(seed: int) -> int:
    return int(np.clip(np.random.default_rng(seed).normal(82, 30), 20, 160))


@cache
def stopped(seed: int) -> int:
    """More than half of them are, somewhere."""
    rng = np.random.default_rng((seed, 1))
    share = rng.uniform(0.1, 0.9) if rng.uniform() < 0.55 else 1.0
    return int(of_the_demo(seed) * share)


def test_tokens_saved_become_time_saved_when_slots_are_filled_again() -> None:
    saved = {}
    for ahead in (0, 1, 2):
        runs = [
            Simulation(length, 10, 16, ahead, slots=64, update=0.0).run()
            for length in (of_the_demo, stopped)
        ]
        tokens = [sum(r.kept for batch in run.trained for r in batch) for run in runs]
        saved[ahead] = (1 - runs[1].time / runs[0].time) / (1 - tokens[1] / tokens[0])
    assert saved[0] + 0.05 < saved[1] < saved[2]
    assert saved[1] > 0.9


def test_what_takes_longest_is_not_the_last_to_count() -> None:
    """The first steps of a run are like all others, unlike where the first that come are taken."""
    run = Simulation(heavy_tailed, 20, 16, ahead=2).run()
    means = [np.mean([r.kept for r in batch]) for batch in run.trained]
    first = sorted(r.kept for batch in run.trained for r in batch)[: 16 * N * 4]
    assert np.mean(means[:4]) == pytest.approx(np.mean(means), rel=0.2)
    assert np.mean(first) < 0.7 * np.mean(means)


def test_the_oldest_step_is_asked_first_also_for_what_comes_late() -> None:
    simulation = Simulation(heavy_tailed, 3, prompts=1, ahead=1)
    simulation.queue = queue = BatchQueue(1, simulation.draw)
    first = queue.next(0, 3)
    seeds = [request.seed for _, request in queue.wanted(())]
    assert seeds == [1000, 1001, 1002, 1003, 2000, 2001, 2002, 2003]
    first.ask([Problem("late", "", "")], 2, ["enforce"] * 2)
    assert [request.seed for _, request in queue.wanted({1000, 2000})] == [
        *(1001, 1002, 1003, 1004, 1005),
        *(2001, 2002, 2003),
    ]
    # All of a batch are watched by its gate.
    assert [(b.step, r.gate) for b, r in queue.wanted(())] == [(1, 1)] * 6 + [(2, 2)] * 4


def test_no_more_is_drawn_than_the_run_has_steps() -> None:
    simulation = Simulation(heavy_tailed, 3, prompts=1)
    queue = BatchQueue(5, simulation.draw)
    queue.next(0, 3)
    assert [batch.step for batch in queue.batches] == [1, 2, 3]
    queue.batches.popleft()
    assert queue.next(1, 3).step == 2
    assert [batch.step for batch in queue.batches] == [2, 3]
    # A run that is resumed has them from its checkpoint.
    again = BatchQueue(1, simulation.draw, queue.batches)
    assert again.next(1, 4).step == 2
    assert [batch.step for batch in again.batches] == [2, 3]
