"""Tasks of every kind: which problems come, in what order; and the arithmetic one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from espo_rl.config import TaskSection
from espo_rl.tasks.arithmetic import HELD_OUT, Arithmetic
from espo_rl.tasks.graders import exact
from espo_rl.tasks.kinds import make_task
from espo_rl.tasks.task import TaskError
from tests.helpers.tasks import first, gym_of, numbered, prompts, task_of, write_rows

pytestmark = pytest.mark.usefixtures("own_cache")


# -- arithmetic ------------------------------------------------------------------------------------


def test_arithmetic_solutions_are_right_and_of_the_wished_lengths() -> None:
    task, rng = Arithmetic(), random.Random(0)
    assert task.solution("358c") == "c3+8=1b5+1=6a8+6=4#164"
    for _ in range(300):
        problem = task.problem(rng)
        steps = ord(problem.prompt[3]) - ord("a") + 1
        assert 2 <= steps <= 24
        assert exact(task.solution(problem.prompt), problem.answer)


def test_arithmetic_keeps_to_the_numbers_of_steps_it_is_given() -> None:
    problems = make_task(TaskSection(steps=[2, 2, 24])).held_out(600)
    drawn = [ord(problem.prompt[3]) - ord("a") + 1 for problem in problems]
    assert {*drawn} == {2, 24}
    assert drawn.count(2) / 600 == pytest.approx(2 / 3, abs=0.06)


def test_no_more_are_held_out_than_are_never_trained_on() -> None:
    assert len(Arithmetic().held_out(HELD_OUT)) == HELD_OUT
    with pytest.raises(TaskError, match=r"1,024 problems, not 1,025: lower evaluation\.problems"):
        Arithmetic().held_out(HELD_OUT + 1)


def slip_at(at: int, by: int) -> Callable[[int, int], int]:
    """Misses a single sum: the one after `at` right ones."""
    misses = iter([0] * at + [by] + [0] * 24)
    return lambda oldest, newest: next(misses)


def test_one_slip_always_spoils_the_answer() -> None:
    task = Arithmetic()
    for at in range(24):
        for by in range(1, 10):
            slipped = task.solution("358x", slip_at(at, by))
            assert slipped.split("#")[1] != task.solution("358x").split("#")[1]


# -- every kind ------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Callable[[str], Any]:
    """A task of each kind with so few problems that both sides would meet."""

    def make(kind: str) -> Any:
        if kind == "arithmetic":
            return Arithmetic(2, 3)
        if kind == "reasoning-gym":
            return gym_of("chain_sum", options={"max_terms": 2, "max_digits": 1})
        return task_of(train=write_rows(tmp_path / "data.jsonl", numbered(20)))

    return make


KINDS = ("arithmetic", "dataset", "reasoning-gym")


def test_a_kind_that_is_none() -> None:
    with pytest.raises(TaskError, match=r"task\.kind.*did you mean dataset.*reasoning-gym"):
        make_task(TaskSection(kind="datset"))


@pytest.mark.parametrize("kind", KINDS)
def test_training_problems_repeat_by_seed(small: Callable[[str], Any], kind: str) -> None:
    stream = first(small(kind), 200, seed=3)
    assert stream == first(small(kind), 200, seed=3)
    assert stream != first(small(kind), 200, seed=4)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_problems_are_never_trained_on(small: Callable[[str], Any], kind: str) -> None:
    task = small(kind)
    trained = {problem.prompt for seed in range(3) for problem in first(task, 300, seed)}
    held_out = prompts(task.held_out(100))
    assert held_out
    assert not trained & set(held_out)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_held_out_problems_are_the_first_of_more(
    small: Callable[[str], Any], kind: str
) -> None:
    assert small(kind).held_out(2) == small(kind).held_out(50)[:2]
    task = small(kind)
    assert (task.held_out(50)[:2], len(task.held_out(2))) == (task.held_out(2), 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_template_goes_around_the_problem(
    small: Callable[[str], Any], kind: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "arithmetic": {},
        "dataset": {"train": write_rows(tmp_path / "data.jsonl", numbered(20))},
        "reasoning-gym": {"name": "chain_sum"},
    }[kind]
    fields, template = {"kind": kind, **settings}, "{x} {problem}\n\\boxed{}"
    plain = make_task(TaskSection.model_validate(fields))
    task = make_task(TaskSection.model_validate({**fields, "template": template}))
    for bare, wrapped in (
        (plain.held_out(1)[0], task.held_out(1)[0]),
        (next(plain.training(0)), next(task.training(0))),
    ):
        assert wrapped.prompt == f"{{x}} {bare.prompt}\n\\boxed{{}}"
        assert (wrapped.id, wrapped.answer) == (bare.id, bare.answer)
