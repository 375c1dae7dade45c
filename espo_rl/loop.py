"""The training loop: collect, score, learn when to stop, update, sync, log.

Owns the order of a step and what a checkpoint keeps. What is sampled when, and which step trains on
it, is the queue's (`rollouts.queue`): with `rollout.schedule = "refill"` rollouts are under way all
the time. A server that falls is brought back with the current weights and gates, and the step goes
on; whatever else fails ends the run, which `--resume` takes up again from its last checkpoint. One
is written where servers fail for good, but in an update.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

from transformers import AutoTokenizer

from espo_gateway.stop.gate_json import Mode
from espo_gateway.supervisor import ServerStartError
from espo_gateway.vllm_plugin.client import WeightSyncError
from espo_rl.checkpoints import CheckpointError, CheckpointStore
from espo_rl.config import DYNAMIC_ROUNDS, RESAMPLES, Recipe, RecipeError, differences
from espo_rl.evaluate.evaluator import evaluate
from espo_rl.evaluate.results import EvaluationError, ProblemResult, Report, Sampling
from espo_rl.evaluate.table import as_dict
from espo_rl.first import first_of
from espo_rl.gate.audits import Audits
from espo_rl.gate.batch_gates import StopController
from espo_rl.gate.outcomes import with_outcome
from espo_rl.ppo.trainer import PpoTrainer
from espo_rl.record.log import RunLog
from espo_rl.record.log_errors import log_errors
from espo_rl.record.metrics import gate_metrics, rollout_metrics
from espo_rl.record.rollout_files import RolloutFiles
from espo_rl.record.summary import Summary
from espo_rl.rollouts.batch import Batch
from espo_rl.rollouts.collector import TIMED_OUT, Collector, ProbePhrase, Prompter
from espo_rl.rollouts.in_flight import InFlight
from espo_rl.rollouts.queue import BatchQueue
from espo_rl.servers.fleet import open_fleet
from espo_rl.servers.sampler import Sampler
from espo_rl.servers.served_models import PROOF_ROLLOUTS, ServedModels
from espo_rl.servers.server import ServerError, ServerFellError
from espo_rl.tasks.grader_pool import GraderPool
from espo_rl.tasks.kinds import make_task
from espo_rl.tasks.reward import score
from espo_rl.tasks.task import Task
from espo_rl.types import first_seed

T = TypeVar("T")
#: keys on which all that was learnt about stopping depends, and those that shape a batch
LEARNS_ANEW = (
    "stopping.",
    "ppo.right_reward",
    "ppo.wrong_reward",
    "rollout.temperature",
    "servers.logprobs_mode",
)
OF_A_BATCH = ("rollout.", "stopping.", "ppo.", "task.", "servers.logprobs_mode")


class Interrupted(Exception):
    """The run was asked to end, has finished its step and saved."""


class Loop:
    """One training run; one method for each phase of a step."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.task: Task = make_task(recipe.task)
        self.problems = self.task.training(recipe.run.seed)
        self.drawn = 0
        self.step = 0  # updates done: the weights' version, too
        self.queue = BatchQueue(recipe.rollout.ahead, self.draw)
        self.summary = Summary(recipe)
        self.stopping = StopController(
            recipe.stopping,
            recipe.run.steps,
            random.Random(recipe.run.seed),
            worth=(recipe.ppo.wrong_reward, recipe.ppo.right_reward),
            audits=Audits.of(recipe.stopping.audit_share, recipe.rollout.n),
        )
        self.checkpoints = CheckpointStore(
            recipe.run.output / "checkpoints", keep=recipe.checkpoints.keep
        )
        self.grader = GraderPool(recipe.task)
        self.log = RunLog(recipe)
        self.rollout_files = RolloutFiles(recipe)
        # Last, as loading takes long.
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
            self.trainer = PpoTrainer(recipe)
        except OSError as error:
            raise RecipeError(f"model.path or model.critic cannot be loaded: {error}") from error
        except ValueError as error:
            raise RecipeError(f"model or optimizer cannot be set up: {error}") from error
        self.stepping = False
        self.interrupted = asyncio.Event()
        self.trainer_free = asyncio.Lock()
        # One, as each keeps to itself the memory that it has freed.
        self.thread = ThreadPoolExecutor(1, "trainer")

    # -- a run ---------------------------------------------------------------------------------

    async def run(self) -> Path:
        """Train to the recipe's last step; returns the path of summary.json.

        Raises:
            Interrupted: `interrupted` was set; the step is finished and saved.
        """
        recipe = self.recipe
        async with AsyncExitStack() as stack:
            stack.enter_context(self.log)
            self.rollout_files.drop_after(self.step)
            self.checkpoints.drop_after(self.step)
            self.log.say(f"starting the policy server with {recipe.model.path}, and the gateway")
            with self.summary.timed("start"):
                await self.start(stack)
                await self.served.attempt(self.prove_sampling)
            await self.evaluate_policy("before")
            self.stepping = True
            while self.step < recipe.run.steps:
                await self.evaluate_if_due()
                if not self.interrupted.is_set():
                    await self.train_step()
                await self.save(last=self.interrupted.is_set())
                if self.interrupted.is_set():
                    raise Interrupted
            self.stepping = False
            # Before the evaluation, which may take long and fail.
            with log_errors(recipe.run.output / "actor"):
                self.trainer.save_models(recipe.run.output)
                self.tokenizer.save_pretrained(recipe.run.output / "actor")
            await self.evaluate_policy("after")
            with log_errors(recipe.run.output / "summary.json"):
                path = self.summary.write(recipe.run.output / "summary.json")
            self.log.say(f"\n{self.summary.text()}\n\nlogs, models and {path.name}: {path.parent}")
            return path

    async def start(self, stack: AsyncExitStack) -> None:
        """Start servers and helpers; they end with the stack."""
        recipe, enter = self.recipe, stack.enter_async_context
        critic_path = None
        if recipe.asks_critic:
            critic_path = recipe.run.output / "critic-config"
            self.trainer.module("critic").config.save_pretrained(critic_path)
            self.tokenizer.save_pretrained(critic_path)
        self.fleet = await enter(
            open_fleet(
                recipe,
                recipe.model.path,
                recipe.run.output / "logs",
                critic_path=critic_path,
                say=self.log.say,
            )
        )
        self.prompter = Prompter.of(self.tokenizer, recipe.task)
        phrase = None
        if "probe" in recipe.stopping.read:
            phrase = ProbePhrase.of(self.tokenizer, recipe.stopping)
        self.collector = await enter(
            Collector(
                self.fleet.gateway_url,
                self.fleet.model,
                self.prompter,
                recipe.rollout,
                probe=phrase,
            )
        )
        ask = partial(self.collector.rollout, temperature=recipe.rollout.temperature)
        flight = await enter(InFlight(self.queue, ask, recipe.rollout.concurrency))
        problem = self.task.held_out(1)[0]
        probe = f"{problem.prompt} {problem.answer} " * 4
        self.served = await enter(
            ServedModels(
                recipe,
                self.fleet,
                self.trainer,
                self.trainer_free,
                self.tokenizer.encode(probe, add_special_tokens=False)[:128],
                say=self.log.say,
                on_restart=self.summary.count_restart,
                on_fall=flight.recall,
                announce=self.announce,
            )
        )
        self.sampler = Sampler(self.queue, flight, self.fleet, self.served)
        await enter(self.grader)

    async def prove_sampling(self) -> None:
        """Prove that what is sampled is the trainer's policy."""
        # A server that has just started holds the base model, which after a resume is another.
        await self.served.catch_up()
        problems = self.task.held_out(PROOF_ROLLOUTS)
        await self.fleet.watched(self.served.prove_sampling(problems, self.prompter))

    async def train_step(self) -> None:
        """One step: collect and score, estimate and update, sync, log."""
        recipe, started, begin = self.recipe, dict(self.summary.seconds), time.monotonic()
        batch = self.queue.next(self.step, recipe.run.steps)
        self.log.stopping(batch.gate.rule != "none", batch.reason)
        async with self.saved_if_servers_fail():
            await self.collect(batch)
        gate = batch.gate
        self.queue.batches.popleft()
        async with self.sampler.meanwhile():
            update, trained = await self.learn(batch)
        tokens = await self.count_tokens(batch)
        with self.summary.timed("sync"):
            parity = await self.served.attempt(self.served.sync)
        await self.fleet.new_tokens()  # those of the proof are nobody's
        self.fleet.forget_restarts()

        sampled = rollout_metrics(
            batch.all,
            tokens=tokens,
            audit_share=self.stopping.audits.share,
            weights_version=f"step-{self.step - 1}",
        )
        staleness = cast(float, sampled["staleness"])
        self.summary.add(batch.all, tokens, self.stopping, gate.rule, staleness)
        spent = {
            phase: self.summary.seconds.get(phase, 0.0) - started.get(phase, 0.0)
            for phase in ("rollout", "score", "update", "sync")
        }
        self.log.step(
            self.step,
            rollout=sampled
            | self.summary.token_metrics()
            | {"resampled": batch.resampled, "dropped": len(batch.usable) - trained},
            stopping=gate_metrics(gate) | self.stopping.metrics(),
            ppo=update,
            sync={"parity": parity, "restarts": self.summary.restarts},
            seconds=spent | {"step": time.monotonic() - begin},
        )
        self.rollout_files.write(self.step, batch.all, batch.gate)

    # -- phases --------------------------------------------------------------------------------

    def draw(self, step: int) -> Batch:
        """A step's batch, with the gate that is known by now; nothing is asked yet."""
        seed = self.recipe.run.seed
        # Seeds follow from run, step and place: a resumed step asks for the same completions.
        batch = Batch(
            step,
            first_seed=first_seed(seed, step - 1),
            gate=self.stopping.gate(self.served.version),
            first_problem=self.drawn,
            reason=self.stopping.reason,
        )
        self.ask(batch, self.recipe.rollout.prompts_per_step)
        return batch

    def ask(self, batch: Batch, count: int) -> None:
        """Add n rollouts of each of `count` new problems; audits are drawn before anything is."""
        n = self.recipe.rollout.n
        self.drawn += count
        audits = self.stopping.draw_audits(count * n)
        modes: list[Mode] = ["shadow" if audited else "enforce" for audited in audits]
        history = "history" in self.recipe.stopping.read
        known = {"history": self.stopping.history.log_odds} if history else {}
        batch.ask(islice(self.problems, count), n, modes, **known)

    async def collect(self, batch: Batch) -> None:
        """Fill and score a batch; of a dynamic one, until enough prompts tell something."""
        config = self.recipe.rollout
        await self.fill(batch, f"step {batch.step}: rollouts")
        while config.dynamic_sampling:
            informative = len({rollout.group for rollout in batch.informative()})
            if informative >= config.prompts_per_step or batch.rounds >= DYNAMIC_ROUNDS:
                break
            self.ask(batch, config.prompts_per_step - informative)
            await self.fill(batch, f"step {batch.step}: more")
        usable, failed = len(batch.usable), batch.failed
        if len(failed) > usable:
            raise ServerError(
                f"{len(failed)} of {usable + len(failed)} rollouts failed; the first: "
                f"{failed[0].error}"
            )

    async def fill(self, batch: Batch, label: str) -> None:
        """Wait for all that a batch waits for, score it, ask again for what failed."""
        while True:
            clock, left = partial(self.summary.timed, "rollout"), len(batch.waiting)
            with self.log.phase(label, len(batch.waiting)) as advance:

                def over() -> bool:
                    nonlocal left
                    for _ in range(left - len(batch.waiting)):
                        advance()
                    left = len(batch.waiting)
                    return not left

                await self.sampler.until(over, clock)
            new = batch.unscored
            with self.summary.timed("score"), self.log.phase("grading"):
                async with self.sampler.meanwhile():
                    await score(new, self.grader, self.recipe)
            # One that a fall has taken back meanwhile comes again, and is not scored then.
            batch.scored.update(one.seed for one in new if batch.rollouts.get(one.seed) is one)
            if late := sum((one.error or "").startswith(TIMED_OUT) for one in batch.failed):
                self.log.say(
                    f"warning: {late} rollouts took longer than rollout.timeout = "
                    f"{self.recipe.rollout.timeout:g} s: raise it, or the longest are never learnt "
                    "from"
                )
            batch.ask_failed_again(RESAMPLES)
            await self.count_tokens(batch)
            if not batch.waiting:
                return

    async def announce(self, version: str) -> None:
        """Tell the gateway, while no server samples, whose the tokens are that come then."""
        if self.queue.batches:
            gate = self.queue.batches[-1].gate
            await self.fleet.push_gate(dataclasses.replace(gate, weights_version=version))

    async def learn(self, batch: Batch) -> tuple[dict[str, float], int]:
        """Update actor and critic, then what decides on stopping.

        Returns:
            the update's metrics, and how many rollouts it trained on.
        """
        rollouts = batch.usable
        if self.recipe.rollout.dynamic_sampling:
            rollouts = batch.informative() or rollouts
        async with self.trainer_free, self.fleet.asleep():
            with self.summary.timed("update"), self.log.phase("update"):
                if self.stopping.needs_values:  # as they were said, so before the update
                    known = with_outcome(batch.usable)
                    values = await self.in_thread(self.trainer.critic_values, known)
                    for rollout, said in zip(known, values, strict=True):
                        rollout.values = said
                baselines = None
                if self.recipe.ppo.baseline == "probe":
                    baselines = self.stopping.baselines(rollouts)
                update = await self.in_thread(self.trainer.update, rollouts, baselines)
            self.step += 1
        self.stopping.observe(
            batch.usable,
            update.get("critic_loss"),
            update.get("critic_explained_variance"),
            gated=batch.gate.rule != "none",
        )
        return update, len(rollouts)

    async def in_thread(self, step: Callable[..., T], *arguments: Any) -> T:
        """What a step of the trainer gives while the loop goes on; always in the same thread."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, step, *arguments)

    async def count_tokens(self, batch: Batch) -> int:
        """Add what the servers have sampled since last asked to the batch's tokens.

        Asked once more after the update: by then the last aborts have reached the engine. Where
        they sample for several batches at a time, what came of this one is counted instead.
        """
        new = None if self.queue.ahead else await self.fleet.new_tokens()
        if new is None or batch.tokens is None:
            batch.tokens = None
            return sum(rollout.generated for rollout in batch.rollouts.values())
        batch.tokens += new
        return batch.tokens

    async def evaluate_policy(self, when: str) -> None:
        """For the summary, which a resumed run may know already."""
        wanted = {when: False} | ({f"greedy_{when}": True} if self.recipe.evaluation.greedy else {})
        for name, greedy in wanted.items():
            if name not in self.summary.accuracy:
                report = await self.evaluate(greedy=greedy)
                self.summary.accuracy[name] = report.scores.average

    async def evaluate_if_due(self) -> None:
        """Once a step is saved, as it takes long and may fail; given up when the run is to end."""
        every = self.recipe.evaluation.every
        if every and self.step and self.step % every == 0 and self.log.evaluated != self.step:
            async with self.saved_if_servers_fail():
                (await first_of(self.evaluate(), self.interrupted.wait())).result()

    async def evaluate(self, *, greedy: bool = False) -> Report:
        """Accuracy on held-out problems, without stopping; logged as of the present step."""
        config = self.recipe.evaluation
        problems = self.task.held_out(config.problems)
        sampling = Sampling(
            k=1 if greedy else config.samples,
            temperature=0.0 if greedy else config.temperature,
            concurrency=self.recipe.rollout.concurrency,
        )
        done: dict[int, ProblemResult] = {}
        while True:
            await self.served.attempt(self.served.catch_up)
            try:
                with (
                    self.summary.timed("evaluate"),
                    self.log.phase("evaluating", len(problems) * sampling.k) as advance,
                ):
                    report = await self.fleet.watched(
                        evaluate(
                            self.collector,
                            self.grader,
                            problems,
                            sampling,
                            self.grader.read if self.grader.reads else None,
                            done=done,
                            on_sample=lambda _: advance(),
                            on_problem=lambda result: done.update({result.index: result}),
                        )
                    )
                fault = report.errors[0] if report.errors else None
            except (EvaluationError, ServerFellError) as error:
                if isinstance(error, EvaluationError) and not await self.fleet.down():
                    raise
                await self.served.heal(str(error))
                continue
            if fault is None or not await self.served.heal(fault):
                break
        await self.fleet.new_tokens()  # none of a batch
        self.log.write(self.step, **{"greedy" if greedy else "evaluation": as_dict(report)})
        return report

    # -- state ---------------------------------------------------------------------------------

    async def save(self, *, last: bool, again: bool = False) -> None:
        """Write a checkpoint when one is due, or when this was the last step for now; again: also
        where this step has one."""
        every = self.recipe.checkpoints.every
        due = every and (self.step % every == 0 or self.step == self.recipe.run.steps)
        if (due or last) and (again or not self.checkpoints.has(self.step)):
            async with self.trainer_free:
                with self.summary.timed("checkpoint"):
                    self.checkpoints.save(self.step, self.state(), self.trainer.save)

    @asynccontextmanager
    async def saved_if_servers_fail(self) -> AsyncIterator[None]:
        """The steps before, and what came of this one, where it cannot go on."""
        try:
            yield
        except (ServerError, ServerStartError, WeightSyncError, EvaluationError):
            if self.step:
                self.queue.recall_failed()
                with suppress(CheckpointError):  # the first fault is the reason
                    await self.save(last=True, again=True)
            raise

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the models."""
        return {
            "recipe": self.recipe,
            "ranks": self.trainer.ranks.size,
            "step": self.step,
            "drawn": self.drawn,
            "batches": list(self.queue.batches),
            "stopping": self.stopping,
            "summary": self.summary,
        }

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: same data order, same gate, same optimizers. The recipe's
        settings hold from now on; `resumption` says which must not have changed.

        Raises:
            CheckpointError: it cannot be read.
        """
        state = CheckpointStore.load(checkpoint, self.trainer.load)
        changes = differences(state["recipe"], self.recipe)
        self.step, self.drawn = state["step"], state["drawn"]
        batches: list[Batch] = state["batches"]
        self.summary = state["summary"]
        self.summary.recipe = self.recipe
        learns_anew = any(key.startswith(LEARNS_ANEW) for key in changes)
        if not learns_anew:
            audits = self.stopping.audits
            self.stopping = state["stopping"]
            self.stopping.audits = audits
            self.stopping.warmup.extend(self.recipe.run.steps)
        if batches and any(key.startswith(OF_A_BATCH) for key in changes):
            # Sampled ahead under the old settings: they are drawn again, the same problems.
            self.drawn = min(batch.first_problem for batch in batches)
            batches = []
        self.queue.batches.extend(batches)
        self.log.start = self.step
        for _ in islice(self.problems, self.drawn):
            pass
        self.log.say(f"resumed from {checkpoint} after step {self.step}")
        newest = self.checkpoints.newest()
        if newest is not None and checkpoint.resolve() < newest.resolve():
            self.log.say(f"what {self.recipe.run.output} holds of later steps is dropped")
        for key, (before, now) in changes.items():
            self.log.say(f"changed since: {key} = {now!r}, was {before!r}")
        if learns_anew:
            self.log.say("the stop rule's warm-up begins anew")
