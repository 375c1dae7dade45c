"""Libraries that only some commands need."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def needed(module: str, extra: str = "calibrate") -> ModuleType:
    """Import a module. Raises ImportError that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{package} is needed and not installed; in the repository: pip install '.[{extra}]'"
        ) from error
