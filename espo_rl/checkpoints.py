"""Checkpoints: whole, atomic, rotating. A folder counts only under its final name.

`step-00000020/` holds the engines' state and `loop.pkl`; it is written as `step-00000020.tmp` and
renamed once complete, so a kill at any moment leaves the last whole one.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espo_gateway.files import written_whole

#: of loop.pkl; raised whenever a class that it holds moves, or gets fields without a default
FORMAT = 5


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

    def has(self, step: int) -> bool:
        """Whether there is one of this step."""
        return self._path(step).exists()

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, loop_state: Any, save_models: Callable[[Path], None]) -> Path:
        """Write a checkpoint after `step` steps; drop the oldest beyond `keep`, and later steps."""
        final = self._path(step)
        try:
            with written_whole(final, fsync=True) as scratch:
                scratch.mkdir(parents=True)
                save_models(scratch)
                with open(scratch / "loop.pkl", "wb") as file:
                    pickle.dump(FORMAT, file)
                    pickle.dump(loop_state, file)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
            raise CheckpointError(
                f"cannot write checkpoint {final}: {getattr(error, 'strerror', None) or error}; "
                "free space or change run.output"
            ) from error
        self.drop_after(step)
        for old in sorted(self.folder.glob("step-????????"))[: -self.keep]:
            _remove(old)
        return final

    def drop_after(self, step: int) -> None:
        """Remove those of later steps: they are of a run that was here before, or went on from
        elsewhere; and what a kill left half written, or half removed.

        Raises:
            CheckpointError: one cannot be removed.
        """
        later = [path for path in self.folder.glob("step-????????") if path > self._path(step)]
        for path in [*self.folder.glob("step-????????.tmp"), *later]:
            _remove(path)

    @staticmethod
    def read(checkpoint: Path) -> Any:
        """The loop's state alone, without the models; raises as `load` does."""
        return CheckpointStore.load(checkpoint, lambda folder: None)

    @staticmethod
    def load(checkpoint: Path, load_models: Callable[[Path], None]) -> Any:
        """Read a checkpoint: the models in place, the loop's state returned.

        Raises:
            CheckpointError: it is damaged, not there, or another version's.
        """
        try:
            loop_state = _read_state(checkpoint)
            load_models(checkpoint)
        except CheckpointError:
            raise
        except Exception as error:  # damaged pickles raise nearly anything
            raise CheckpointError(
                f"cannot read checkpoint {checkpoint}: {type(error).__name__}: {error}; "
                "resume from another checkpoint, or start without --resume"
            ) from error
        return loop_state


def _remove(path: Path) -> None:
    """Under a name that counts for nothing: a kill meanwhile leaves no half of a checkpoint."""
    try:
        shutil.rmtree(path.rename(path.with_suffix(".tmp")))
    except OSError as error:
        raise CheckpointError(
            f"cannot remove checkpoint {path}: {error.strerror or error}; remove it yourself"
        ) from error


def _read_state(checkpoint: Path) -> Any:
    """What loop.pkl holds after its format. Raises CheckpointError when it is another version's."""
    with open(checkpoint / "loop.pkl", "rb") as file:
        try:
            if pickle.load(file) == FORMAT:
                return pickle.load(file)
            reason = ""
        except (ImportError, AttributeError) as error:  # a class is not where it was
            reason = f" ({error})"
    raise CheckpointError(
        f"checkpoint {checkpoint} was written by another version of espo, not in this one's format "
        f"{FORMAT}{reason}: go on with the version that wrote it, resume from another checkpoint, "
        "or start without --resume"
    )
