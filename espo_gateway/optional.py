"""Libraries that only some commands need, or that only make things faster."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def needed(module: str, extra: str = "calibrate") -> ModuleType:
    """Import a module. Raises ImportError that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{package} is needed and not installed; pip install 'espo[{extra}]'"
        ) from error


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, on uvloop's event loop where it is installed."""
    try:
        uvloop = import_module("uvloop")
    except ImportError:
        return asyncio.run(coroutine)
    return uvloop.run(coroutine)
