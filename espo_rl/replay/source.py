"""Recorded rollouts on disk, as a replay reads them: in several processes, with a progress bar."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from espo_gateway.supervisor import die_with_parent
from espo_gateway.traces.judge import Survey, survey
from espo_gateway.traces.reader import Known, TraceError, Traces, itself, read_traces
from espo_rl.record.progress import progress_bar
from espo_rl.record.rollout_files import WORTH
from espo_rl.record.run_folder import rollout_files

#: Bytes of files up to which one process is done before others have started.
APART = 2**26
PROCESSES = min(len(os.sched_getaffinity(0)), 8)


class Source:
    """Recorded rollouts, read as often as needed, with a progress bar; what is done with them is
    done in as many processes as there are processors, where it is much.

    Raises:
        TraceError: naming the path that holds none.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        outcome: str,
        known: Known | None,
        without: NDArray[np.uint32] | None = None,
    ) -> None:
        """without: keys of prompts whose rollouts are left out."""
        self.files = [file for path in paths for file in files_in(path)]
        self._parts = partial(_parts, outcome=outcome, known=known, without=without)
        self.tokens = 0

    def read(self, work: Callable[[Traces], Any] = itself) -> Iterator[Any]:
        """What the work makes of each chunk of the rollouts, in their order."""
        self.tokens = 0
        with progress_bar() as bar:
            line = bar.add_task("reading files", total=len(self.files))
            for parts in self._files(work):
                for tokens, made in parts:
                    self.tokens += tokens
                    yield made
                bar.advance(line)

    def _files(self, work: Callable[[Traces], Any]) -> Iterator[Iterable[tuple[int, Any]]]:
        much = work is not itself and sum(file.stat().st_size for file in self.files) > APART
        if not much or len(self.files) == 1:
            yield from (self._parts(file, work) for file in self.files)
            return
        # A few more than there are processes, lest all that is made should wait in memory.
        files, ahead = iter(self.files), 2 * PROCESSES
        running = deque(_submit(self._parts, file, work) for file in islice(files, ahead))
        try:
            while running:
                yield running.popleft().result()
                running.extend(_submit(self._parts, file, work) for file in islice(files, 1))
        finally:
            for future in running:
                future.cancel()

    def survey(self) -> Survey:
        """What all of them carry."""
        return Survey.of(self.read(survey))

    def warnings(self) -> list[str]:
        """What makes the rollouts a mixture."""
        recipes = {note(schema, "espo.recipe") for schema in schemas_of(self.files)}
        if len(recipes) > 1:
            return [f"the rollouts are of {len(recipes)} recipes, judged as if they were of one"]
        return []


def _parts(
    file: Path,
    work: Callable[[Traces], Any],
    *,
    outcome: str,
    known: Known | None,
    without: NDArray[np.uint32] | None,
) -> Iterator[tuple[int, Any]]:
    for traces in read_traces([file], outcome=outcome, known=known):
        if without is not None:
            traces = traces.where(~np.isin(traces.keys, without))
        if len(traces):
            yield int(traces.lengths.sum()), work(traces)


def _listed(
    parts: Callable[..., Iterator[tuple[int, Any]]], file: Path, work: Callable[[Traces], Any]
) -> list[tuple[int, Any]]:
    return list(parts(file, work))


def _submit(*arguments: Any) -> Future[list[tuple[int, Any]]]:
    return processes().submit(_listed, *arguments)


@cache
def processes() -> ProcessPoolExecutor:
    """Those that share the work; they end with this one."""
    # Not forked: there are threads of libraries here.
    return ProcessPoolExecutor(
        PROCESSES,
        multiprocessing.get_context("spawn"),
        # Each holds both ends of its queue, so none would see that this one was killed.
        initializer=die_with_parent,
        initargs=(os.getpid(),),
    )


def files_in(path: Path) -> list[Path]:
    """A file, or the Parquet files of a run's folder or of its rollouts. Raises TraceError."""
    try:
        if not path.exists():
            raise TraceError(f"no file or folder {path}")
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error
    if files := rollout_files(path):
        return files
    raise TraceError(
        f"{path} holds no rollouts (*.parquet, or rollouts/*.parquet); a run writes them with "
        "logs.rollouts=true"
    )


def worth_of(files: Sequence[Path]) -> tuple[float, float]:
    """The rewards, of a wrong and a right answer, that V in these files is of; -1 and 1 where they
    do not say. Raises TraceError: it is of several."""
    valued = (schema for schema in schemas_of(files) if "values" in schema.names)
    said = {text for schema in valued if (text := note(schema, WORTH))}
    if len(said) > 1:
        raise TraceError(
            f"V is of different rewards in these files ({' and '.join(sorted(said))}): replay them "
            "apart, or say what all are of with --critic-worth"
        )
    wrong, right = json.loads(said.pop()) if said else (-1.0, 1.0)
    return wrong, right


def note(schema: pa.Schema, name: str) -> str | None:
    """What a dump says of itself under this name."""
    text = (schema.metadata or {}).get(name.encode())
    return None if text is None else text.decode()


def schemas_of(files: Iterable[Path]) -> Iterator[pa.Schema]:
    """Columns and notes of those that are dumps. Raises TraceError: one is none."""
    for file in files:
        if file.suffix != ".parquet":
            continue
        try:
            yield pq.read_schema(file)
        except (OSError, pa.ArrowException) as error:
            raise TraceError(f"{file} is no Parquet file, or damaged: {error}") from error
