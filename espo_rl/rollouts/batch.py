"""The rollouts of one step while they come in: what is still to be asked, what is there.

Pure bookkeeping, no I/O. A batch may be half full when a server dies, when the run is interrupted
or when a checkpoint is written; what it holds is then neither lost nor asked again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from espo_gateway.stop.gate_json import Mode
from espo_gateway.stop.rules import Gate
from espo_rl.types import EndReason, Problem, Request, Rollout


@dataclass
class Batch:
    """One step's rollouts.

    step: the step that is to train on it, counted from 1.
    first_seed: seeds count up from here, so a batch asked for again gets the same completions.
    first_problem: how many problems were drawn before it.
    gate: all its rollouts are watched by it, whenever they begin.
    waiting: requests without a rollout yet, by seed; rollouts: those that came, by seed.
    tokens: what the servers sampled for it so far; None where they do not say.
    """

    step: int
    first_seed: int
    gate: Gate
    first_problem: int = 0
    reason: str = ""  # why the gate stops, or does not
    waiting: dict[int, Request] = field(default_factory=dict)
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    scored: set[int] = field(default_factory=set)
    tokens: int | None = 0
    resampled: int = 0
    rounds: int = 0
    _requests: dict[int, Request] = field(default_factory=dict)
    _groups: int = 0

    def ask(
        self,
        problems: Iterable[Problem],
        n: int,
        modes: Sequence[Mode],
        history: Callable[[str], float | None] = lambda problem_id: None,
    ) -> None:
        """Want n rollouts of each problem, in these modes ("shadow": an audit).

        history: what is known of a problem by its id, for the estimate of success.
        """
        mode = iter(modes)
        for problem in problems:
            asked = Request(problem, seed=0, group=self._groups, history=history(problem.id))
            for _ in range(n):
                self._add(dataclasses.replace(asked, mode=next(mode)))
            self._groups += 1
        self.rounds += 1

    def _add(self, request: Request) -> None:
        seed = self.first_seed + len(self._requests)
        self._requests[seed] = self.waiting[seed] = dataclasses.replace(
            request, seed=seed, gate=self.gate.version
        )

    def put(self, rollout: Rollout) -> None:
        """A rollout has come, an error perhaps."""
        del self.waiting[rollout.seed]
        self.rollouts[rollout.seed] = rollout

    def ask_failed_again(self, attempts: int) -> None:
        """Replace errors by new requests of the same problem, each at most `attempts` times."""
        for rollout in self.failed:
            request = self._requests[rollout.seed]
            if request.attempt < attempts:
                del self.rollouts[rollout.seed]
                self.resampled += 1
                self._add(dataclasses.replace(request, attempt=request.attempt + 1))

    def recall_failed(self) -> None:
        """Want the errors again as they were: the server was at fault, not the request."""
        for rollout in self.failed:
            del self.rollouts[rollout.seed]
            self.scored.discard(rollout.seed)
            self.waiting[rollout.seed] = self._requests[rollout.seed]

    @property
    def failed(self) -> list[Rollout]:
        return [one for one in self.rollouts.values() if one.end is EndReason.ERROR]

    @property
    def all(self) -> list[Rollout]:
        """What came, in the order it was asked for, prompt by prompt."""
        return sorted(self.rollouts.values(), key=lambda one: (one.group, one.seed))

    @property
    def usable(self) -> list[Rollout]:
        """All but the errors."""
        return [one for one in self.all if one.end is not EndReason.ERROR]

    @property
    def unscored(self) -> list[Rollout]:
        """Usable rollouts whose outcome and reward are still to be found."""
        return [one for one in self.usable if one.seed not in self.scored]

    def informative(self) -> list[Rollout]:
        """Usable rollouts of the prompts whose rewards differ (DAPO, arXiv 2503.14476, eq. 11)."""
        rewards: dict[int, set[float]] = {}
        for rollout in self.usable:
            rewards.setdefault(rollout.group, set()).add(rollout.reward)
        return [rollout for rollout in self.usable if len(rewards[rollout.group]) > 1]
