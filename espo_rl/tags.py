"""Tags around a model's thoughts: which are open, and what follows them."""

from __future__ import annotations

import re
from collections.abc import Sequence


def read_tags(text: str, tags: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The tag that a text leaves open, mostly none, and what follows its last closing one.

    Tags nest, and may be written in capitals or not.

    >>> read_tags("<think>5? <THINK>6?</think> or", [("<think>", "</think>")])
    ('<think>', ' or')
    """
    if not tags:
        return "", text
    openings, closings = ("|".join(map(re.escape, some)) for some in zip(*tags, strict=True))
    opened, end = list[str](), 0
    # Several in a row open one thought: a prompt's last, and with which the model begins.
    for tag in re.finditer(rf"({closings})|(?:({openings})\s*)+", text, re.IGNORECASE):
        if tag[1]:
            opened, end = opened[:-1], tag.end()
        else:
            opened.append(tag[2])
    return (opened[-1] if opened else ""), text[end:]
