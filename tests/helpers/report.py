"""Runs as they leave their folder, for the tests of their report."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from espo_gateway.stop.estimate import FEATURES, SuccessEstimator
from espo_gateway.stop.regret import RegretStatistics
from espo_gateway.stop.rules import Gate
from espo_gateway.stop.told import Schedule
from espo_rl.base_model.train import make_tokenizer
from espo_rl.config import load_recipe
from espo_rl.record.rollout_files import RolloutFiles
from espo_rl.record.run_folder import read_run
from espo_rl.report.curves import panels
from espo_rl.types import EndReason, Problem, Rollout

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"> {{data}}"
RUN_GATE = Gate(version=3, rule="regret-only", beta=0.5, statistics=RegretStatistics(0.1, 1.0))
ESTIMATOR = SuccessEstimator((0.0, -1.0) + (0.0,) * (len(FEATURES) - 2), 2.0)
#: reads what a probe says of the reference answer's first token
ASKING = dataclasses.replace(
    RUN_GATE,
    rule="success-probability",
    estimator=SuccessEstimator((0.0,) * len(FEATURES) + (1.0, *[0.0] * 5), 0.5, ("probe",)),
    free=ESTIMATOR,
    schedule=Schedule(every=4, growth=0.0, below=1.0),
    p_star=0.3,
)
CUT = 8


def one(
    number: int = 0, tokens: int = 20, end: EndReason = EndReason.COMPLETED, **fields: Any
) -> Rollout:
    """Token i has the text of the i-th decimal digit; a large regret at token 8."""
    regrets = np.full(tokens, 0.01)
    regrets[CUT - 1 : CUT] = 9.0
    best = np.full(tokens, -0.1)
    values: dict[str, Any] = {
        "kept": tokens,
        "correct": True,
        "reward": 1.0,
        "text": "x" * tokens,
        "gate_version": 3,
    } | fields
    return Rollout(
        problem=Problem(f"p{number}", f"problem {number}", str(number)),
        prompt_ids=[2, 5, 3],
        token_ids=[5 + i % 10 for i in range(tokens)],
        logprobs=best - regrets,
        max_logprobs=best,
        end=end,
        **values,
    )


def stopped(number: int = 0, *, audited: bool, correct: bool | None = None) -> Rollout:
    return one(
        number,
        20 if audited else CUT,
        EndReason.EARLY_STOP,
        kept=CUT,
        audited=audited,
        correct=correct,
        overshoot=0 if audited else 2 + number,
        reward=-1.0,
    )


BATCH = [
    one(1),
    one(2, 30, EndReason.LENGTH, correct=False),
    stopped(3, audited=False),
    stopped(4, audited=True, correct=False),
    stopped(5, audited=True, correct=True),
]


def metrics(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "rollout/tokens": 100 * step,
        "rollout/tokens_without_stopping": 150.0 * step if step != 2 else None,
        "rollout/tokens_total_without_stopping": 150.0 * step if step != 3 else 800.0,
        "rollout/length_without_stopping": 15.0 if step != 2 else None,
        "rollout/accuracy": 0.1 * step,
        "rollout/stop_share": 0.6,
        "rollout/length": 10.0,
        "rollout/errors": 0,
        "rollout/audited": 2,
        "rollout/audited_correct": 1,
        "stopping/threshold": 0.5,
        "stopping/bound_upper": 1.0 if step == 1 else 0.2,
        "ppo/entropy": 0.5 / step,
        "ppo/kl": 1e-5,
        "seconds/rollout": 2.0,
        "seconds/step": 3.0,
        **more,
    }


def make_run(
    folder: Path,
    batch: list[Rollout] = BATCH,
    gate: Gate = RUN_GATE,
    steps: int = 3,
    settings: Sequence[str] = (),
    **options: Any,
) -> Path:
    """A run's folder, as a run leaves it."""
    overrides = [f"run.output={folder}", f"run.steps={steps}", "model.path=nowhere/at-all"]
    recipe = load_recipe("arithmetic", [*overrides, *settings])
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json")))
    estimate = {"value": 0.25, "interval": [0.125, 0.5]}
    rows = [{"step": 0, "evaluation/avg@1": estimate}]
    rows += [metrics(step, **options) for step in range(1, steps + 1)]
    rows += [{"step": steps, "evaluation/avg@1": estimate | {"value": 0.5}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = RolloutFiles(recipe)
    for step in range(1, steps + 1):
        files.write(step, batch, gate)
    return folder


def with_tokenizer(folder: Path) -> Path:
    make_tokenizer().save_pretrained(folder / "actor")
    # What names the kind of model, without one.
    (folder / "actor" / "config.json").write_text('{"model_type": "qwen2"}')
    return folder


def opened_trace(packed: str) -> dict[str, Any]:
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    """By panel and label."""
    return {
        f"{panel['id']}/{line['label']}": line
        for panel in panels([read_run(folder)])
        for line in panel["lines"]
    }
