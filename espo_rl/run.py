"""The training loop: collect, score, learn when to stop, update, sync, log.

    python -m espo_rl.run arithmetic run.seed=1 ppo.learning_rate=1e-4 --resume auto

A run's folder holds the recipe, metrics.jsonl, TensorBoard events, rollouts, the servers' logs,
checkpoints, the trained models and summary.json.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from espo_gateway.supervisor import ServerStartError
from espo_gateway.vllm_plugin.client import WeightSyncError
from espo_rl import servers
from espo_rl.checkpoints import CheckpointError, CheckpointStore
from espo_rl.config import Recipe, RecipeError, load_recipe
from espo_rl.dumps import RolloutDumps
from espo_rl.logs import LogError, RunLog
from espo_rl.metrics import gate_metrics, rollout_metrics
from espo_rl.plan import check_model_folder
from espo_rl.rewards import GRADERS
from espo_rl.rollouts import Collector, Prompter, Sample
from espo_rl.stopping import StopController
from espo_rl.summary import Summary
from espo_rl.tasks import Task, TaskError, make_task
from espo_rl.trainer import PpoTrainer
from espo_rl.types import EndReason, Problem, Rollout
from espo_rl.weights import WeightPublisher, gathered, tensor_specs


class Loop:
    """One training run; all its state that a checkpoint keeps, and one method for each phase."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.task: Task = make_task(recipe.task)
        check_set_up(recipe, self.task)
        self.problems = self.task.training(recipe.run.seed)
        self.drawn = 0
        self.step = 0
        self.summary = Summary(recipe)
        self.stopping = StopController(
            recipe.stopping, recipe.run.steps, random.Random(recipe.run.seed)
        )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
            self.trainer = PpoTrainer(recipe)
        except (OSError, ValueError) as error:
            raise RecipeError(f"model.path or model.critic cannot be loaded: {error}") from error
        self.grade = GRADERS[recipe.task.grader]
        self.checkpoints = CheckpointStore(
            recipe.run.output / "checkpoints", keep=recipe.checkpoints.keep
        )
        self.log = RunLog(recipe)
        self.dumps = RolloutDumps(recipe)

    # -- a run ---------------------------------------------------------------------------------

    async def run(self) -> Path:
        """Train to the recipe's last step; returns the path of summary.json."""
        recipe = self.recipe
        async with AsyncExitStack() as stack:
            stack.enter_context(self.log)
            self.dumps.drop_after(self.step)
            self.log.say(f"starting the policy server with {recipe.model.path}, and the gateway")
            with self.timed("start"):
                self.servers = await stack.enter_async_context(
                    servers.running(recipe, recipe.model.path, recipe.run.output / "logs")
                )
                self.publisher = await stack.enter_async_context(
                    WeightPublisher([self.servers.policy_url], path=recipe.servers.weights_path)
                )
                prompter = Prompter(self.tokenizer, recipe.task.chat, recipe.task.system)
                self.collector = await stack.enter_async_context(
                    Collector(
                        self.servers.gateway_url, self.servers.model, prompter, recipe.rollout
                    )
                )
                # The server holds the base model; after a resume that is not the policy.
                await self.sync()
            if "before" not in self.summary.accuracy:
                self.summary.accuracy["before"] = await self.evaluate()
            while self.step < recipe.run.steps:
                await self.train_step()
            self.summary.accuracy["after"] = await self.evaluate()
            self.trainer.save_models(recipe.run.output)
            self.tokenizer.save_pretrained(recipe.run.output / "actor")
            path = self.summary.write(recipe.run.output / "summary.json")
            self.log.say(f"\n{self.summary.text()}\n\nlogs, models and {path.name}: {path.parent}")
            return path

    async def train_step(self) -> None:
        """One step, from the gate to the checkpoint."""
        recipe, stopping = self.recipe, self.stopping
        self.servers.check()
        started = dict(self.summary.seconds)
        gate = stopping.gate(self.weights_version)
        await self.servers.push_gate(gate)
        self.log.stopping(gate.rule != "none", stopping.warmup.reason)

        tokens_before = await self.servers.generated_tokens()
        with self.timed("rollout"):
            rollouts = await self.collect(self.draw_problems())
        with self.timed("score"):
            self.score(rollouts)
        with self.timed("update"):
            update = self.trainer.update(
                [rollout for rollout in rollouts if rollout.end is not EndReason.ERROR]
            )
        stopping.observe(rollouts, update["critic_loss"])
        # Read now, not at once after the rollouts: the last aborts have reached the engine.
        tokens_after = await self.servers.generated_tokens()
        if tokens_before is None or tokens_after is None:
            tokens = sum(rollout.generated for rollout in rollouts)
        else:
            tokens = tokens_after - tokens_before
        self.step += 1
        with self.timed("sync"):
            parity = await self.sync()

        self.summary.add(rollouts, tokens, stopping, gate.rule)
        spent = {
            phase: self.summary.seconds[phase] - started.get(phase, 0.0)
            for phase in ("rollout", "score", "update", "sync")
        }
        self.log.step(
            self.step,
            rollout=rollout_metrics(
                rollouts,
                tokens=tokens,
                audit_share=recipe.stopping.audit_share,
                weights_version=gate.weights_version,
            ),
            stopping=gate_metrics(gate)
            | {
                "explained_variance": stopping.explained_variance,
                "regret_mean": stopping.statistics.mean,
                "regret_variance": stopping.statistics.variance,
            },
            ppo=update,
            sync={"parity": parity},
            seconds=spent,
        )
        self.dumps.write(self.step, rollouts, gate)
        every = recipe.evaluation.every
        if every and self.step % every == 0 and self.step < recipe.run.steps:
            self.log.write(self.step, evaluation={"accuracy": (await self.evaluate()).value})
        every = recipe.checkpoints.every
        if every and (self.step % every == 0 or self.step == recipe.run.steps):
            with self.timed("checkpoint"):
                self.checkpoints.save(self.step, self.state(), self.trainer.save)

    # -- phases --------------------------------------------------------------------------------

    def draw_problems(self) -> list[Problem]:
        count = self.recipe.rollout.prompts_per_step
        self.drawn += count
        return list(islice(self.problems, count))

    async def collect(self, problems: Sequence[Problem]) -> list[Rollout]:
        """n rollouts of each problem; audited ones are asked for in shadow mode."""
        n = self.recipe.rollout.n
        audits = self.stopping.draw_audits(len(problems) * n)
        # Seeds follow from run, step and place: a resumed step asks for the same completions.
        first = (self.recipe.run.seed * 1_000_003 + self.step) * 65_536
        samples = [
            Sample(problem, seed=first + i, mode="shadow" if audits[i] else "enforce")
            for i, problem in enumerate(problem for problem in problems for _ in range(n))
        ]
        rollouts = await self.sample(samples, self.recipe.rollout.temperature, "rollouts")
        usable = sum(rollout.end is not EndReason.ERROR for rollout in rollouts)
        if usable < len(rollouts) / 2:
            error = next(rollout.error for rollout in rollouts if rollout.error)
            raise servers.ServerError(
                f"{len(rollouts) - usable} of {len(rollouts)} rollouts failed; the first: {error}"
            )
        return rollouts

    async def sample(
        self, samples: Sequence[Sample], temperature: float, label: str
    ) -> list[Rollout]:
        """Collect with a progress bar."""
        with self.log.phase(label, len(samples)) as advance:
            return await self.collector.collect(
                samples, temperature=temperature, on_done=lambda _: advance()
            )

    def score(self, rollouts: Sequence[Rollout]) -> None:
        """Outcome where it is known, and the reward; a stopped rollout's is r_fail (row 7)."""
        ppo = self.recipe.ppo
        for rollout in rollouts:
            if rollout.end is EndReason.ERROR:
                continue
            if not rollout.stopped or rollout.audited:
                rollout.correct = self.grade(rollout.text, rollout.problem.answer)
            if rollout.stopped:
                rollout.reward = self.recipe.stopping.failure_reward
            else:
                rollout.reward = ppo.right_reward if rollout.correct else ppo.wrong_reward

    async def sync(self) -> float:
        """Bring the actor's weights to the server and prove it; the largest difference found."""
        module = self.trainer.actor.module
        await self.publisher.publish(
            tensor_specs(module), gathered(module), version=self.weights_version
        )
        probe = self.probe()
        return await self.publisher.verify(
            probe,
            self.trainer.prompt_logprobs(probe),
            version=self.weights_version,
            tolerance=self.recipe.servers.parity_tolerance,
        )

    async def evaluate(self) -> Any:
        """Sampled accuracy on held-out problems, without stopping."""
        config = self.recipe.evaluation
        problems = self.task.held_out(config.problems)
        samples = [
            Sample(problem, seed=i * config.samples + k, mode="off")
            for i, problem in enumerate(problems)
            for k in range(config.samples)
        ]
        with self.timed("evaluate"):
            rollouts = await self.sample(samples, config.temperature, "evaluating")
        outcomes = [
            self.grade(rollout.text, rollout.problem.answer)
            for rollout in rollouts
            if rollout.end is not EndReason.ERROR
        ]
        return self.summary.evaluated(outcomes)

    # -- state ---------------------------------------------------------------------------------

    @property
    def weights_version(self) -> str:
        return f"step-{self.step}"

    def probe(self) -> list[int]:
        """A fixed text whose logprobs must agree between server and trainer."""
        if not hasattr(self, "_probe"):
            problem = self.task.held_out(1)[0]
            text = f"{problem.prompt} {problem.answer} " * 4
            self._probe = self.tokenizer.encode(text, add_special_tokens=False)[:128]
        return self._probe

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to the summary's seconds of that phase."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self.summary.seconds[phase] = self.summary.seconds.get(phase, 0.0) + seconds

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the models."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "step": self.step,
            "drawn": self.drawn,
            "stopping": self.stopping,
            "summary": self.summary,
            "trainer_rng": self.trainer.rng_state,
        }

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: same data order, same gate, same optimizers."""
        state = CheckpointStore.load(checkpoint, self.trainer.load)
        self.step, self.drawn = state["step"], state["drawn"]
        self.stopping, self.summary = state["stopping"], state["summary"]
        self.trainer.rng_state = state["trainer_rng"]
        self.log.start = self.step
        for _ in islice(self.problems, self.drawn):
            pass
        self.log.say(f"resumed from {checkpoint} after step {self.step}")


def check_set_up(recipe: Recipe, task: Task) -> None:
    """Find before anything is loaded or started what would fail later.

    Raises:
        RecipeError, TaskError: naming the key and the fix.
    """
    check_model_folder("model.path", recipe.model.path)
    if recipe.model.critic:
        check_model_folder("model.critic", recipe.model.critic)
    try:
        recipe.run.output.mkdir(parents=True, exist_ok=True)
        (recipe.run.output / "recipe.json").touch()
    except OSError as error:
        raise RecipeError(
            f"run.output: cannot write to {recipe.run.output} ({error.strerror}); choose another "
            "folder"
        ) from error
    next(task.training(recipe.run.seed))
    if not task.held_out(1):
        raise TaskError(
            "task.train has too few problems to hold out a tenth for evaluation; give task.eval"
        )


def main() -> int:
    """The command line; 0 on success, 2 on a recipe or set-up that cannot work, 1 on a fault."""
    parser = argparse.ArgumentParser(
        prog="python -m espo_rl.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a TOML file, or the name of a recipe in the package")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--resume", metavar="auto|CHECKPOINT", help="auto: from the newest checkpoint, if any"
    )
    # As Ctrl-C: unwinds the stack, which stops the servers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return train(parser.parse_intermixed_args())
    except KeyboardInterrupt:
        print("espo: interrupted; go on with --resume auto", file=sys.stderr)
        return 130


def train(options: argparse.Namespace) -> int:
    """Set up and run; the exit code."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print("espo: several ranks are not supported yet; start one process", file=sys.stderr)
        return 2
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        loop = Loop(recipe)
        if options.resume:
            newest = loop.checkpoints.newest()
            checkpoint = newest if options.resume == "auto" else Path(options.resume)
            if checkpoint is not None:
                loop.resume(checkpoint)
    except (RecipeError, TaskError, CheckpointError, OSError) as error:
        print(f"espo: {error}", file=sys.stderr)
        return 2
    try:
        asyncio.run(loop.run())
    except (
        servers.ServerError,
        ServerStartError,
        WeightSyncError,
        CheckpointError,
        LogError,
    ) as error:
        print(f"espo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
