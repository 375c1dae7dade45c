"""Recorded rollouts on disk, as a replay reads them: in several processes, with a progress bar."""

from __future__ import annotations

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
from numpy.typing import NDArray

from espo_gateway.traces.judge import Survey, survey
from espo_gateway.traces.reader import Known, TraceError, Traces, itself, read_traces
from espo_rl.record.progress import progress_bar
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
        recipes = {recipe_of(file) for file in self.files if file.suffix == ".parquet"}
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
    return ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn"))


def files_in(path: Path) -> list[Path]:
    """A file, or the Parquet files of a run's folder or of its rollouts. Raises TraceError."""
    if not path.exists():
        raise TraceError(f"no file or folder {path}")
    if files := rollout_files(path):
        return files
    raise TraceError(
        f"{path} holds no rollouts (*.parquet, or rollouts/*.parquet); a run writes them with "
        "logs.rollouts=true"
    )


def recipe_of(file: Path) -> str | None:
    """The hash of the recipe that a dump was made by."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = pq.read_schema(file).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise TraceError(f"{file} is no Parquet file, or damaged: {error}") from error
    recipe = about.get(b"espo.recipe")
    return recipe.decode() if recipe else None
