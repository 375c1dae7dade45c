"""The text of an answer: where it stands in a completion, and one spelling of what is alike."""

from __future__ import annotations

import re

from espo_rl.config import TaskSection
from espo_rl.tags import read_tags

#: the usual tags of thoughts and answers
USUAL = TaskSection()


def final_text(completion: str, tags: TaskSection = USUAL) -> str:
    """The part of a completion that answers, as reasoning models write it.

    What follows the last thought, nothing where one is still open; of that what stands in the last
    answer tags, where there are any. A prompt may have opened either.

    >>> final_text("<think>5?</think> No: <answer>6</answer>")
    '6'
    """
    opened, text = read_tags(completion, tags.thought_tags)
    if opened:
        return ""
    for opening, close in tags.answer_tags:
        *closed, _ = re.split(re.escape(close), text, flags=re.IGNORECASE)
        if closed:
            text = re.split(re.escape(opening), closed[-1], flags=re.IGNORECASE)[-1]
    return text


def plain_numbers(text: str) -> str:
    """Numbers with a hyphen for a minus sign, and without spaces between their thousands.

    >>> plain_numbers("−1 234")
    '-1234'
    """
    text = _MINUS.sub("-", text.translate(_FULL_WIDTH))
    return _SPACED.sub(lambda number: re.sub(r"\D", "", number.group()), text)


# An en dash is one before a digit alone: 3–5 is a range
_MINUS = re.compile(r"−|(?<![\w)}\]])[‐‑–](?=\\?[$.]?\d)")
#: of Chinese and Japanese texts: １８ for 18
_FULL_WIDTH = {0xFF01 + place: 0x21 + place for place in range(94)}
# Of TeX or Unicode: 1\,000\,000
_SPACED = re.compile(r"(?<![\d.])[1-9]\d{0,2}(?:(?:\\[,!: ]|[~ \u00a0\u2009\u202f])\d{3})+(?!\d)")
