"""Where a run begins: what an occupied folder needs, what a resumed run may have changed."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from espo_rl.checkpoints import FORMAT, CheckpointError, CheckpointStore
from espo_rl.config import Recipe, RecipeError, load_recipe
from espo_rl.loop import Loop
from espo_rl.ppo.parameters import TensorSpec
from espo_rl.ppo.trainer import PpoTrainer
from espo_rl.record.output import OF_A_RUN, OutputError, lock_run, remove_run
from espo_rl.resumption import FIXED, FREE, fixed, starting_point
from espo_rl.servers.weight_files import write_safetensors
from tests.helpers.models import random_checkpoint
from tests.helpers.trainer import Paths, make_models, make_rollouts, recipe_of

# -- an occupied folder ----------------------------------------------------------------------------


def recipe_with(output: Path, *overrides: str) -> Recipe:
    return load_recipe(
        "arithmetic", ["model.path=base", f"run.output={output}", "checkpoints.every=5", *overrides]
    )


def run_there(output: Path, *, steps: int = 0, checkpoints: tuple[int, ...] = ()) -> None:
    """What a run leaves in its folder."""
    recipe = recipe_with(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "recipe.json").write_text(recipe.model_dump_json())
    rows = [json.dumps({"step": step, "rollout/tokens": 1}) for step in range(1, steps + 1)]
    (output / "metrics.jsonl").write_text("".join(row + "\n" for row in rows))
    for step in checkpoints:
        (output / "checkpoints").mkdir(exist_ok=True)
        folder = output / "checkpoints" / f"step-{step:08d}"
        folder.mkdir()
        with (folder / "loop.pkl").open("wb") as file:
            pickle.dump(FORMAT, file)
            pickle.dump({"recipe": recipe}, file)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def finished(output: Path) -> None:
    run_there(output, steps=7)
    (output / "summary.json").write_text("{}")


def some_file(output: Path) -> None:
    output.mkdir()
    (output / "thesis.tex").write_text("...")


def other_models(output: Path) -> None:
    (output / "actor").mkdir(parents=True)
    (output / "actor" / "model.safetensors").touch()


REFUSED: list[tuple[Callable[[Path], object], str | None, bool, tuple[str, ...]]] = [
    (lambda o: run_there(o, steps=7, checkpoints=(5,)), None, False, ("--resume", "--overwrite")),
    (run_there, None, False, ("--resume", "--overwrite")),  # it had only just begun
    (finished, None, False, ("--resume", "--overwrite")),
    (some_file, None, False, ("thesis.tex", "another folder")),
    (lambda o: o.write_text("a file"), None, False, ("another folder",)),
    (lambda o: o.write_text("a file"), None, True, ("another folder",)),
    # No checkpoint to go on from, and more there than the steps to the first one.
    (finished, "auto", False, ("--overwrite", "finished run")),
    (lambda o: run_there(o, steps=6), "auto", False, ("--overwrite", "6 steps")),
    (other_models, "auto", False, ("actor",)),
    # Only a run is overwritten.
    (some_file, None, True, ("thesis.tex", "no run's folder")),
    (other_models, None, True, ("actor", "no run's folder")),
]


@pytest.mark.parametrize(("there", "resume", "overwrite", "said"), REFUSED)
def test_an_occupied_folder_is_refused_and_left_as_it_is(
    tmp_path: Path,
    there: Callable[[Path], object],
    resume: str | None,
    overwrite: bool,
    said: tuple[str, ...],
) -> None:
    output = tmp_path / "out"
    there(output)
    before = files(tmp_path)
    with pytest.raises(RecipeError, match=r"run\.output") as error:
        starting_point(recipe_with(output), resume, overwrite=overwrite)
    assert str(output) in str(error.value)
    assert all(word in str(error.value) for word in said)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("steps", "every", "recipe"),
    [
        (25, 0, "recipe.json"),
        (25, 20, "recipe.json"),
        (25, 1000, "recipe.json"),  # by the run's own recipe five were due
        (4, 2, "recipe.json"),
        (4, 5, "of_another_version.json"),
    ],
)
def test_steps_that_no_checkpoint_holds_are_not_thrown_away(
    tmp_path: Path, steps: int, every: int, recipe: str
) -> None:
    run_there(tmp_path, steps=steps)
    (tmp_path / "recipe.json").rename(tmp_path / recipe)
    with pytest.raises(RecipeError, match=f"{steps} steps"):
        starting_point(recipe_with(tmp_path, f"checkpoints.every={every}"), "auto", overwrite=False)


ALLOWED: list[tuple[Callable[[Path], object], str | None, bool, str | None]] = [
    (lambda o: None, None, False, None),
    (lambda o: o.mkdir(), None, False, None),
    (lambda o: None, "auto", False, None),
    (lambda o: run_there(o, steps=7, checkpoints=(5,)), "auto", False, "step-00000005"),
    (lambda o: run_there(o, steps=7, checkpoints=(5,)), "auto", True, "step-00000005"),
    (lambda o: run_there(o, steps=4), "auto", False, None),  # killed before its first checkpoint
    (lambda o: run_there(o, steps=7), "auto", True, None),
    (finished, None, True, None),
    (lambda o: run_there(o, steps=7, checkpoints=(5,)), None, True, None),
]


@pytest.mark.parametrize(("there", "resume", "overwrite", "name"), ALLOWED)
def test_what_says_what_to_do_goes_on(
    tmp_path: Path,
    there: Callable[[Path], object],
    resume: str | None,
    overwrite: bool,
    name: str | None,
) -> None:
    there(tmp_path / "out")
    found = starting_point(recipe_with(tmp_path / "out"), resume, overwrite=overwrite)
    assert (found.name if found else None) == name


def test_an_older_checkpoint_of_the_run_may_be_named(tmp_path: Path) -> None:
    run_there(tmp_path, steps=12, checkpoints=(5, 10))
    named = tmp_path / "checkpoints" / "step-00000005"
    assert starting_point(recipe_with(tmp_path), str(named), overwrite=False) == named


def test_a_checkpoint_of_elsewhere_needs_a_free_folder(tmp_path: Path) -> None:
    run_there(tmp_path / "one", steps=6, checkpoints=(5,))
    run_there(tmp_path / "two", steps=6, checkpoints=(5,))
    other = str(tmp_path / "one" / "checkpoints" / "step-00000005")
    recipe = recipe_with(tmp_path / "two")
    with pytest.raises(RecipeError, match="not empty"):
        starting_point(recipe, other, overwrite=False)
    assert starting_point(recipe, other, overwrite=True) == Path(other)
    assert starting_point(recipe_with(tmp_path / "new"), other, overwrite=False) == Path(other)


@pytest.mark.parametrize(
    "key", ["model.path", "model.critic", "model.reference", "stopping.value_head"]
)
def test_what_the_run_needs_is_not_overwritten(tmp_path: Path, key: str) -> None:
    finished(tmp_path)
    (tmp_path / "actor").mkdir()
    settings = [f"{key}={tmp_path / 'actor'}", "ppo.kl_coefficient=0.1"]
    settings += ['stopping.sources=["critic"]'] * key.startswith("stopping")
    with pytest.raises(RecipeError, match=key):
        starting_point(recipe_with(tmp_path, *settings), None, overwrite=True)


def test_a_checkpoint_is_not_overwritten_by_what_goes_on_from_it(tmp_path: Path) -> None:
    run_there(tmp_path, steps=6, checkpoints=(5,))
    named = str(tmp_path / "checkpoints" / "step-00000005")
    with pytest.raises(RecipeError, match="--resume"):
        starting_point(recipe_with(tmp_path), named, overwrite=True)


def test_two_processes_never_train_in_one_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    lock_run(output)
    with pytest.raises(OutputError, match="another process trains in"):
        lock_run(output)
    # A lock alone is no run, and nothing that would be lost.
    assert starting_point(recipe_with(output), None, overwrite=False) is None
    remove_run(output)
    with pytest.raises(OutputError, match="another process trains in"):
        lock_run(output)


def test_only_weights_on_their_way_are_written_over(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    recipe = recipe_with(tmp_path / "out", f"servers.weights_path={file}")
    assert starting_point(recipe, None, overwrite=False) is None
    with file.open("wb") as opened:
        write_safetensors(opened, [TensorSpec("w", torch.float32, (2,))], [("w", torch.ones(2))])
    assert load_file(file)["w"].tolist() == [1.0, 1.0]
    assert starting_point(recipe, None, overwrite=False) is None
    save_file({"w": torch.ones(2)}, file)  # a trained model, perhaps
    with pytest.raises(RecipeError, match=r"servers\.weights_path: .* is there and no file of"):
        starting_point(recipe, None, overwrite=True)


def test_only_what_a_run_wrote_is_removed(tmp_path: Path) -> None:
    run_there(tmp_path, steps=7, checkpoints=(5,))
    for name in ("actor", "logs", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    (tmp_path / "tensorboard").symlink_to(outside)
    remove_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "outside"]
    assert (outside / "file").exists()


def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_there(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OutputError, match=r"cannot remove .*: Permission denied"):
        remove_run(tmp_path)


def test_what_is_left_of_a_removal_that_was_killed_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_there(tmp_path, steps=7, checkpoints=(5,))

    def kill(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr("espo_rl.record.output.shutil.rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            remove_run(tmp_path)
    assert starting_point(recipe_with(tmp_path), None, overwrite=True) is None


# -- changed settings ------------------------------------------------------------------------------

#: a value that differs from the recipe's, for every key that must not change
OTHER = {
    "run.seed": "1",
    "model.path": "other",
    "model.critic": "other",
    "model.dtype": "bfloat16",
    "model.lora_rank": "4",
    "model.lora_alpha": "2.0",
    "model.lora_targets": '["q_proj"]',
    "task.grader": "math",
    "task.pattern": "is (.*)",
    "rollout.max_tokens": "200",
    "rollout.n": "4",
    "stopping.audit_share": "0.2",
    "deepspeed.zero_stage": "1",
    "deepspeed.extra": "{wall_clock_breakdown = true}",
    "evaluation.problems": "8",
    "evaluation.samples": "2",
    "evaluation.temperature": "0.5",
    "evaluation.greedy": "true",
    "task.min_steps": "1",
    "task.steps": "[2, 3]",
    "task.chat": "false",
    "task.template": "{problem}?",
}


def test_every_key_of_the_table_is_a_recipes() -> None:
    sections = Recipe.model_fields
    for key in (*FIXED, *FREE):
        section, _, name = key.partition(".")
        of: Any = sections[section].annotation
        fields = of.model_fields
        assert not name or name in fields, key
    tried = {key if key in FIXED else key.partition(".")[0] for key in OTHER}
    assert tried == set(FIXED)


@pytest.mark.parametrize("key", OTHER)
def test_what_must_not_change_is_refused_by_name(tmp_path: Path, key: str) -> None:
    run_there(tmp_path, steps=6, checkpoints=(5,))
    # What else is said of adapters, or of a pattern, needs some.
    needed = {"model.lora": ["model.lora_rank=4"], "task.pattern": ["task.grader=regex"]}
    more = next((more for start, more in needed.items() if key.startswith(start)), [])
    changed = recipe_with(tmp_path, *more, f"{key}={OTHER[key]}")
    with pytest.raises(RecipeError) as error:
        starting_point(changed, "auto", overwrite=False)
    assert f"  {key} = " in str(error.value)
    assert "step-00000005" in str(error.value)


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        (["ppo.advantage=group"], [], "ppo.advantage = 'gae'"),
        (
            ["ppo.baseline=probe", 'stopping.sources=["probe"]'],
            ['stopping.sources=["probe"]'],
            "ppo.baseline = 'critic'",
        ),
        (
            ["ppo.advantage=group"],
            ["ppo.advantage=group", 'stopping.sources=["critic"]'],
            "stopping.sources = ['critic']",
        ),
    ],
)
def test_a_critic_that_was_not_trained_is_refused(
    tmp_path: Path, before: list[str], now: list[str], named: str
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(5, {"recipe": recipe_with(tmp_path, *before)}, lambda folder: None)
    assert starting_point(recipe_with(tmp_path, *before), "auto", overwrite=False)
    with pytest.raises(RecipeError, match=re.escape(f"  {named}: it needs a critic")):
        starting_point(recipe_with(tmp_path, *now), "auto", overwrite=False)


def test_a_checkpoint_has_its_ranks_and_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = recipe_with(tmp_path, "deepspeed.zero_stage=2")
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(5, {"recipe": sharded, "ranks": 2, "step": 5}, lambda folder: None)
    with pytest.raises(RecipeError, match="written by 2 rank"):
        starting_point(sharded, "auto", overwrite=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert starting_point(sharded, "auto", overwrite=False)
    shorter = recipe_with(tmp_path, "deepspeed.zero_stage=2", "run.steps=4")
    with pytest.raises(RecipeError, match=r"run\.steps = 4, but .* is of step 5"):
        starting_point(shorter, "auto", overwrite=False)


def test_an_older_recipe_had_the_default_of_what_it_does_not_know(tmp_path: Path) -> None:
    asks = ['stopping.sources=["critic"]', "ppo.advantage=group"]
    older = recipe_with(tmp_path, *asks).model_copy(deep=True)  # defaults are shared
    del older.task.__dict__["grader_timeout"]
    del older.evaluation.__dict__["greedy"]
    del older.stopping.__dict__["value_head"]
    CheckpointStore(tmp_path / "checkpoints").save(5, {"recipe": older}, lambda folder: None)
    assert starting_point(recipe_with(tmp_path, *asks), "auto", overwrite=False)
    greedy = recipe_with(tmp_path, *asks, "evaluation.greedy=true")
    with pytest.raises(RecipeError, match=r"evaluation\.greedy = True, but False there"):
        starting_point(greedy, "auto", overwrite=False)
    assert pickle.loads(pickle.dumps(older.stopping)).schedule == (96, 0.25)


def test_a_damaged_checkpoint_is_said_before_anything(tmp_path: Path) -> None:
    run_there(tmp_path, steps=6, checkpoints=(5,))
    (tmp_path / "checkpoints" / "step-00000005" / "loop.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match="step-00000005"):
        starting_point(recipe_with(tmp_path), "auto", overwrite=False)


def test_free_keys_are_free() -> None:
    for key in ("run.steps", "ppo.learning_rate", "task.grader_workers", "stopping.rule"):
        assert fixed(key) is None
    assert fixed("task.train")
    assert fixed("task.any_that_will_come")


# -- they take effect ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("zero_stage", "dtype"), [(0, "float32"), (0, "bfloat16"), (2, "float32"), (3, "float32")]
)
def test_the_optimizers_follow_the_recipe_and_not_the_checkpoint(
    paths: Paths, tmp_path: Path, zero_stage: int, dtype: str
) -> None:
    def trainer(**ppo: Any) -> PpoTrainer:
        recipe = recipe_of(paths, zero_stage=zero_stage, **ppo)
        model = recipe.model.model_copy(update={"dtype": dtype})
        return PpoTrainer(recipe.model_copy(update={"model": model}))

    before = trainer(lr_warmup_steps=2)
    before.update(make_rollouts())
    before.save(tmp_path)
    # A warm-up that was not there, or is there no more, is a change like any other.
    for warmup, share in ((0, 1.0), (8, 2 / 8), (1, 1.0)):
        resumed = trainer(
            learning_rate=5e-4,
            critic_learning_rate=3e-4,
            weight_decay=0.3,
            max_grad_norm=0.25,
            lr_warmup_steps=warmup,
        )
        resumed.load(tmp_path)
        metrics = resumed.update(make_rollouts())
        assert metrics["learning_rate"] == pytest.approx(5e-4 * share)
        assert metrics["critic_learning_rate"] == pytest.approx(3e-4 * share)
        for engine, rate in ((resumed.actor, 5e-4), (resumed.critic, 3e-4)):
            assert engine is not None
            optimizer = engine._engine.optimizer
            for group in optimizer.param_groups:
                assert (group["lr"], group["weight_decay"]) == (pytest.approx(rate * share), 0.3)
            assert getattr(optimizer, "clip_grad", 0.0) in (0.0, 0.25)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("base") / "base", 0)


def loop_of(base: Path, output: Path, *overrides: str) -> Loop:
    settings = [f"model.path={base}", f"run.output={output}", "rollout.prompts_per_step=2"]
    return Loop(load_recipe("arithmetic", [*settings, *overrides]))


class Served:
    version = "step-1"


def saved(base: Path, output: Path, *overrides: str) -> tuple[Loop, Path]:
    """A run after a step, with the next batch drawn ahead."""
    loop = loop_of(base, output, *overrides)
    served: Any = Served()
    loop.served = served
    loop.step = 1
    loop.queue.batches.append(loop.draw(2))
    loop.stopping.version = 7
    return loop, loop.checkpoints.save(1, loop.state(), loop.trainer.save)


@pytest.mark.parametrize(
    ("change", "again", "anew"),
    [
        ("ppo.learning_rate=1e-3", True, False),
        ("run.steps=99", False, False),
        ("checkpoints.keep=7", False, False),
        ("rollout.concurrency=8", True, False),
        ("rollout.temperature=0.5", True, True),
        ("stopping.window=3", True, True),
        ("stopping.rule=regret-only", True, True),
        ("ppo.wrong_reward=0.0", True, True),
        ("servers.logprobs_mode=processed_logprobs", True, True),
    ],
)
def test_a_change_holds_from_the_next_batch_on_and_is_logged(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    again: bool,
    anew: bool,
) -> None:
    before, checkpoint = saved(base, tmp_path)
    drawn = before.queue.batches[0]
    capsys.readouterr()
    loop = loop_of(base, tmp_path, change)
    served: Any = Served()
    loop.served = served
    loop.resume(checkpoint)
    key = change.partition("=")[0]
    assert f"changed since: {key} = " in capsys.readouterr().out
    assert (not loop.queue.batches) is again
    assert (loop.stopping.version == 0) is anew
    assert loop.stopping.warmup._total_steps == loop.recipe.run.steps
    assert loop.stopping.config == loop.recipe.stopping
    assert loop.summary.recipe == loop.recipe
    # Drawn again, it is the same problems, in what is asked now.
    batch = loop.queue.next(1, loop.recipe.run.steps)
    assert batch.step == drawn.step
    assert loop.drawn == before.drawn
    asked = {one.problem.id for one in batch.waiting.values()}
    assert asked == {one.problem.id for one in drawn.waiting.values()}
    assert len(batch.waiting) == 2 * loop.recipe.rollout.n


def test_nothing_is_said_where_nothing_changed(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, checkpoint = saved(base, tmp_path)
    loop = loop_of(base, tmp_path)
    loop.resume(checkpoint)
    assert "changed" not in capsys.readouterr().out
    assert loop.queue.batches


def test_a_run_that_goes_back_says_what_it_drops(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop, checkpoint = saved(base, tmp_path)
    loop.checkpoints.save(2, loop.state(), loop.trainer.save)
    loop_of(base, tmp_path).resume(checkpoint)
    assert "later steps is dropped" in capsys.readouterr().out


def test_a_run_writes_no_name_that_is_not_known_as_its_own() -> None:
    """What --overwrite deletes; a new one must be told here too."""
    assert {"recipe.json", "metrics.jsonl", "rollouts", "checkpoints", "logs"} <= set(OF_A_RUN)
