"""The event loop that the gateway runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, on uvloop's event loop where it is installed."""
    try:
        uvloop = import_module("uvloop")
    except ImportError:
        return asyncio.run(coroutine)
    return uvloop.run(coroutine)
