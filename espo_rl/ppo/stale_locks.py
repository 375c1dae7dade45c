"""Locks of builds that were killed, for whose release torch would wait for ever.

DeepSpeed builds an extension when it is first used, and loads it at every start; while torch does
so it holds a lock that is a mere file (`torch.utils.file_baton`), which outlives its process.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

log = logging.getLogger(__name__)

#: Seconds from which on a lock that no process here holds is not one of another machine that
#: shares the folder: it holds it while it builds.
PATIENCE = 60.0


def remove_stale_locks() -> None:
    """Remove those in torch's folder of extensions; waits until they are old enough."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        _remove_if_stale(lock)


def _remove_if_stale(lock: Path) -> None:
    while not _held(lock):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if age >= PATIENCE:
            log.warning("removed %s, which a build that was killed has left", lock)
            lock.unlink(missing_ok=True)
            return
        time.sleep(0.2)


def _held(lock: Path) -> bool:
    """Whether a process of this machine has it open, as far as one may look."""
    for file in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.path.samefile(file, lock):
                return True
        except OSError:  # it has ended, or is another user's
            continue
    return False
