"""Where a run begins: anew in a free folder, over an older run, or after a checkpoint.

Owns what may have changed since a checkpoint was written. All is decided before a model is loaded
or a server started, and nothing is deleted here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from espo_rl.checkpoints import CheckpointStore
from espo_rl.config import Recipe, RecipeError, differences
from espo_rl.record.output import (
    OF_A_RUN,
    OutputError,
    check_empty,
    check_own,
    entries,
    is_run,
    listed,
)
from espo_rl.servers.weight_files import is_ours
from espo_rl.servers.weights import CRITIC_SUFFIX
from espo_rl.unused import NEEDS_CRITIC

#: What a resumed run must have as before, and why: keys, or whole sections. All other keys may
#: change; nothing of them is kept in a checkpoint but in its recipe, so they hold from then on.
FIXED = {
    "run.seed": "it decides which problem comes next",
    "model.path": "the weights are the checkpoint's",
    "model.critic": "the weights are the checkpoint's",
    "model.dtype": "the optimizer's state is of that type",
    **{
        f"model.{key}": "the adapters are the checkpoint's"
        for key in ("lora_rank", "lora_alpha", "lora_targets")
    },
    "task": "it decides which problem comes next",
    "task.grader": "accuracy before and after would not compare",
    "task.pattern": "accuracy before and after would not compare",
    "rollout.max_tokens": "accuracy before and after would not compare",
    "rollout.n": "the run's audits are counted by it",  # some of every n rollouts
    "stopping.audit_share": "the run's audits are counted by it",
    "deepspeed": "the optimizer's state is laid out by it",
    "evaluation.problems": "accuracy before and after would not compare",
    "evaluation.samples": "accuracy before and after would not compare",
    "evaluation.temperature": "accuracy before and after would not compare",
    "evaluation.greedy": "accuracy before and after would not compare",
}
#: of the sections above, what may change
FREE = ("task.grader_workers", "task.grader_timeout")


def fixed(key: str) -> str | None:
    """Why a resumed run must have a key of the recipe as before; None where it need not."""
    if key in FREE:
        return None
    return FIXED.get(key) or FIXED.get(key.partition(".")[0])


def check_changes(before: Recipe, now: Recipe, checkpoint: Path) -> None:
    """Raise RecipeError naming what may not change, with the value that it must have."""
    changes = differences(before, now)
    wrong = [
        f"  {key} = {value!r}, but {was!r} there: {reason}"
        for key, (was, value) in changes.items()
        if (reason := fixed(key))
    ]
    if now.needs_critic and not before.needs_critic:
        keys = [key for key in NEEDS_CRITIC.split() if key in changes]
        asked = ", ".join(f"{key} = {changes[key][1]!r}" for key in keys)
        wrong.append(f"  {asked}: it needs a critic, and none was trained there")
    if wrong:
        raise RecipeError(
            f"{checkpoint} was written with other settings that a resumed run must keep:\n"
            + "\n".join(wrong)
            + "\ngive the same, or another run.output to start anew"
        )


def starting_point(recipe: Recipe, resume: str | None, *, overwrite: bool) -> Path | None:
    """The checkpoint that a run goes on from; None for one that begins anew.

    Args:
        resume: "auto", a checkpoint, or None. overwrite: an older run in run.output may go.

    Raises:
        RecipeError: run.output is occupied and nothing says what to do with it, the recipe is
            another than the checkpoint's in what must not change, or servers.weights_path is a file
            of somebody else's.
        CheckpointError: the checkpoint cannot be read.
    """
    output = recipe.run.output
    checkpoint = None
    try:
        there = entries(output, "run.output")
        if resume == "auto":
            checkpoint = CheckpointStore(output / "checkpoints").newest()
        elif resume is not None:
            checkpoint = Path(resume)
        own = checkpoint is not None and output.resolve() in checkpoint.resolve().parents
        if overwrite and not (own and resume == "auto"):
            _check_overwritten(recipe, there, checkpoint)
        elif resume == "auto" and not own:
            _check_unbegun(recipe, there)
        elif not own:
            check_empty(output, "run.output", _fix(output))
        if (file := recipe.servers.weights_path) is not None:
            for one in (file, file.with_suffix(CRITIC_SUFFIX)):
                check_own(one, "servers.weights_path", "file of an earlier run's weights", is_ours)
    except OutputError as error:
        raise RecipeError(str(error)) from error
    if checkpoint is not None:
        state = CheckpointStore.read(checkpoint)
        check_changes(state["recipe"], recipe, checkpoint)
        _check_place(state, recipe, checkpoint)
    return checkpoint


def _check_place(state: dict[str, Any], recipe: Recipe, checkpoint: Path) -> None:
    """Refuse what the checkpoint itself does not allow, whatever the recipe was."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.deepspeed.zero_stage and (before := state.get("ranks", ranks)) != ranks:
        raise RecipeError(
            f"{checkpoint} was written by {before} rank(s), which share the optimizer's state, and "
            f"these are {ranks}: start as many"
        )
    if state.get("step", 0) > recipe.run.steps:
        raise RecipeError(
            f"run.steps = {recipe.run.steps}, but {checkpoint} is of step {state['step']}: give "
            "more, or resume from an earlier checkpoint"
        )


def _fix(output: Path) -> str:
    if not is_run(output):
        return "choose another folder"
    return (
        "--resume auto goes on with the run there, --overwrite deletes it; or choose another "
        "run.output"
    )


def _check_overwritten(recipe: Recipe, there: list[str], checkpoint: Path | None) -> None:
    """Refuse to delete what is no run, or what this one needs."""
    output = recipe.run.output
    if not there:
        return
    if not is_run(output):
        raise OutputError(
            f"run.output: {output} is not empty (it holds {listed(there)}) and no run's folder, "
            "and --overwrite deletes nothing else: choose another folder"
        )
    needed = {
        "--resume": None if checkpoint is None else str(checkpoint),
        **{f"model.{key}": getattr(recipe.model, key) for key in ("path", "critic", "reference")},
        "stopping.value_head": recipe.stopping.head and str(recipe.stopping.head),
        **{f"task.{key}": getattr(recipe.task, key) for key in ("train", "eval")},
    }
    gone = [(output / name).resolve() for name in OF_A_RUN]
    for key, name in needed.items():
        path = Path(name or "/").resolve()
        if name and path.exists() and any(one in (path, *path.parents) for one in gone):
            raise OutputError(
                f"{key}: {name} lies in run.output, which --overwrite deletes: leave out "
                "--overwrite, or choose another run.output"
            )


def _check_unbegun(recipe: Recipe, there: list[str]) -> None:
    """`--resume auto` finds no checkpoint: begin anew only where none was due yet, by the recipe of
    before as by this one."""
    output = recipe.run.output
    if not is_run(output):
        if found := sorted({*there} & {*OF_A_RUN}):
            raise OutputError(
                f"run.output: {output} holds {listed(found)}, but no run that --resume could go on "
                "with: choose another folder"
            )
        return
    steps = _steps_logged(output / "metrics.jsonl")
    finished = (output / "summary.json").exists()
    try:
        before = Recipe.model_validate_json((output / "recipe.json").read_bytes())
        due = min(one.checkpoints.every or 1 for one in (before, recipe))
    except (OSError, ValueError):
        before, due = recipe, 1  # nobody knows when one was due
    if steps:
        check_changes(before, recipe, output)
    # One more than was due: the checkpoint comes after its step is logged.
    if finished or steps > due:
        what = "a finished run" if finished else f"{steps} steps of a run"
        raise OutputError(
            f"run.output: {output} holds {what} but no checkpoint to go on from: --overwrite "
            "deletes it and begins anew; or choose another run.output"
        )


def _steps_logged(metrics: Path) -> int:
    """The last step in metrics.jsonl; a line that a kill left half written does not count."""
    last = 0
    try:
        lines = metrics.read_text(errors="replace").splitlines()
    except OSError:
        return 0
    for line in lines:
        try:
            last = max(last, int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return last
