"""Classes that a user might give as --critic."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar, Self

made: list[Good] = []


class Good:
    """V is low once the stream has eight tokens."""

    def __init__(self) -> None:
        self.open = False
        self.left = False
        made.append(self)

    async def __aenter__(self) -> Self:
        self.open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self.open, self.left = False, True

    async def value(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        assert self.open
        assert prompt_token_ids == [1, 2, 3]
        return 0.0 if len(token_ids) == 10 else 100.0


class Plain:
    async def value(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        return 0.0


class Hanging:
    """Until it is told not to."""

    hangs = True
    running = 0

    async def value(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        self.running += 1
        try:
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            self.running -= 1
        return 0.0


class Raising:
    async def value(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        raise RuntimeError("out of memory")


class NotANumber:
    async def value(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        return float("nan")


class Crowded:
    """Counts how many calls run at once."""

    running: ClassVar[int] = 0
    most: ClassVar[int] = 0

    async def value(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        Crowded.running += 1
        Crowded.most = max(Crowded.most, Crowded.running)
        await asyncio.sleep(0)
        Crowded.running -= 1
        return 0.5


class Needy:
    def __init__(self, model: str) -> None:
        self.model = model


class Synchronous:
    def value(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        return 0.0


class Unopened(Plain):
    async def __aenter__(self) -> Self:
        raise OSError("no such model")

    async def __aexit__(self, *_: object) -> None:
        pass
