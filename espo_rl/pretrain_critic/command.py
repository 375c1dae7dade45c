"""The work of `espo_rl.pretrain_critic`: from recorded rollouts to a critic in a folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from rich.console import Console
from rich.table import Table

from espo_gateway.files import written_whole
from espo_rl.config import check_model_folder
from espo_rl.ppo.critic import Critic, load_classifier
from espo_rl.pretrain_critic.fit import (
    Array,
    Partition,
    PretrainError,
    deal,
    fit_critic,
    split,
    usable,
    values_of,
)
from espo_rl.pretrain_critic.head import fit_head, keep_layers
from espo_rl.pretrain_critic.quality import Quality, qualities
from espo_rl.pretrain_critic.settings import Settings
from espo_rl.record.output import check_empty
from espo_rl.record.progress import progress_bar
from espo_rl.record.rollout_files import read_rollouts, with_column, with_notes, worth_note
from espo_rl.record.run_folder import rollout_files
from espo_rl.types import Rollout


def recorded_files(paths: Sequence[Path]) -> list[Path]:
    """The rollout files among files, folders of them and folders of runs.

    Raises:
        PretrainError: a path holds none.
    """
    files: list[Path] = []
    for path in paths:
        found = rollout_files(path)
        if not found:
            raise PretrainError(f"{path}: no rollouts (*.parquet) there")
        files += found
    return files


def load_critic(model: str, *, seed: int, head_only: bool = False) -> Critic:
    """As the trainer makes one: V is 0 at the start unless the checkpoint is a critic already.

    Args:
        head_only: the rest stays as it is, and so in the numbers that the checkpoint is in, which a
            server of the policy computes in.

    Raises:
        PretrainError, RecipeError: the model cannot be loaded.
    """
    torch.manual_seed(seed)
    check_model_folder("--model", model)
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        fresh = not any("SequenceClassification" in name for name in config.architectures or ())
        dtype = (config.dtype if head_only else None) or torch.float32
        classifier = load_classifier(model, fresh=fresh, dtype=dtype)
        classifier.score.float()
    except (OSError, ValueError, RuntimeError) as error:
        raise PretrainError(f"--model {model} cannot be loaded: {error}") from error
    return Critic(classifier).to("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(model: str) -> Any:
    """vLLM wants one beside the critic, though it is asked with token ids. Raises PretrainError."""
    try:
        return transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise PretrainError(f"--model {model} has no tokenizer: {error}") from error


def pretrain(options: argparse.Namespace, console: Console) -> None:
    """The work.

    Raises:
        PretrainError, OSError, ValueError: the rollouts, the model or the output are unusable.
    """
    output: Path = options.output
    check_empty(output, "--output", "choose another folder, or remove it", whole=True)
    if options.values is not None:
        check_empty(options.values, "--values", "choose another folder, or remove it", whole=True)
        if options.values.resolve() == output.resolve():
            raise PretrainError("--values: it must be another folder than --output")
    settings = Settings(
        learning_rate=options.learning_rate,
        epochs=options.epochs,
        patience=options.patience,
        right=options.right_reward,
        wrong=options.wrong_reward,
        seed=options.seed,
    )
    files = recorded_files(options.rollouts)
    recorded = {file: read_rollouts(file)[0] for file in files}
    full = usable([one for rows in recorded.values() for one in rows])
    # Told before the model is loaded, which takes a while.
    folds = deal(full, options.held_out) if options.head_only else None
    parts = split(full, options.held_out) if folds is None else Partition(full, [], full)
    critic = load_critic(options.model, seed=options.seed, head_only=options.head_only)
    if options.layers is not None:
        keep_layers(critic, options.layers)
    tokenizer = load_tokenizer(options.model)

    with progress_bar(console=console) as bar:
        line = bar.add_task("fitting the critic", total=settings.epochs)
        epoch = count(1)

        def show(training: float, validation: float) -> None:
            losses = f"loss {training:.3f}, on other problems {validation:.3f}"
            bar.update(line, advance=1, description=f"fitting the critic, {losses}")
            console.print(f"epoch {next(epoch)}: {losses}", highlight=False)

        if folds is not None:
            bar.update(line, total=len(full), description="reading rollouts")
            output.parent.mkdir(parents=True, exist_ok=True)
            values = fit_head(
                critic,
                full,
                folds,
                settings,
                scratch=output.parent,
                on_rollouts=lambda some: bar.advance(line, some),
            )
            helped, how = 1, "its head alone"
        else:
            helped = fit_critic(critic, parts, settings, on_epoch=show)
            values = values_of(critic, parts.held_out, settings)
            how = f"after {helped} of at most {settings.epochs} epochs"

    found = _measured(values, parts.held_out, settings)
    about = {
        "model": options.model,
        "settings": asdict(settings),
        "head_only": options.head_only,
        "layers": options.layers,
        "folds": None if folds is None else int(folds.max()) + 1,
        "epochs": helped,
        "rollouts": {name: len(part) for name, part in vars(parts).items()},
        "accuracy": sum(bool(one.correct) for one in parts.held_out) / len(parts.held_out),
        "held_out": {where: asdict(quality) for where, quality in found.items()},
    }
    write_critic(output, critic, about, tokenizer)
    if options.values is not None:
        held_out = {one.problem.prompt for one in parts.held_out}
        first = 0 if options.head_only else 1
        told = (states[first : len(states) - 1 + first] for states in values)
        note = worth_note(settings.wrong, settings.right)
        _write_values(options.values, recorded, held_out, told, note)
    title = f"V on {len(parts.held_out)} rollouts of problems that it was not fitted on"
    console.print(_table(title, found))
    console.print(f"critic: {output}, {how}")


def _measured(
    values: Sequence[Array], rollouts: Sequence[Rollout], settings: Settings
) -> dict[str, Quality]:
    before = [rows[:-1] for rows in values]
    outcomes = [bool(rollout.correct) for rollout in rollouts]
    return qualities(before, outcomes, right=settings.right, wrong=settings.wrong)


def write_critic(output: Path, critic: Critic, about: dict[str, Any], tokenizer: Any) -> None:
    """Write the critic's folder, whole or not at all; `about` becomes its report.json."""
    with written_whole(output) as scratch:
        critic.classifier.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "report.json").write_text(json.dumps(about, indent=2) + "\n")
        if output.exists():
            output.rmdir()  # refuses one that was filled meanwhile


def _write_values(
    folder: Path,
    recorded: dict[Path, list[Rollout]],
    held_out: set[str],
    known: Iterator[Array],
    note: Mapping[str, str],
) -> None:
    """The held-out rows of each file with a column `values`: V of each token, [tokens]. note: for
    the file's metadata.

    known: of the usable ones, in the order of the files, what a gate knows when it decides at each
    token. A critic server has read it; an engine with a head tells V of the state it is sampled in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, (file, rollouts) in enumerate(recorded.items()):
        table = pq.read_table(file)
        rows = [i for i, one in enumerate(rollouts) if one.problem.prompt in held_out]
        full = [rollouts[i] for i in rows]
        values = [next(known).tolist() if usable([one]) else [] for one in full]
        table = with_column(
            table.take(pa.array(rows, pa.int64())),
            "values",
            pa.array(values, pa.list_(pa.float64())),
        )
        name = (
            file.name
            if len({path.name for path in recorded}) == len(recorded)
            else (f"step-{number:08d}.parquet")
        )
        final = folder / name
        with written_whole(final) as scratch:
            pq.write_table(with_notes(table, note), scratch, compression="zstd")


def _table(title: str, found: dict[str, Quality]) -> Table:
    shown = Table(title=title, title_justify="left")
    shown.add_column("where")
    for heading in ("explained variance", "AUC", "MSE", "BCE", "states"):
        shown.add_column(heading, justify="right")
    for where, one in found.items():
        numbers = (one.explained, one.auc, one.mse, one.bce)
        shown.add_row(where, *(f"{number:.3f}" for number in numbers), f"{one.states:,}")
    return shown


def run(options: argparse.Namespace) -> int:
    """0 on success, 2 on rollouts, a model or arguments that cannot work."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        pretrain(options, Console())
    except (PretrainError, OSError, ValueError) as error:
        print(f"espo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("espo: interrupted", file=sys.stderr)
        return 130
    return 0
