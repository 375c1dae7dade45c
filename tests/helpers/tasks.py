"""Tasks of few problems, and what comes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from espo_rl.config import TaskSection
from espo_rl.tasks.kinds import make_task
from espo_rl.types import Problem


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"problem": f"q{i}", "answer": i} for i in range(start, start + count)]


def task_of(**settings: Any) -> Any:
    return make_task(TaskSection(kind="dataset", **settings))


def gym_of(name: str, **settings: Any) -> Any:
    return make_task(TaskSection(kind="reasoning-gym", name=name, **settings))


def first(task: Any, count: int, seed: int = 0) -> list[Problem]:
    return list(islice(task.training(seed), count))


def prompts(problems: Sequence[Problem]) -> list[str]:
    return [problem.prompt for problem in problems]
