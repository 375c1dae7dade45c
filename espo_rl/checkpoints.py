"""Checkpoints: whole, atomic, rotating. A folder counts only under its final name.

`step-00000020/` holds the engines' state and `loop.pkl`; it is written as `step-00000020.tmp` and
renamed once complete, so a kill at any moment leaves the last whole one.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says what to change."""


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run.

    Only load checkpoints you trust: like DeepSpeed's own, they are pickles.
    """

    folder: Path
    keep: int = 2

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        found = sorted(self.folder.glob("step-????????"))
        return found[-1] if found else None

    def save(self, step: int, loop_state: Any, save_models: Callable[[Path], None]) -> Path:
        """Write a checkpoint after `step` steps and drop the oldest beyond `keep`."""
        final = self.folder / f"step-{step:08d}"
        scratch = final.with_suffix(".tmp")
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            save_models(scratch)
            with open(scratch / "loop.pkl", "wb") as file:
                pickle.dump(loop_state, file)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            scratch.rename(final)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise CheckpointError(
                f"cannot write checkpoint {final}: {error.strerror or error}; free space or "
                "change run.output"
            ) from error
        for old in sorted(self.folder.glob("step-????????"))[: -self.keep]:
            shutil.rmtree(old)
        return final

    @staticmethod
    def load(checkpoint: Path, load_models: Callable[[Path], None]) -> Any:
        """Read a checkpoint: the models in place, the loop's state returned."""
        try:
            loop_state = pickle.loads((checkpoint / "loop.pkl").read_bytes())
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(f"cannot read checkpoint {checkpoint}: {error}") from error
        load_models(checkpoint)
        return loop_state
