"""The grader pool: what a bad grader costs, and what is left of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from espo_rl.config import RecipeError, TaskSection
from espo_rl.tasks.grader_pool import Grade, GraderPool
from espo_rl.types import Problem

TOLD = "tests.helpers.user_graders:as_told"
FINE = "fine"
ANSWER = Problem(id="1", prompt="?", answer=FINE)


def pool(grader: str = TOLD, **settings: Any) -> GraderPool:
    return GraderPool(TaskSection(grader=grader, **settings))


def workers(process: psutil.Process | None = None) -> list[psutil.Process]:
    """The pool's living processes."""
    children = (process or psutil.Process()).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


async def told(graders: GraderPool, *texts: str) -> list[Grade]:
    return await graders.grade([(text, ANSWER) for text in texts])


# -- grades ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "right", "wrong"),
    [
        ({"grader": "exact"}, "#18", "#17"),
        ({"grader": "math"}, r"\boxed{18.0}", r"\boxed{17}"),
        ({"grader": "regex", "pattern": "is (.*)"}, "it is 18.", "it is 17"),
        ({"grader": "tests.helpers.user_graders:right"}, "18", "17"),
        ({"grader": "tests.helpers.user_graders:right_later"}, "18", "17"),
        ({"grader": "tests.helpers.user_graders:with_a_client"}, "18", "17"),
    ],
)
async def test_grades_come_in_order(settings: dict[str, Any], right: str, wrong: str) -> None:
    answer = Problem(id="1", prompt="?", answer="18")
    async with pool(**settings) as graders:
        grades = await graders.grade([(right, answer), (wrong, answer)] * 20)
    assert grades == [Grade(1.0), Grade(0.0)] * 20
    assert [grade.correct for grade in grades[:2]] == [True, False]


async def test_a_gyms_own_scorer_gets_its_row() -> None:
    from espo_rl.tasks.kinds import make_task

    config = TaskSection(kind="reasoning-gym", name="chain_sum", grader="task")
    (one,) = make_task(config).held_out(1)
    async with GraderPool(config) as graders:
        right, part = await graders.grade([(one.answer, one), (f"it is {one.answer}", one)])
    assert right == Grade(1.0)
    assert part.score is not None
    assert 0.0 < part.score < 1.0
    assert not part.correct


async def test_exact_grades_need_no_process() -> None:
    async with pool("exact") as graders:
        assert (await told(graders, FINE)) == [Grade(1.0)]
        assert workers() == []


async def test_no_answers_no_grades() -> None:
    async with pool() as graders:
        assert await graders.grade([]) == []


def test_a_grader_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match=r"task\.grader"):
        pool("no_such_module:grade")


# -- bad graders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise", "raised PickyError: out of"),
        ("raise local", "raised LocalError: cannot be pickled"),
        ("exit", "raised SystemExit: enough"),
        ("interrupt", "raised KeyboardInterrupt"),
        ("die:7", "ended its process with code 7"),
        ("die:0", "ended its process with code 0"),
        ("segfault", f"ended its process with code {-signal.SIGSEGV}"),
    ],
)
async def test_a_failure_costs_one_grade(text: str, reason: str) -> None:
    async with pool() as graders:
        grades = await told(graders, *[FINE] * 5, text, *[FINE] * 5)
        assert grades[5].score is None
        assert not grades[5].correct
        assert grades[5].error.startswith(f"grader '{TOLD}' {reason}")
        assert [*grades[:5], *grades[6:]] == [Grade(1.0)] * 10
        assert await told(graders, FINE, "wrong") == [Grade(1.0), Grade(0.0)]


async def test_what_a_built_in_grader_fails_over_is_wrong() -> None:
    """Else a policy could learn to be spared by it. sympy compares no number with infinity less
    infinity."""
    infinite = Problem(id="1", prompt="", answer=r"\infty")
    async with pool("math") as graders:
        fails, right = await graders.grade(
            [(r"\boxed{\infty+1}", infinite), (r"\boxed{\infty}", infinite)]
        )
    assert (fails.score, right) == (0.0, Grade(1.0))
    assert fails.error.startswith("grader 'math' raised TypeError")


async def test_answers_are_read_where_they_are_graded() -> None:
    async with pool("math") as graders:
        assert graders.reads
        assert await graders.read(r"\boxed{0.5}", ANSWER) == "1/2"
    assert not pool().reads


@pytest.mark.slow
async def test_a_reader_that_hangs_is_killed() -> None:
    async with pool("regex", pattern="^((a|aa)+)$", grader_timeout=2.0) as graders:
        with pytest.raises(TimeoutError):
            await graders.read("a" * 100 + "b", ANSWER)
        assert await graders.read("aaa", ANSWER) == "aaa"


@pytest.mark.slow
@pytest.mark.parametrize("text", ["hang", "hang deaf"])
async def test_what_hangs_is_killed_and_is_wrong(text: str) -> None:
    async with pool(grader_timeout=2.0) as graders:
        grades = await told(graders, *[FINE] * 3, text, *[FINE] * 3)
        assert grades.pop(3) == Grade(
            0.0, f"grader '{TOLD}' took more than task.grader_timeout = 2 s"
        )
        assert grades == [Grade(1.0)] * 6


@pytest.mark.slow
async def test_more_hang_than_there_are_workers() -> None:
    async with pool(grader_timeout=2.0, grader_workers=2) as graders:
        grades = await told(graders, *["hang"] * 4, FINE)
    assert [grade.score for grade in grades] == [0.0] * 4 + [1.0]


@pytest.mark.slow
async def test_a_users_endless_pattern_hangs_no_run() -> None:
    config = TaskSection(grader="regex", pattern="^((a|aa)+)$", grader_timeout=2.0)
    async with GraderPool(config) as graders:
        endless, fine = await graders.grade(
            [("a" * 100 + "b", ANSWER), ("aaa", Problem(id="1", prompt="", answer="aaa"))]
        )
    assert "grader_timeout" in endless.error
    assert endless.score == 0.0
    assert fine == Grade(1.0)


async def test_a_row_that_cannot_be_sent_costs_one_grade() -> None:
    stuck = Problem(id="1", prompt="", answer=FINE, extra={"lock": threading.Lock()})
    async with pool() as graders:
        bad, fine = await graders.grade([(FINE, stuck), (FINE, ANSWER)])
    assert bad.score is None
    assert "pickle" in bad.error
    assert fine == Grade(1.0)


@pytest.mark.slow
async def test_idle_workers_that_are_killed_are_replaced() -> None:
    async with pool() as graders:
        assert await told(graders, FINE) == [Grade(1.0)]
        for _ in range(2):
            for worker in workers():
                worker.kill()
            assert await told(graders, *[FINE] * 8) == [Grade(1.0)] * 8


async def test_what_waits_in_a_pool_that_is_given_up_is_graded_in_another() -> None:
    """More than a pipe to the workers holds, so that most of it waits in the pool."""
    long = "18" * 15_000
    answer = Problem(id="1", prompt="?", answer=long)
    async with pool("tests.helpers.user_graders:right") as graders:
        assert await graders.grade([(long, answer)]) == [Grade(1.0)]
        for worker in workers():
            worker.kill()
        assert await graders.grade([(long, answer)] * 128) == [Grade(1.0)] * 128


# -- what is left ----------------------------------------------------------------------------------


async def test_no_process_is_left_by_the_context() -> None:
    async with pool() as graders:
        await told(graders, FINE)
        mine = workers()
        assert len(mine) == 2
    assert not psutil.wait_procs(mine, timeout=60.0)[1]


async def test_leaving_in_the_middle_ends_the_workers() -> None:
    async with pool(grader_timeout=1000.0, grader_workers=3) as graders:
        hanging = asyncio.create_task(told(graders, "hang", "hang deaf"))
        # The second is asked for after the hanging ones, so those have begun when it is graded.
        for _ in range(2):
            await told(graders, FINE)
        mine = workers()
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
    assert len(mine) == 3
    assert not psutil.wait_procs(mine, timeout=60.0)[1]


async def test_ctrl_c_while_workers_start_is_not_for_them(capfd: pytest.CaptureFixture) -> None:
    async with pool() as graders:
        grading = asyncio.create_task(told(graders, FINE))
        while not (begun := workers()):  # noqa: ASYNC110 (the loop's next turn is the event)
            await asyncio.sleep(0)
        for worker in begun:
            worker.send_signal(signal.SIGINT)
        assert await grading == [Grade(1.0)]
        assert set(begun) <= set(workers())
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
async def test_a_killed_graders_own_processes_die_with_it(tmp_path: Path) -> None:
    async with pool(grader_timeout=3.0) as graders:
        (grade,) = await told(graders, f"child:{tmp_path / 'pid'}")
        assert "grader_timeout" in grade.error
        assert gone(int((tmp_path / "pid").read_text()))


def gone(pid: int) -> bool:
    """Whether a process ends within a minute."""
    try:
        return not psutil.wait_procs([psutil.Process(pid)], timeout=60.0)[1]
    except psutil.NoSuchProcess:
        return True


# -- a whole program -------------------------------------------------------------------------------

PROGRAM = """
import asyncio, sys, time
from espo_rl.config import TaskSection
from espo_rl.tasks.grader_pool import GraderPool
from espo_rl.types import Problem

print("program starts", file=sys.stderr)

async def main(texts):
    settings = TaskSection(grader="tests.helpers.user_graders:as_told", grader_timeout=1000.0)
    async with GraderPool(settings) as graders:
        answers = [(text, Problem(id="1", prompt="", answer="fine")) for text in texts]
        grading = asyncio.create_task(graders.grade(answers[:-1]))
        for _ in range(2):  # the second comes after the others
            (last,) = await graders.grade(answers[-1:])
        print("graded", last.score, flush=True)
        await grading

if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


class Program:
    """A script of its own process group, as a terminal would start it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "program.py"
        self.path.write_text(PROGRAM)

    def start(self, *texts: str) -> subprocess.Popen[str]:
        paths = os.pathsep.join(sys.path)
        self.process = subprocess.Popen(
            [sys.executable, str(self.path), *texts],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        return self.process


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path)
    yield program
    if program.process.poll() is None:
        program.process.kill()
        program.process.wait()


@pytest.mark.slow
def test_workers_run_no_line_of_the_program_and_write_no_line_of_its_output(
    program: Program,
) -> None:
    out, errors = program.start("say", "fine", "fine").communicate()
    assert out == "graded 1.0\n"
    assert sorted(errors.splitlines()) == ["a grader's chatter", "program starts"]


@pytest.mark.slow
def test_ctrl_c_is_the_parents_alone(program: Program) -> None:
    process = program.start("hang", "fine")
    assert process.stdout is not None
    assert process.stdout.readline() == "graded 1.0\n"
    mine = workers(psutil.Process(process.pid))
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate()
    assert (out, errors) == ("interrupted\n", "program starts\n")
    assert len(mine) == 2
    assert not psutil.wait_procs(mine, timeout=60.0)[1]


@pytest.mark.slow
def test_a_killed_parent_leaves_no_worker(program: Program) -> None:
    process = program.start("hang deaf", "fine")
    assert process.stdout is not None
    assert process.stdout.readline() == "graded 1.0\n"
    mine = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert len(mine) >= 2
    assert not psutil.wait_procs(mine, timeout=60.0)[1]
