"""Tags around a model's thoughts: whether one is open, and what follows them."""

from __future__ import annotations

import re
from collections.abc import Sequence


def read_tags(text: str, tags: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The tag that a text leaves open, mostly none, and what follows its last closing one.

    Tags do not nest, as a thought may well speak of them. They may be in capitals or not.

    >>> read_tags("<think>they say <THINK>?</think> 6 <think>", [("<think>", "</think>")])
    ('<think>', ' 6 <think>')
    """
    if not tags:
        return "", text
    openings, closings = ("|".join(map(re.escape, some)) for some in zip(*tags, strict=True))
    rest = re.split(closings, text, flags=re.IGNORECASE)[-1]
    opened = re.findall(openings, rest, re.IGNORECASE)
    return (opened[-1] if opened else ""), rest
