"""The work of `espo_rl.probe`: recorded rollouts read, asked about, written with the answers."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoTokenizer

from espo_gateway.critic.probe import AnswerProbe
from espo_gateway.errors import UpstreamError, said
from espo_gateway.files import written_whole
from espo_gateway.stop.told import Schedule
from espo_gateway.upstream.pool import UpstreamPool
from espo_rl.config import RecipeError, Servers, Stopping, check_model_folder
from espo_rl.evaluate.arguments import explain
from espo_rl.evaluate.command import model_files
from espo_rl.evaluate.results import EvaluationError
from espo_rl.evaluate.results_folder import ResultsFolder
from espo_rl.record.progress import progress_bar
from espo_rl.record.rollout_files import SCHEMA, read_rollouts, with_column
from espo_rl.record.run_folder import rollout_files
from espo_rl.rollouts.collector import ProbePhrase
from espo_rl.servers.server import ServerError, call
from espo_rl.types import EndReason, Rollout


class ProbeError(ValueError):
    """The rollouts cannot be asked about; the message says what to give instead."""


class Prober:
    """Asks one server about rollouts.

    Args:
        model: as the server names it. slots: rollouts that are asked about at a time.
    """

    def __init__(
        self,
        answer_probe: AnswerProbe,
        model: str,
        phrase: ProbePhrase,
        schedule: Schedule,
        slots: asyncio.Semaphore,
    ) -> None:
        self._answer_probe = answer_probe
        self._model = model
        self._phrase = phrase
        self._schedule = schedule
        self._slots = slots
        #: questions, tokens sampled to answer them, and seconds from asking to answer, summed
        self.questions, self.tokens, self.seconds = 0, 0, 0.0

    async def probed(self, rollout: Rollout) -> Rollout:
        """The rollout with what the policy says along it, as live probes would have told it.

        Raises UpstreamError: an answer could not be had.
        """
        if rollout.end is EndReason.ERROR:
            return rollout
        # One that has completed is decided: nobody asks at its last token.
        length = len(rollout.token_ids) - (rollout.end is not EndReason.LENGTH)
        probe, probes = self._phrase(rollout.problem), []
        async with self._slots:
            # In order, so that each finds the prefix of the last in the server's cache.
            for token in self._schedule.tokens(length).tolist():
                prefix = [*rollout.prompt_ids, *rollout.token_ids[:token]]
                began = time.monotonic()
                said = await self._answer_probe.ask(probe, self._model, prefix)
                self.questions += 1
                self.tokens += said.tokens
                self.seconds += time.monotonic() - began
                probes.append([token, *said.told])
        return dataclasses.replace(rollout, probes=probes)


async def probe_files(
    options: argparse.Namespace, files: list[Path], tokenizer: Any, console: Console
) -> None:
    """Ask about all rollouts of the files that are not written yet.

    Raises:
        ProbeError, UpstreamError, OSError, ValueError.
    """
    phrase = ProbePhrase(tokenizer, options.phrase, options.end)
    waiting = [file for file in files if not (options.output / file.name).exists()]
    if len(waiting) < len(files):
        console.print(f"{len(files) - len(waiting)} of {len(files)} files are there already")
    began = time.monotonic()
    try:
        await call("GET", f"{options.url}/v1/models", seconds=5.0)
    except ServerError as error:
        raise ProbeError(f"--url: nothing answers there ({error}); start the server") from error
    async with UpstreamPool([options.url]) as pool:
        [served, *_] = await pool.models(pool.servers[0]) or [{}]
        if "id" not in served:
            raise ProbeError(f"--url: the server at {options.url} does not say what model it has")
        prober = Prober(
            AnswerProbe(pool, registry=CollectorRegistry()),
            str(served["id"]),
            phrase,
            Schedule(every=options.every, growth=options.growth),
            asyncio.Semaphore(options.concurrency),
        )
        with progress_bar() as bar:
            line = bar.add_task("probing files", total=len(waiting))
            for file in waiting:
                rollouts, _ = read_rollouts(file)
                try:
                    async with asyncio.TaskGroup() as group:
                        tasks = [group.create_task(prober.probed(one)) for one in rollouts]
                except BaseExceptionGroup as errors:
                    raise errors.exceptions[0] from None
                told = [task.result().probes for task in tasks]
                probes = pa.array(told, SCHEMA.field("probes").type)
                table = with_column(pq.read_table(file), "probes", probes)
                with written_whole(options.output / file.name) as scratch:
                    pq.write_table(table, scratch, compression="zstd")
                bar.advance(line)
    if prober.questions:
        console.print(
            f"{prober.questions:,} probes in {time.monotonic() - began:,.0f} s, "
            f"{prober.tokens / prober.questions:.1f} tokens sampled for each, "
            f"{1e3 * prober.seconds / prober.questions:,.0f} ms from asking to answer"
        )
    console.print(f"next: python -m espo_rl.replay {options.output}")


def run(options: argparse.Namespace) -> int:
    """The command; what its process exits with."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    defaults = Stopping()
    if options.phrase is None:
        options.phrase = defaults.probe_phrase
    if options.end is None:
        options.end = defaults.probe_end
    files: list[Path] = []
    for path in options.rollouts:
        try:
            found = rollout_files(path) if path.exists() else []
        except OSError as error:
            print(f"espo: {path}: {error.strerror}", file=sys.stderr)
            return 2
        if not found:
            print(f"espo: {path} holds no rollouts (*.parquet)", file=sys.stderr)
            return 2
        files += found
    if any(file.parent.resolve() == options.output.resolve() for file in files):
        print("espo: --output must be another folder than that of the rollouts", file=sys.stderr)
        return 2
    names = [file.name for file in files]
    if len({*names}) < len(names):
        print("espo: two files have one name; probe their folders apart", file=sys.stderr)
        return 2
    asked = ("model", "every", "growth", "phrase", "end")
    settings = {name: getattr(options, name) for name in asked} | {
        "rollouts": [str(path.resolve()) for path in options.rollouts],
        "model_files": model_files(Path(options.model)),
    }
    try:
        Servers(policy_urls=[options.url])
        check_model_folder("--model", options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        # Held until the command ends.
        folder = ResultsFolder(options.output, settings, flag="--output")  # noqa: F841
    except ValidationError as error:
        print("espo: " + "\n".join(map(explain, error.errors())), file=sys.stderr)
        return 2
    except (EvaluationError, RecipeError) as error:
        print(f"espo: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"espo: --model: {options.model} cannot be loaded: {error}", file=sys.stderr)
        return 2
    try:
        asyncio.run(probe_files(options, files, tokenizer, console))
    except (ProbeError, UpstreamError, OSError, ValueError) as error:
        print(f"espo: {said(error)}; the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("espo: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0
