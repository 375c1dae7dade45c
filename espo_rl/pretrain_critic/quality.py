"""How much a critic knows of the outcome, over all tokens and along the response. Pure.

V is in the unit of returns; with what a right and a wrong answer are worth it is read as a
probability too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

Array = NDArray[np.float64]

#: along the response: V of the prompt alone, and before the token at this share of the rest
POSITIONS = {"first token": 0.0, "quarter": 0.25, "half": 0.5, "end": 1.0}


@dataclass(frozen=True)
class Quality:
    """What V says of the outcomes of some states.

    explained: 1 - var(return - V)/var(return). auc: the chance that a state of a right rollout has
    a higher V than one of a wrong one. Both NaN when all outcomes are the same. mse: in squared
    returns. bce: in nats, of P = (V - wrong)/(right - wrong).
    """

    states: int
    explained: float
    auc: float
    mse: float
    bce: float

    @classmethod
    def of(cls, values: Array, outcomes: NDArray[np.bool_], right: float, wrong: float) -> Quality:
        """Args: values, outcomes: [states]. right, wrong: what an answer is worth."""
        returns = np.where(outcomes, right, wrong)
        errors = returns - values
        variance = float(returns.var())
        chance = np.clip((values - wrong) / (right - wrong), 1e-3, 1.0 - 1e-3)
        return cls(
            states=len(values),
            explained=1.0 - float(errors.var()) / variance if variance > 0.0 else math.nan,
            auc=auc(values, outcomes),
            mse=float(np.mean(errors**2)),
            bce=float(-np.mean(np.log(np.where(outcomes, chance, 1.0 - chance)))),
        )


def qualities(
    values: Sequence[Array], outcomes: Sequence[bool], *, right: float = 1.0, wrong: float = -1.0
) -> dict[str, Quality]:
    """Over all states, by the prompt alone held to the end, and at each of POSITIONS.

    Args:
        values: of each rollout, V before each token, [tokens], at least one.
        outcomes: whether it was right.
    """
    lengths = [len(rows) for rows in values]
    known = np.array(outcomes, dtype=np.bool_)
    everywhere = np.repeat(known, lengths)
    held = np.repeat([rows[0] for rows in values], lengths)
    found = {
        "all tokens": Quality.of(np.concatenate(values), everywhere, right, wrong),
        "prompt, held": Quality.of(held, everywhere, right, wrong),
    }
    for name, share in POSITIONS.items():
        there = np.array([rows[round(share * (len(rows) - 1))] for rows in values])
        found[name] = Quality.of(there, known, right, wrong)
    return found


def auc(values: Array, outcomes: NDArray[np.bool_]) -> float:
    """Area under the ROC curve; ties count half. NaN when all outcomes are the same."""
    if outcomes.all() or not outcomes.any():
        return math.nan
    return float(roc_auc_score(outcomes, values))
