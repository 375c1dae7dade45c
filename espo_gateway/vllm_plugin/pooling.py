"""vLLM's `/pooling` asked for V(s): the request's body, and the values in the answer. Pure.

The server classifies each prefix by its last token with one label (`--runner pooling --convert
classify`); V is that label's score. See https://docs.vllm.ai/en/latest/models/pooling_models.html
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

ROUTE = "/pooling"


def pooling_body(model: str, prefixes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The request for V after each prefix: token ids, shape [prefixes, tokens], ragged."""
    # The raw score: a single label would be squashed by a sigmoid otherwise.
    return {"model": model, "input": prefixes, "use_activation": False}


def pooled_values(answer: Any, prefixes: int) -> list[float]:
    """V of each prefix from the decoded answer, shape [prefixes]; NaN where it holds no number.

    Raises:
        ValueError: the answer is not one score for each prefix.
    """
    try:
        scores = [entry["data"] for entry in answer["data"]]
        if len(scores) == prefixes:
            return [math.nan if score is None else float(score) for [score] in scores]
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"not one score for each of {prefixes} prefixes")
