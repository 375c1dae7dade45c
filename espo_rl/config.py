"""The recipe: every setting of a run, read from TOML, checked before anything starts.

    recipe = load_recipe("arithmetic.toml", ["run.seed=2", "ppo.learning_rate=1e-4"])

Unknown keys fail. The values here are defaults that work; where the paper (arXiv 2605.29860) gives
another, the comment says so.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from espo_gateway.rules import RuleName
from espo_rl.rewards import GraderName

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """The recipe cannot be read or does not hold; the message names the key and the fix."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Run(Section):
    """Where the run writes, how long it goes, what it draws from."""

    output: Path = Path("runs/run")
    steps: Count = 100
    seed: int = 0


class Model(Section):
    """Hugging Face checkpoints, by folder or hub name."""

    path: str
    critic: str | None = None  # initial critic; the policy itself when not given
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False


class TaskSection(Section):
    """What is asked. `chat` sends the problem through the tokenizer's chat template."""

    kind: Literal["arithmetic", "jsonl"] = "arithmetic"
    train: Path | None = None
    eval: Path | None = None
    min_steps: Count = 2
    max_steps: Annotated[int, Field(ge=1, le=26)] = 24
    chat: bool = True
    system: str | None = None
    grader: GraderName = "exact"

    @model_validator(mode="after")
    def _files(self) -> TaskSection:
        if self.kind == "jsonl" and self.train is None:
            raise ValueError('kind = "jsonl" needs train = "FILE.jsonl"')
        return self


class RolloutSection(Section):
    """How completions are sampled."""

    prompts_per_step: Count = 16
    n: Count = 8
    temperature: Positive = 1.0
    max_tokens: Count = 1024
    concurrency: Count = 64
    timeout: Positive = 600.0
    retries: Count = 5


class Stopping(Section):
    """When a rollout is given up, and how that is learned (rows 2-8 of the method)."""

    rule: RuleName = "success-probability"
    value: Literal["constant", "stream"] = "stream"
    beta: Positive | None = None  # None: calibrated on the warm-up; paper: 7.0
    epsilon: Positive = 0.2
    constant: float = 1.0
    p_star: Annotated[float, Field(gt=0, lt=1)] = 0.05
    min_tokens: Count = 4
    failure_reward: float = -1.0
    audit_share: Share = 0.1
    # Batch statistics and z
    decay: Share = 0.99
    smoothing: Share = 0.9
    clip: Positive = 10.0
    # Threshold controller (paper: share 0.25, step 0.1)
    target_share: Share = 0.25
    beta_step: float = 0.1
    beta_min: Positive = 0.5
    beta_max: Positive = 20.0
    # Warm-up: "batches" counts them; "critic-loss" is the paper's rule
    warmup: Literal["batches", "critic-loss"] = "batches"
    warmup_batches: Count = 4
    warmup_share: Share = 0.1  # critic-loss: forced on after this share of steps
    warmup_loss: Positive = 0.5
    warmup_change: Positive = 0.1
    # Success estimator: fitted on the last `window` batches
    window: Count = 6

    @model_validator(mode="after")
    def _audit(self) -> Stopping:
        uses_estimator = self.rule == "success-probability" or (
            self.rule == "value-gated" and self.value == "stream"
        )
        if uses_estimator and self.audit_share == 0.0:
            raise ValueError(
                "audit_share = 0 with an estimator: stopping hides the outcomes it is fitted on; "
                "set audit_share above 0 (0.1 is usual)"
            )
        return self


class Ppo(Section):
    """The update (paper: learning_rate 1e-6, global batch 64)."""

    learning_rate: Positive = 1e-6
    critic_learning_rate: Positive | None = None  # None: learning_rate
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: float = 0.0
    epochs: Count = 1
    minibatches: Count = 2
    micro_batch_tokens: Count = 16384  # padded tokens in one forward pass
    clip_low: Positive = 0.2
    clip_high: Positive = 0.2
    value_clip: Positive | None = None
    gamma: Share = 1.0
    lam: Share = 1.0
    entropy_bonus: float = 0.0
    whiten: bool = True
    bootstrap_length: bool = False  # V after a rollout cut by max_tokens
    max_grad_norm: Positive = 1.0
    wrong_reward: float = -1.0
    right_reward: float = 1.0


class DeepSpeed(Section):
    """DeepSpeed's own settings; `extra` is merged into its JSON config as it stands."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    extra: dict[str, Any] = {}


class Servers(Section):
    """The policy server and the gateway. With `policy_url` given, no vLLM is started."""

    policy_url: str | None = None
    # For a policy server on another machine: a file on a disk that both see. On this machine
    # weights go through shared memory.
    weights_path: Path | None = None
    vllm_args: list[str] = []
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"
    start_timeout: Positive = 600.0
    parity_tolerance: Positive = 1e-3  # max |Δ logprob|; about 0.3 in bfloat16


class Evaluation(Section):
    """Accuracy on held-out problems, sampled; before training, every N steps, and at the end."""

    problems: Count = 256
    samples: Count = 1
    temperature: Annotated[float, Field(ge=0)] = 1.0
    every: Annotated[int, Field(ge=0)] = 0


class Checkpoints(Section):
    """Written every N steps and at the end; the newest `keep` stay."""

    every: Annotated[int, Field(ge=0)] = 20
    keep: Count = 2


class Recipe(Section):
    """A whole run."""

    run: Run = Run()
    model: Model
    task: TaskSection = TaskSection()
    rollout: RolloutSection = RolloutSection()
    stopping: Stopping = Stopping()
    ppo: Ppo = Ppo()
    deepspeed: DeepSpeed = DeepSpeed()
    servers: Servers = Servers()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()

    @model_validator(mode="after")
    def _batch(self) -> Recipe:
        rollouts = self.rollout.prompts_per_step * self.rollout.n
        if rollouts < self.ppo.minibatches:
            raise ValueError(
                f"ppo.minibatches = {self.ppo.minibatches} but a step has only {rollouts} rollouts "
                "(rollout.prompts_per_step × rollout.n)"
            )
        return self


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe: a file, or the name of one that ships with the package.

    Args:
        overrides: `section.key=value`, the value in TOML (bare words are taken as strings).

    Raises:
        RecipeError: naming the key at fault and what to change.
    """
    file = Path(path)
    if not file.exists() and (RECIPES / f"{path}.toml").exists():
        file = RECIPES / f"{path}.toml"
    try:
        data = tomllib.loads(file.read_text())
    except FileNotFoundError as error:
        shipped = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise RecipeError(f"no recipe {path}: give a TOML file or one of: {shipped}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"recipe {file}: {error}") from error
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"recipe {file}:\n" + "\n".join(map(_explain, error.errors()))) from error


def _override(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *sections, key = dotted.strip().split(".")
    if not equals or not sections:
        raise RecipeError(f"override {override!r}: write it as section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise RecipeError(f"override {override!r}: {section} is not a section")
    data[key] = value


def _explain(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        *parents, _ = error["loc"]
        section: Any = Recipe
        for parent in parents:
            section = section.model_fields[parent].annotation
        return (
            f"  {where}: no such key; {'.'.join(map(str, parents)) or 'a recipe'} has: "
            + ", ".join(section.model_fields)
        )
    return f"  {where}: {error['msg']} (got {error['input']!r})" if where else f"  {error['msg']}"
