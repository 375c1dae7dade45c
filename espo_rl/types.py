"""The records that travel through a training step."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from espo_gateway.stop.gate_json import Mode

#: What a rollout is that was stopped though its audit found it right.
AuditedRight = Literal["whole", "cut", "failed"]


@dataclass(frozen=True)
class Problem:
    """One problem of a task: what the policy is asked, and the answer a reward compares with.

    `extra` is the row it came from, for graders that need more than the answer.
    """

    id: str
    prompt: str
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Request:
    """One completion to ask for. In a batch the seed is its name, too."""

    problem: Problem
    seed: int
    mode: Mode = "enforce"
    group: int = 0
    history: float | None = None
    attempt: int = 0
    gate: int | None = None  # version of the gate to be watched by; None: the one in force


#: of the requests of a step, or of a problem
SEEDS = 65_536


def first_seed(seed: int, number: int) -> int:
    """Where the seeds of the requests of a step, or of a problem, begin: room for `SEEDS`.

    They follow from the run's seed, whatever that is, and fit the 63 bits of a request's.
    """
    return (seed * 1_000_003 + number) % 2**46 * SEEDS


class EndReason(enum.StrEnum):
    """How a rollout ended; never inferred from lengths or padding."""

    COMPLETED = "completed"  # end-of-sequence token or stop string
    LENGTH = "length"  # ran into max_tokens
    EARLY_STOP = "early_stop"  # cut by the stop rule
    ERROR = "error"  # no usable answer after all retries


@dataclass
class Rollout:
    """One sampled completion.

    probes: what an answer probe said (`espo_gateway.stop.told`).
    values: V of each token, [tokens], as the trainer said it before the update, for its servers;
        None where nobody was asked, or the outcome is unknown.

    An audited rollout was generated to its end although the rule stopped it: `end` is EARLY_STOP
    and `kept` is where it was stopped, but the tokens past the cut and the outcome are known.
    """

    problem: Problem
    prompt_ids: list[int]
    token_ids: list[int] = field(repr=False)  # [tokens]
    logprobs: NDArray[np.float64] = field(repr=False)  # [tokens], of the sampled tokens, raw
    max_logprobs: NDArray[np.float64] = field(repr=False)  # [tokens], of the argmax
    text: str
    end: EndReason
    kept: int
    audited: bool = False
    overshoot: int = 0
    gate_version: int = 0
    weights_version: str = ""  # of the weights that it began with
    # Where others took over: after how many tokens, and their version
    weights_changes: list[tuple[int, str]] = field(default_factory=list, repr=False)
    correct: bool | None = None  # None: stopped and not audited, so nobody knows
    reward: float = 0.0
    group: int = 0  # rollouts of one prompt in one batch have the same
    history: float | None = None  # what was known of its prompt (`espo_rl.gate.history`)
    probes: list[list[float]] = field(default_factory=list, repr=False)  # token, and what was said
    seed: int = 0
    error: str = ""
    audited_right: AuditedRight = "whole"  # what it would be
    opened: str = ""  # the tag of a thought that the prompt opens, so that the text lacks it
    grader_timed_out: bool = False
    values: NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def answer(self) -> str:
        """What is graded: the text, and before it the tag of a thought that the prompt opened."""
        return self.opened + self.text

    @property
    def versions(self) -> list[tuple[str, int]]:
        """Of the weights that sampled it, in order, and how many tokens are of each."""
        starts = [(0, self.weights_version), *self.weights_changes, (len(self.token_ids), "")]
        return [(version, end - start) for (start, version), (end, _) in pairwise(starts)]

    @property
    def token_versions(self) -> list[str]:
        """The version of the weights that sampled each token, [tokens]."""
        return [version for version, tokens in self.versions for _ in range(tokens)]

    @property
    def stopped(self) -> bool:
        """Whether the stop rule decided to stop it, audited or not."""
        return self.end is EndReason.EARLY_STOP

    @property
    def spared(self) -> bool:
        """Whether an audit found it right, so that it is worth what it is worth."""
        return self.audited and bool(self.correct) and self.audited_right != "failed"

    @property
    def trained(self) -> int:
        """Length in tokens of the training sample: all that came before the cut, if it is cut."""
        whole = self.spared and self.audited_right == "whole"
        return len(self.token_ids) if whole else self.kept

    @property
    def generated(self) -> int:
        """Tokens the server sampled for it, those past the cut included."""
        return len(self.token_ids) + self.overshoot
