"""Runs graders where they can do no harm: in processes that a timeout kills.

Owns those processes. A grader that raises or takes its process down costs the grade at hand, which
says why; never the others, and never the run. An answer that it hangs over is wrong, and so is one
that a built-in grader fails over: it is the answer's doing.

    async with GraderPool(recipe.task) as graders:
        grades = await graders.grade([(rollout.text, rollout.problem), ...])
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import TimeoutError as WorkerTimeout
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Self, cast

from pebble import ProcessExpired, ProcessPool

from espo_gateway.supervisor import die_with_parent
from espo_rl.config import TaskSection
from espo_rl.tasks.graders import AnswerReader, Grader, make_answer_reader, make_grader
from espo_rl.types import Problem


@dataclass(frozen=True)
class Grade:
    """A score in [0, 1], or None with the reason why there is none.

    An answer over which the grader hung, or a built-in one failed, is wrong: its score is 0, and
    the error says so.
    """

    score: float | None
    error: str = ""

    @property
    def correct(self) -> bool:
        """Whether the score is a full one; partial credit is none."""
        return self.score == 1.0


#: seconds between two looks at whether the pool still works
LOOK = 1.0


class GraderPool:
    """Grades completions, `task.grader_workers` at a time, each within `task.grader_timeout`.

    "exact" is graded here and now; all other graders run in worker processes, which start at the
    first grade and end with this context.

    Raises:
        RecipeError: the grader cannot be made.
    """

    def __init__(self, config: TaskSection) -> None:
        self._config = config
        self._here = make_grader(config)  # also tells at once whether it can be
        self._reader = make_answer_reader(config)
        self._pool = self._make_pool()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._pool.stop()
        self._pool.join()

    async def grade(self, answers: Iterable[tuple[str, Problem]]) -> list[Grade]:
        """Grades of (completion, problem) pairs, in their order."""
        return await asyncio.gather(*(self._grade(*answer) for answer in answers))

    async def _grade(self, completion: str, problem: Problem) -> Grade:
        name, timeout = self._config.grader, self._config.grader_timeout
        failed_over = None if ":" in name else 0.0
        if name == "exact":
            return Grade(float(self._here(completion, problem)))
        try:
            score, error = await self._in_worker(_grade, completion, problem)
            score = failed_over if score is None else score
        except WorkerTimeout:
            # Not to be sampled again, or a policy could learn to be spared by what hangs.
            score, error = 0.0, f"took more than task.grader_timeout = {timeout:g} s"
        except ProcessExpired as expired:
            code = expired.exitcode if expired.exitcode != _Worker.ENDED else 0
            score, error = failed_over, f"ended its process with code {code}"
        except _BrokenPoolError as broken:
            score, error = None, str(broken)
        except Exception as failed:  # of sending the problem's row to the worker
            score, error = None, f"{type(failed).__name__}: {failed}"
        return Grade(score, error and f"grader {name!r} {error}")

    @property
    def reads(self) -> bool:
        """Whether it knows how answers are read that are to vote."""
        return self._reader is not None

    async def read(self, completion: str, problem: Problem) -> str | None:
        """The answer that a completion gives, which may take as long as a grade; None: it gives
        none. Raises what the reader, or its process, does."""
        if self._reader is not None and self._config.grader == "exact":
            return self._reader(completion, problem)
        return cast(str | None, await self._in_worker(_read, completion, problem))

    async def _in_worker(self, work: Callable[[str, Problem], Any], *answer: Any) -> Any:
        """What a worker's function gives, within the grader's time."""
        broken = ""
        for _ in range(2):
            try:
                pool = self._running_pool()
                future = asyncio.wrap_future(
                    pool.schedule(work, answer, timeout=self._config.grader_timeout)
                )
                try:
                    # What waits in a pool that is given up is told nothing.
                    while not (await asyncio.wait({future}, timeout=LOOK))[0]:
                        if not pool.active:
                            raise RuntimeError("lost its processes")
                    return await future
                finally:
                    future.cancel()
            except RuntimeError as error:  # the pool, by another's fault: once more, in a new one
                broken = str(error)
        raise _BrokenPoolError(broken)

    def _make_pool(self) -> ProcessPool:
        return ProcessPool(
            self._config.grader_workers,
            initializer=_begin,
            initargs=(self._config, os.getpid()),
            context=_Context(),
        )

    def _running_pool(self) -> ProcessPool:
        # pebble gives a pool up when a worker dies that has nothing to do.
        if not self._pool.active:
            self._pool.stop()
            self._pool.join()
            self._pool = self._make_pool()
        return self._pool


class _BrokenPoolError(Exception):
    """The pool was given up twice, by the fault of others."""


class _Worker(SpawnProcess):
    """A spawned process that begins with nothing of its parent's, and whose end is that of all
    processes that its grader has started.
    """

    ENDED = 256  # above the codes that there are
    _one_at_a_time = threading.Lock()

    @property
    def exitcode(self) -> int | None:
        # pebble would wait for the answer of one that ended with 0, until it takes it for a hang.
        code = super().exitcode
        return self.ENDED if code == 0 else code

    def start(self) -> None:
        # By itself it would import the parent's main module, and with it torch: seconds and half a
        # gigabyte a worker. And it is born with Ctrl-C blocked: that is for the parent.
        with self._one_at_a_time:
            main = sys.modules["__main__"]
            spec, file = main.__spec__, getattr(main, "__file__", None)
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            main.__spec__ = main.__file__ = None
            try:
                super().start()
            finally:
                main.__spec__, main.__file__ = spec, file
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def terminate(self) -> None:
        assert self.pid is not None
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # not yet a group of its own
            super().kill()


class _Context(SpawnContext):
    Process = _Worker


# -- in a worker -----------------------------------------------------------------------------------

_grader: Grader
_reader: AnswerReader | None


def _begin(config: TaskSection, parent: int) -> None:
    global _grader, _reader
    os.setpgid(0, 0)
    die_with_parent(parent)
    os.dup2(2, 1)  # what a grader prints is no output of the run
    _grader, _reader = make_grader(config), make_answer_reader(config)


def _read(completion: str, problem: Problem) -> str | None:
    assert _reader is not None
    try:
        return _reader(completion, problem)
    except BaseException as error:  # as text: see below
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _grade(completion: str, problem: Problem) -> tuple[float | None, str]:
    try:
        return float(_grader(completion, problem)), ""
    # sys.exit() too; and as text: an exception that cannot be pickled would break the pool.
    except BaseException as error:
        return None, f"raised {type(error).__name__}: {error}"
