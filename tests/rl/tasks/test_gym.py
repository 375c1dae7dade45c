"""Problems that reasoning-gym makes."""

from __future__ import annotations

from typing import Any

import pytest

from espo_rl.tasks.task import TaskError
from tests.helpers.tasks import first, gym_of, prompts


def test_gym_problems_are_its_rows() -> None:
    task = gym_of("leg_counting", options={"max_animals": 4})
    problems = [*first(task, 50), *task.held_out(20)]
    for problem in problems:
        assert (problem.prompt, problem.answer) == (
            problem.extra["question"],
            problem.extra["answer"],
        )
        assert problem.extra["metadata"]["source_dataset"] == "leg_counting"
    assert len({problem.id for problem in problems}) == len(set(prompts(problems)))


def test_neighbouring_seeds_share_no_stream() -> None:
    """reasoning-gym itself gives item i of seed s as item i - 1 of seed s + 1."""
    streams = [set(prompts(first(gym_of("basic_arithmetic"), 100, seed))) for seed in (1, 2)]
    assert len(streams[0] & streams[1]) < 10


def test_a_gym_with_few_questions_ends_in_finite_time() -> None:
    options = {"min_disks": 3, "max_disks": 3, "min_pegs": 3, "max_pegs": 3}
    task = gym_of("tower_of_hanoi", options=options)
    held_out = task.held_out(1000)
    assert 0 <= len(held_out) < 10
    assert len(set(prompts(held_out))) == len(held_out)


def test_a_gym_whose_only_question_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Same:
        def __init__(self, question: str) -> None:
            self.question = question

        def __getitem__(self, place: int) -> dict[str, Any]:
            return {"question": self.question, "answer": "1"}

    sides = []
    for i in range(20):
        monkeypatch.setattr("espo_rl.tasks.gym.gym_dataset", lambda *_, i=i, **__: Same(f"q{i}"))
        task = gym_of("chain_sum")
        sides.append(len(task.held_out(3)))
        if sides[-1]:
            with pytest.raises(TaskError, match=r"task\.name"):
                next(task.training(0))
        else:
            assert next(task.training(0)).prompt == f"q{i}"
    assert set(sides) == {0, 1}


def test_a_mixture_of_gyms() -> None:
    mixture = [
        {"name": "chain_sum", "weight": 1.0, "config": {"max_terms": 3}},
        {"name": "leg_counting", "weight": 1.0, "config": {}},
    ]
    problems = first(gym_of("composite", options={"datasets": mixture}), 40)
    sources = {problem.extra["metadata"]["source_dataset"] for problem in problems}
    assert sources == {"chain_sum", "leg_counting"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "chain_sums"},
            r"task\.name = 'chain_sums'.*did you mean chain_sum.*leg_counting",
        ),
        (
            {"name": "chain_sum", "options": {"max_term": 3}},
            r"task\.options: chain_sum has no max_term \(did you mean max_terms",
        ),
        ({"name": "chain_sum", "options": {"seed": 3}}, r"task\.options: chain_sum has no seed"),
        ({"name": "chain_sum", "options": {"min_terms": 0}}, r"task\.options: .*min_terms"),
        ({"name": "chain_sum", "options": {"min_terms": "x"}}, r"task\.options: chain_sum refuses"),
        ({"name": "composite"}, r"task\.options: composite refuses.*datasets"),
        *(
            ({"name": name, "grader": grader}, rf"task\.grader = '{grader}'.*{name}.*\"task\"")
            for name, grader in (("boxnet", "exact"), ("graph_color", "math"))
        ),
    ],
)
def test_a_gym_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        gym_of(**settings)
