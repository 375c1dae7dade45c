"""Runs graders where they can do no harm: in processes that a timeout kills.

Owns those processes. A grader that raises or takes its process down costs the grade at hand, which
says why; never the others, and never the run. An answer that it hangs over is wrong.

    async with GraderPool(recipe.task) as graders:
        grades = await graders.grade([(rollout.text, rollout.problem), ...])
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import TimeoutError as WorkerTimeout
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Self

from pebble import ProcessExpired, ProcessPool

from espo_gateway.supervisor import PR_SET_PDEATHSIG
from espo_rl.config import TaskSection
from espo_rl.tasks.graders import Grader, make_grader
from espo_rl.types import Problem


@dataclass(frozen=True)
class Grade:
    """A score in [0, 1], or None with the reason why there is none.

    An answer over which the grader hung is wrong: its score is 0, and the error says so.
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
        if name == "exact":
            return Grade(float(self._here(completion, problem)))
        for _ in range(2):
            try:
                pool = self._running_pool()
                future = asyncio.wrap_future(
                    pool.schedule(_grade, (completion, problem), timeout=timeout)
                )
                try:
                    # What waits in a pool that is given up is told nothing.
                    while not (await asyncio.wait({future}, timeout=LOOK))[0]:
                        if not pool.active:
                            raise RuntimeError("lost its processes")
                    score, error = await future
                finally:
                    future.cancel()
            except RuntimeError as broken:  # the pool, by another's fault: once more, in a new one
                score, error = None, str(broken)
                continue
            except WorkerTimeout:
                # Not to be sampled again, or a policy could learn to be spared by what hangs.
                score, error = 0.0, f"took more than task.grader_timeout = {timeout:g} s"
            except ProcessExpired as expired:
                code = expired.exitcode if expired.exitcode != _Worker.ENDED else 0
                score, error = None, f"ended its process with code {code}"
            except Exception as failed:  # of sending the problem's row to the worker
                score, error = None, f"{type(failed).__name__}: {failed}"
            break
        return Grade(score, error and f"grader {name!r} {error}")

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


def _begin(config: TaskSection, parent: int) -> None:
    global _grader
    os.setpgid(0, 0)
    if sys.platform == "linux":  # however the parent ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(0)
    os.dup2(2, 1)  # what a grader prints is no output of the run
    _grader = make_grader(config)


def _grade(completion: str, problem: Problem) -> tuple[float | None, str]:
    try:
        return float(_grader(completion, problem)), ""
    # sys.exit() too; and as text: an exception that cannot be pickled would break the pool.
    except BaseException as error:
        return None, f"raised {type(error).__name__}: {error}"
