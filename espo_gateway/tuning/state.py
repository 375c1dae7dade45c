"""What tuning has learnt, kept in a file: read when a gateway starts, written after each step."""

from __future__ import annotations

import dataclasses
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from espo_gateway.errors import InvalidRequest, said
from espo_gateway.files import written_whole
from espo_gateway.stop.gate_json import gate_from_json, gate_to_json
from espo_gateway.tuning.tuner import Phase, Tuning

log = logging.getLogger(__name__)

_VERSION = 1


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    phase: Phase
    finished: int
    share: float | None
    #: None: a choice that no β would stop
    levels: list[float | None]
    gate: msgspec.Raw


class StateFile:
    """One gateway's state; written by a thread of its own, as a disk may be slow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="espo-state")

    def load(self, tuning: Tuning, *, has_critic: bool) -> None:
        """Take up what the file has; nothing when there is none.

        Raises InvalidRequest naming the file and the fix.
        """

        def refused(problem: str) -> InvalidRequest:
            return InvalidRequest(
                f"state: {self.path} {problem}; delete it to learn anew", param="state"
            )

        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise refused(f"cannot be read: {error.strerror}") from error
        try:
            version = msgspec.json.decode(data, type=dict[str, Any]).get("version")
            if version != _VERSION:
                raise refused(f"is of version {version!r}, and this gateway reads {_VERSION}")
            saved = msgspec.json.decode(data, type=_Saved)
            gate = gate_from_json(bytes(saved.gate), has_critic=has_critic)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise refused(f"is damaged, or no state: {error}") from error
        except InvalidRequest as error:
            if error.param == "state":
                raise
            raise refused(f"has a bad gate: {error}") from error
        learnt = {name: getattr(gate, name) for name in ("version", "statistics", "beta")}
        if dataclasses.replace(tuning.judging, **learnt) != gate:
            raise refused(
                f"was learnt for rule {gate.rule!r} with other constants than the gate's "
                f"(rule {tuning.judging.rule!r}); start with the gate it was learnt with"
            )
        tuning.judging, tuning.phase = gate, saved.phase
        tuning.finished, tuning.share = saved.finished, saved.share
        tuning.levels = [math.inf if level is None else level for level in saved.levels]

    def save(self, tuning: Tuning) -> None:
        """Write it soon; an error goes to the log."""
        saved = _Saved(
            version=_VERSION,
            phase=tuning.phase,
            finished=tuning.finished,
            share=tuning.share,
            levels=[level if math.isfinite(level) else None for level in tuning.levels],
            gate=msgspec.Raw(gate_to_json(tuning.judging)),
        )
        self._writer.submit(self._write, msgspec.json.encode(saved))

    def close(self) -> None:
        """Wait for what is still to be written."""
        self._writer.shutdown(wait=True)

    def _write(self, data: bytes) -> None:
        try:
            with written_whole(self.path, fsync=True) as scratch:
                scratch.write_bytes(data)
        except OSError as error:
            log.error("state: cannot write %s: %s; going on without", self.path, said(error))
