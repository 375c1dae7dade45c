"""Graders as users write them, well and badly; for `task.grader = "module:function"`."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

A_CONSTANT = 3
Row = Mapping[str, Any]


def right(completion: str, answer: str, extra: Row) -> bool:
    return completion == answer


async def right_later(completion: str, answer: str, extra: Row) -> bool:
    await asyncio.sleep(0)
    return completion == answer


def right_as_numpy(completion: str, answer: str, extra: Row) -> Any:
    return np.str_(completion) == np.str_(answer)


def half(completion: str, answer: str, extra: Row) -> float:
    return 0.5


def from_the_row(completion: str, answer: str, extra: Row) -> float:
    return extra["worth"]


def none(completion: str, answer: str, extra: Row) -> None:
    pass


def two(completion: str, answer: str, extra: Row) -> int:
    return 2


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
        case "die":
            os._exit(7)
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
