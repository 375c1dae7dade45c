"""What the graded samples of a data set's problems come to: avg@k, pass@k, maj@k. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from espo_rl.record.intervals import ProblemMean


@dataclass(frozen=True)
class Graded:
    """One sample: whether it is right, and the answer that it gives, in a normal form.

    answer: None where it gives none. Samples with the same answer give one vote each for it.
    """

    correct: bool
    answer: str | None = None


@dataclass(frozen=True)
class Scores:
    """Scores of one data set, each a mean over its problems with a 95 % interval.

    average: avg@k, the share of right samples.
    passes: pass@j for j = 1, 2, 4, ... and k.
    majority: maj@k; None where the grader knows of no answers that could be counted.
    """

    k: int
    average: ProblemMean
    passes: dict[int, ProblemMean]
    majority: ProblemMean | None


def score(problems: Sequence[Sequence[Graded]], k: int, *, votes: bool = True) -> Scores:
    """The scores of problems with up to k graded samples each.

    A problem with fewer samples, because some failed, counts with those it has, and not at all in
    a pass@j that needs more; one with none is left out.

    Args:
        problems: [problems][samples].
        votes: whether the samples' answers are known.
    """
    known = [samples for samples in problems if samples]
    return Scores(
        k=k,
        average=ProblemMean.of([float(np.mean([s.correct for s in samples])) for samples in known]),
        passes={
            draws: ProblemMean.of(
                [
                    pass_at(draws, len(samples), sum(sample.correct for sample in samples))
                    for samples in known
                    if len(samples) >= draws
                ]
            )
            for draws in powers_of_two(k)
        },
        majority=ProblemMean.of([majority(samples) for samples in known]) if votes else None,
    )


def powers_of_two(k: int) -> list[int]:
    """1, 2, 4, ... below k, and k.

    >>> powers_of_two(6)
    [1, 2, 4, 6]
    """
    return [*(2**i for i in range((k - 1).bit_length())), k]


def pass_at(draws: int, samples: int, correct: int) -> float:
    """The chance that `draws` of the samples, drawn without replacement, hold a right one.

    The unbiased estimate of pass@draws by Chen et al. 2021 (arXiv 2107.03374, eq. 1).
    """
    if not 0 < draws <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{draws} of {correct} right in {samples} samples")
    # In whole numbers, so that no rounding adds up.
    missed, drawn = math.comb(samples - correct, draws), math.comb(samples, draws)
    return (drawn - missed) / drawn


def majority(samples: Sequence[Graded]) -> float:
    """How right the most frequent answer is; 0 when no sample gives one.

    Samples without an answer do not vote. Of answers with equally many votes each is as likely to
    be taken, so the result is the expected value, not that of one draw. An answer's rightness is
    the share of right samples among its own: 0 or 1 unless the grader is of two minds.
    """
    votes = Counter(sample.answer for sample in samples if sample.answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    leading = {answer for answer, count in votes.items() if count == most}
    right = sum(sample.correct for sample in samples if sample.answer in leading)
    return right / (most * len(leading))
