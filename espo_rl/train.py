"""A training run from its options to its exit code: set up, under signals, ended."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys

import transformers

from espo_gateway.supervisor import ServerStartError
from espo_gateway.vllm_plugin.client import WeightSyncError
from espo_rl.checkpoints import CheckpointError
from espo_rl.config import Recipe, RecipeError, load_recipe
from espo_rl.dry_run.hours import Speed
from espo_rl.dry_run.plan import make_plan
from espo_rl.evaluate.arguments import asked_as
from espo_rl.evaluate.results import EvaluationError
from espo_rl.loop import Interrupted, Loop
from espo_rl.ppo.ranks import follow
from espo_rl.ppo.trainer import PpoTrainer, UpdateError
from espo_rl.record.log_errors import LogError
from espo_rl.record.output import OutputError, lock_run, remove_run
from espo_rl.resumption import starting_point
from espo_rl.servers.server import ServerError
from espo_rl.tasks.task import TaskError

FAULTS = (
    ServerError,
    ServerStartError,
    WeightSyncError,
    EvaluationError,
    CheckpointError,
    LogError,
    TaskError,
    UpdateError,
)
#: what a launcher does of a Ctrl-C: `deepspeed` ends rank 0's servers with the ranks
TO_END = "to finish a step, save and end: kill -INT {pid} (the launcher's Ctrl-C saves nothing)"
INTERRUPTED = "espo: interrupted; go on with --resume auto"


def train(options: argparse.Namespace) -> int:
    """Set up and run; the exit code."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rank = int(os.environ.get("RANK", "0"))
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if rank:
            return 0 if options.dry_run else train_along(recipe)
        plan, checkpoint = make_plan(recipe), None
        try:
            if not (options.dry_run or plan.errors):  # before anything there is looked at
                lock_run(recipe.run.output)
            checkpoint = starting_point(recipe, options.resume, overwrite=options.overwrite)
        except (OutputError, RecipeError, CheckpointError) as error:
            plan.errors.append(str(error))
        if options.dry_run:
            print(plan.text(Speed.here(recipe)), end="")
            return 2 if plan.errors else 0
        plan.check()
        loop = Loop(recipe)
        for warning in plan.warnings:
            loop.log.say(f"warning: {warning}")
        if "RANK" in os.environ:
            loop.log.say(TO_END.format(pid=os.getpid()))
        if checkpoint is not None:
            loop.resume(checkpoint)
        if options.overwrite and not (checkpoint and options.resume == "auto"):
            remove_run(recipe.run.output)
    except (RecipeError, TaskError, CheckpointError, OSError, ValueError) as error:
        if not rank:  # the others have nothing else to say
            print(f"espo: {error}", file=sys.stderr)
        return 2
    try:
        code = asyncio.run(supervised(loop))
        if code == 0:
            print(next_commands(options, recipe))
        return code
    except FAULTS as error:
        print(f"espo: {error}", file=sys.stderr)
        return 1
    finally:
        loop.trainer.close()


def next_commands(options: argparse.Namespace, recipe: Recipe) -> str:
    """What is usually done with a finished run."""
    output, problems = recipe.run.output, asked_as(recipe)
    settings = [one for one in options.overrides if not one.startswith("run.steps=")]
    commands = {
        "look at it": ["-m", "espo_rl.report", str(output)],
        "evaluate it": ["-m", "espo_rl.evaluate", "--model", str(output / "actor"), *problems],
        "train on": [
            *("-m", "espo_rl.run", options.recipe, *settings),
            *(f"run.steps={2 * recipe.run.steps}", "--resume", "auto"),
        ],
        "serve it": ["-m", "espo_gateway.vllm_plugin", str(output / "actor")],
    }
    if not problems:
        del commands["evaluate it"]
    return "\n".join(
        f"{what + ':':13}{shlex.join(['python', *words])}" for what, words in commands.items()
    )


def train_along(recipe: Recipe) -> int:
    """All that a rank other than 0 does: train what rank 0 says, until that ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # Launchers signal all ranks; rank 0 decides what it means.
        signal.signal(number, signal.SIG_IGN)
    follow(PpoTrainer(recipe))
    return 0


async def supervised(loop: Loop) -> int:
    """Run the loop under this process's signals; the exit code."""
    running = asyncio.ensure_future(loop.run())
    received: list[int] = []

    def stop(number: int) -> None:
        # A launcher may pass on a Ctrl-C as SIGTERM on top; only the same one again is impatience.
        again = number in received
        received.append(number)
        if again or not loop.stepping:
            running.cancel()
        elif not loop.interrupted.is_set():
            loop.interrupted.set()
            loop.log.say("finishing this step, then saving; once more to stop now")

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        await running
        return 0
    except Interrupted:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    except asyncio.CancelledError:
        print(INTERRUPTED, file=sys.stderr, flush=True)
        sys.stdout.flush()
        # All children are stopped. An update may still run in its thread: nothing can cancel it,
        # and an ordinary exit would wait for it.
        os._exit(130)
