"""The text of single tokens, whatever pieces a tokenizer makes of characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from espo_rl.record.run_folder import RunFolder


def load_tokenizer(run: RunFolder) -> Any | None:
    """The tokenizer of a run's policy: of its own checkpoint, else of the recipe's model.

    Nothing is downloaded. None where there is none here, or one without a fast implementation.
    """
    from transformers import AutoTokenizer

    for place in (run.path / "actor", run.setting("model", "path")):
        if place is None or (isinstance(place, Path) and not place.is_dir()):
            continue
        try:
            loaded = AutoTokenizer.from_pretrained(str(place), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError, ImportError):
            continue  # what a broken or absent checkpoint raises differs by its kind
        return getattr(loaded, "backend_tokenizer", None)
    return None


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str | None]:
    """What each token adds to the text, [tokens]; special tokens by their names.

    Byte-level tokens can be parts of a character: the character is the text of its last token, and
    the others have None.
    """
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer, token) for token in token_ids]


class Pieces:
    """Texts that occur often, each kept once: a report's tokens are numbers into it."""

    def __init__(self) -> None:
        self._numbers: dict[str | None, int] = {}

    def numbers(self, texts: Iterable[str | None]) -> list[int]:
        """The texts' numbers."""
        return [self._numbers.setdefault(text, len(self._numbers)) for text in texts]

    @property
    def texts(self) -> list[str | None]:
        """By number."""
        return list(self._numbers)
