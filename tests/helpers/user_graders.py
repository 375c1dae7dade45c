"""Graders as users write them, well and badly; for `task.grader = "module:function"`."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np

A_CONSTANT = 3
Row = Mapping[str, Any]


def right(completion: str, answer: str, extra: Row) -> bool:
    return completion == answer


async def right_later(completion: str, answer: str, extra: Row) -> bool:
    await asyncio.sleep(0)
    return completion == answer


class Client:
    """As of an HTTP library: of the loop on which it was first used, which must not be closed."""

    loop: asyncio.AbstractEventLoop | None = None
    lock: asyncio.Lock

    async def ask(self) -> None:
        if self.loop is None:
            self.loop, self.lock = asyncio.get_running_loop(), asyncio.Lock()
        if self.loop is not asyncio.get_running_loop():
            raise RuntimeError("Event loop is closed")
        async with self.lock:
            await asyncio.sleep(0)


CLIENT = Client()


async def with_a_client(completion: str, answer: str, extra: Row) -> bool:
    await CLIENT.ask()
    return completion == answer


class Later:
    """Neither a coroutine nor a future, but awaitable."""

    def __init__(self, score: bool) -> None:
        self.score = score

    def __await__(self) -> Generator[Any, None, bool]:
        yield from asyncio.sleep(0).__await__()
        return self.score


def by_a_future(completion: str, answer: str, extra: Row) -> Later:
    return Later(completion == answer)


def right_as_numpy(completion: str, answer: str, extra: Row) -> Any:
    return np.str_(completion) == np.str_(answer)


def half(completion: str, answer: str, extra: Row) -> float:
    return 0.5


def ten_tenths(completion: str, answer: str, extra: Row) -> float:
    return sum([0.1] * 10) if completion == answer else 0.1 + 0.2 - 0.3 - 1e-12


def three_thirds(completion: str, answer: str, extra: Row) -> float:
    return sum([0.1] * 3) / 0.3 if completion == answer else 0.1 + 0.2


def from_the_row(completion: str, answer: str, extra: Row) -> float:
    return extra["worth"]


def none(completion: str, answer: str, extra: Row) -> None:
    pass


def two(completion: str, answer: str, extra: Row) -> int:
    return 2


def one_as_text(completion: str, answer: str, extra: Row) -> str:
    return "1"


def one_as_bytes(completion: str, answer: str, extra: Row) -> bytes:
    return b"1"


def nan(completion: str, answer: str, extra: Row) -> float:
    return float("nan")


def one_argument(completion: str) -> bool:
    return True


class PickyError(Exception):
    """Cannot be unpickled: its arguments are not those that it was made with."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def as_told(completion: str, answer: str, extra: Row) -> bool:
    """Does what the completion says."""
    match completion.split(":")[0]:
        case "hang":
            threading.Event().wait()
        case "hang deaf":
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            threading.Event().wait()
        case "raise":
            raise PickyError("out of", "chalk")
        case "raise local":

            class LocalError(Exception):
                pass

            raise LocalError("cannot be pickled")
        case "exit":
            sys.exit("enough")
        case "interrupt":
            raise KeyboardInterrupt
        case "die":  # with this code
            os._exit(int(completion.split(":")[1]))
        case "segfault":
            ctypes.string_at(0)
        case "say":
            print("a grader's chatter")
        case "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
            with open(completion.split(":")[1], "w") as file:
                file.write(str(child.pid))
            child.wait()
    return completion == answer
