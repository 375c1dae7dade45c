"""The recipe: every setting of a run, read from TOML, checked before anything starts.

    recipe = load_recipe("arithmetic.toml", ["run.seed=2", "ppo.learning_rate=1e-4"])

Unknown keys fail. The values here are defaults that work; where the paper (arXiv 2605.29860) gives
another, the comment says so.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from espo_gateway.stop.rules import RuleName, ValueName, value_source
from espo_gateway.stop.threshold_control import Bound
from espo_gateway.stop.told import ASKED, SourceName
from espo_rl.types import AuditedRight
from espo_rl.unused import unused

# Bounds are those of what takes the numbers: float32, Parquet's 32-bit columns, vLLM's requests,
# timers. Infinities and NaN are none anywhere.
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]
Tag = Annotated[str, Field(min_length=1)]
Between = Annotated[float, Field(ge=1e-6, le=1 - 1e-6)]  # a share that is neither 0 nor 1
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Some = Annotated[int, Field(ge=1, le=65_536)]  # what is asked, or started, at once
Processes = Annotated[int, Field(ge=1, le=1024)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
#: vLLM takes no higher one, and in silence makes 0.01 of what is lower
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 2.0
Temperature = Annotated[float, Field(ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE)]
Steps = Annotated[int, Field(ge=1, le=26)]  # of an arithmetic problem: it names them by letters

#: what the chat template is always called with
CHAT_TEMPLATE_OWN = {
    "conversation",
    "messages",
    "tokenize",
    "add_generation_prompt",
    "return_dict",
    "return_tensors",
    "continue_final_message",
}

#: of importance weights, where tokens are of older weights
USUAL_CAP = 2.0

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """The recipe cannot be read or does not hold; the message names the key and the fix."""


def _server_url(url: str) -> str:
    """Refuse what no server can be reached at."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{url!r}: {error}; a port lies in 1 to 65535") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"{url!r} must be written as http://host:port, with a port of 1 to 65535")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ValueError(f"{url!r}: leave out /v1")
    return url


def _greedy_or_not(temperature: float) -> float:
    if temperature and not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise ValueError(
            f"must be 0, which is greedy, or lie in {LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE}"
        )
    return temperature


ServerUrl = Annotated[str, AfterValidator(_server_url)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Run(Section):
    """Where the run writes, how long it goes, what it draws from."""

    output: Path = Path("runs/run")
    steps: Annotated[int, Field(ge=1, le=99_999_999)] = 100  # files are named by eight digits
    seed: Seed = 0


class Model(Section):
    """Hugging Face checkpoints, by folder or hub name."""

    path: str
    critic: str | None = None  # initial critic; the policy itself when not given
    reference: str | None = None  # for the KL term; the initial policy when not given
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False


class TaskSection(Section):
    """What is asked, and how answers are graded."""

    kind: str = "arithmetic"  # or "dataset", "reasoning-gym": a name in tasks/kinds.py
    # arithmetic
    min_steps: Steps = 2
    max_steps: Steps = 24
    # One of these numbers of steps instead; list one twice, and it comes twice as often
    steps: Annotated[list[Steps], Field(min_length=1)] | None = None
    # dataset: a JSONL, JSON, Parquet or CSV file, a folder, or a name on the Hugging Face hub
    train: str | None = None
    eval: str | None = None  # without one, a tenth of the training problems is held out
    subset: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    # Columns: dots lead into nested ones; of a chat column the last user message counts
    problem_column: str = "problem"
    answer_column: str = "answer"
    answer_pattern: str | None = None  # group 1 of its last match: "#### (.*)" for GSM8K
    # Where the evaluation set is laid out differently. None: as above, but the subset only of train
    eval_subset: str | None = None
    eval_problem_column: str | None = None
    eval_answer_column: str | None = None
    eval_answer_pattern: str | None = None
    # reasoning-gym: the data set's name and its own settings
    name: str | None = None
    options: dict[str, Any] = {}
    # The prompt: through the tokenizer's chat template, or as plain text
    chat: bool = True
    system: str | None = None
    # Variables of the chat template: { enable_thinking = false } for Qwen3's
    chat_template_kwargs: dict[str, Any] = {}
    template: str = "{problem}"
    # "exact", "math", "regex", "task" (reasoning-gym's own) or "package.module:function"
    grader: str = "exact"
    pattern: str | None = None  # regex: group 1 of its last match is the answer given
    # Built-in graders read no thoughts: what stands before the last closing tag does not count, and
    # one that is open has no answer. Of a text with answer tags only the last such answer counts
    thought_tags: list[tuple[Tag, Tag]] = [("<think>", "</think>")]
    answer_tags: list[tuple[Tag, Tag]] = [("<answer>", "</answer>")]
    grader_workers: Processes = 2
    grader_timeout: Seconds = 10.0

    @model_validator(mode="after")
    def _needs(self) -> TaskSection:
        if self.kind == "dataset" and self.train is None:
            raise ValueError('kind = "dataset" needs train = "FILE.jsonl" or a hub name')
        if self.kind == "reasoning-gym" and self.name is None:
            raise ValueError('kind = "reasoning-gym" needs name, such as "chain_sum"')
        if self.grader == "regex" and self.pattern is None:
            raise ValueError('grader = "regex" needs pattern, such as "answer: (.*)"')
        for key in ("pattern", "answer_pattern", "eval_answer_pattern"):
            pattern = getattr(self, key)
            try:
                groups = 1 if pattern is None else re.compile(pattern).groups
            except re.error as error:
                raise ValueError(
                    f"{key} = {pattern!r} is no regular expression: {error}"
                ) from error
            if groups < 1:
                raise ValueError(f"{key} = {pattern!r} needs a group (...) around the answer")
        if self.grader == "task" and self.kind != "reasoning-gym":
            raise ValueError('grader = "task" is that of kind = "reasoning-gym"')
        if self.chat_template_kwargs and not self.chat:
            raise ValueError("chat_template_kwargs has no effect with chat = false: leave one out")
        if fixed := self.chat_template_kwargs.keys() & CHAT_TEMPLATE_OWN:
            raise ValueError(f"chat_template_kwargs must leave {', '.join(sorted(fixed))} as it is")
        if "{problem}" not in self.template:
            raise ValueError("template must hold {problem}")
        if self.system and not self.chat:
            raise ValueError(
                "system has no effect with chat = false: leave it out, say it in template, or set "
                "chat = true"
            )
        if self.min_steps > self.max_steps:
            raise ValueError(
                f"min_steps = {self.min_steps} must not be above max_steps = {self.max_steps}"
            )
        return self


class RolloutSection(Section):
    """How completions are sampled."""

    prompts_per_step: Some = 16
    n: Some = 8
    temperature: Temperature = 1.0
    max_tokens: Count = 1024
    concurrency: Some = 64
    timeout: Seconds = 600.0
    retries: Some = 5
    # "batch": a step's rollouts are sampled, then trained on. "refill": whenever the engine has
    # room, it samples for the next steps; rollouts under way go on when the weights change
    schedule: Literal["batch", "refill"] = "batch"
    # refill: of how many updates before a step its tokens may be, and so how many steps are sampled
    # ahead: 1, unless more is said. Above 0 it means refill
    max_staleness: Annotated[int, Field(ge=0, le=16)] = 0
    # DAPO: drop prompts whose rollouts all got the same reward, and sample others in their stead
    dynamic_sampling: bool = False

    @property
    def ahead(self) -> int:
        """How many steps are sampled ahead of the one that is due."""
        return self.max_staleness if self.schedule == "refill" else 0

    @model_validator(mode="before")
    @classmethod
    def implied(cls, given: Any) -> Any:
        """What is given, with what one of the two says about the other."""
        if isinstance(given, dict) and given.get("schedule") == "refill":
            return {"max_staleness": 1} | given
        if isinstance(given, dict) and given.get("max_staleness"):
            return {"schedule": "refill"} | given
        return given

    @model_validator(mode="after")
    def _schedule(self) -> RolloutSection:
        if self.schedule == "refill" and not self.max_staleness:
            raise ValueError(
                'schedule = "refill" samples ahead: set max_staleness to 1 or more, or schedule = '
                '"batch"'
            )
        return self


class Stopping(Section):
    """When a rollout is given up, and how that is learned (rows 2-8 of the method)."""

    rule: RuleName = "success-probability"
    value: ValueName = "stream"
    # How the threshold is set: β, or p* of the rules that compare a value with it.
    # "audit": as loose as known outcomes allow under the bound below; "share": the paper's
    # controller; "quantile": once, so that target_share of the warm-up's rollouts would stop;
    # "fixed". Rule "random" always follows "share"
    threshold: Literal["audit", "share", "quantile", "fixed"] = "audit"
    # "fixed", and where "share" starts; None: 7.0 (the paper's) and 0.05, but "share" starts at
    # the quantile when there is a warm-up
    beta: Positive | None = None
    p_star: Between | None = None
    epsilon: Positive = 0.2
    constant: Number = 1.0
    min_tokens: Count = 4
    # What a stopped rollout is worth; None: ppo.wrong_reward. A lower one makes an answer that is
    # wrong but finished the better of two failures, in a group the one that is learnt
    failure_reward: Number | None = None
    # Generated to the end though stopped. Of each prompt's rollouts it is one at least, where there
    # are 4 or more, so that none is left without a finished one
    audit_share: Share = 0.1
    # What a rollout is that was stopped though its audit found it right. "whole": right, trained on
    # to its end; "cut": right, trained on up to the cut; "failed": a failure, as in the paper
    audited_right: AuditedRight = "whole"
    # threshold = "audit": of the right rollouts at most this share is stopped, with this
    # confidence, judged on the outcomes of the last `evidence` batches. With false_positives (the
    # paper's figure) in its place: of the stopped ones at most that share would have been right
    right_lost: Between = 0.05
    false_positives: Between | None = None
    confidence: Between = 0.9
    evidence: Count = 20
    # Batch statistics and z
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    clip: Positive = 10.0
    # threshold = "share" or "quantile" (paper: share 0.25, step 0.1)
    target_share: Between = 0.25
    beta_step: Positive = 0.1  # of β, or of log p*/(1 - p*)
    beta_min: Positive = 0.5
    beta_max: Positive = 20.0
    p_star_max: Between = 0.5
    # Warm-up. "critic-loss" is the paper's rule: below warmup_loss three times, or moved by less
    # than warmup_change, or forced on after warmup_share of all steps
    warmup: Literal["none", "batches", "critic-loss", "explained-variance"] = "batches"
    warmup_batches: Count = 4
    warmup_share: Share = 0.1
    warmup_loss: Positive = 0.5
    warmup_change: Positive = 0.1
    warmup_explained: Share = 0.2
    # Success estimator: fitted on the last `window` batches
    window: Count = 6
    # What it reads beside the stream's own numbers. "history": how often the prompt was solved in
    # earlier steps; "probe": how likely the policy itself finds the reference answer by now;
    # "critic": V of a critic server. The latter two are asked every ask_every tokens, further apart
    # as a rollout grows: by ask_growth of its length
    sources: list[SourceName] = []
    ask_every: Count = 96
    ask_growth: Annotated[float, Field(ge=0, le=1e9)] = 0.25
    # The probe: answers are read after probe_phrase, and end with probe_end
    probe_phrase: Annotated[str, Field(min_length=1)] = "\n\nThe final answer is \\boxed{"
    probe_end: str = "}"

    @property
    def asks(self) -> bool:
        """Whether an estimate reads a source that must be asked."""
        return not ASKED.isdisjoint(self.sources)

    @property
    def bound(self) -> Bound:
        """What threshold = "audit" keeps."""
        return Bound.chosen(self.right_lost, self.false_positives, self.confidence)

    @model_validator(mode="after")
    def _together(self) -> Stopping:
        bounded = self.threshold == "audit" and self.rule not in ("none", "random")
        explained = self.warmup == "explained-variance" and self.rule != "none"
        source = value_source(self.rule, self.value)
        if self.audit_share == 0.0:
            for needed, what in (
                (source == "stream", "an estimator"),
                (bounded, 'threshold = "audit"'),
                (explained and source != "critic", 'warmup = "explained-variance"'),
            ):
                if needed:
                    raise ValueError(
                        f"audit_share = 0 with {what}: stopping hides the outcomes it learns from; "
                        "set audit_share above 0 (0.1 is usual)"
                    )
        if self.sources and source != "stream":
            raise ValueError(
                f"sources = {self.sources} are read by the estimate of success, which rule = "
                f'"{self.rule}" with value = "{self.value}" has none of: set value = "stream" and '
                "a rule that has a V, or sources = []"
            )
        if self.rule == "confidence":
            raise ValueError(
                'rule = "confidence" needs the logprobs of many alternatives, which rollouts do '
                'not record: set rule = "surprise", or try it on a gateway alone'
            )
        if not self.beta_min < self.beta_max:
            raise ValueError(f"beta_min = {self.beta_min} must be below beta_max = {self.beta_max}")
        return self


class Ppo(Section):
    """The update (paper: learning_rate 1e-6, global batch 64)."""

    learning_rate: Positive = 1e-6
    critic_learning_rate: Positive | None = None  # None: learning_rate
    # Over so many training steps the rate grows from 1/n to all of it; the actor's first one is
    # that after critic_only_steps
    lr_warmup_steps: Whole = 0
    weight_decay: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    epochs: Count = 1
    minibatches: Count = 2
    micro_batch_tokens: Count = 16384  # padded tokens in one forward pass
    critic_only_steps: Whole = 0  # at the start, the actor stands still
    max_grad_norm: Positive = 1.0
    # Advantages: with a critic (GAE), or against the other rollouts of the prompt (GRPO)
    advantage: Literal["gae", "group"] = "gae"
    # gae: V before each token: a critic's, or the estimate of success that reads an answer probe
    # (stopping.sources), as it stood when it was last asked: credit by token without a critic
    baseline: Literal["critic", "probe"] = "critic"
    gamma: Share = 1.0
    lam: Share = 1.0
    whiten: bool = True  # gae: advantages to mean 0 and deviation 1 over the batch's tokens
    # Losses
    clip_low: Positive = 0.2
    clip_high: Positive = 0.2
    # Bound of the ratio where the advantage is negative (3.0 is usual); None: there is none
    dual_clip: Annotated[float, Field(gt=1, le=1e9)] | None = None
    value_clip: Positive | None = None
    # The mean over a minibatch's tokens, or over each rollout's and then over rollouts
    aggregation: Literal["token-mean", "sequence-mean"] = "token-mean"
    entropy_bonus: Number = 0.0
    kl_coefficient: Annotated[float, Field(ge=0, le=1e9)] = 0.0  # to model.reference
    kl_place: Literal["loss", "reward"] = "loss"  # reward: of each token
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    # The server's logprobs against the trainer's: each token's policy loss is weighted by
    # min(π_trainer/π_server, cap). With rollout.schedule = "refill" it is 2.0 unless another is
    # said, where the server's logprobs are those sampled from: of a token of older weights they are
    # these weights' own
    importance_cap: Positive | None = None
    # Rewards
    right_reward: Number = 1.0
    wrong_reward: Number = -1.0
    # DAPO's soft overlong penalty: grows to 1 over so many tokens before max_tokens
    overlong_buffer: Whole = 0

    @property
    def kl_in_reward(self) -> bool:
        """Whether rewards, and so advantages, depend on what the policy says."""
        return bool(self.kl_coefficient) and self.kl_place == "reward"

    @model_validator(mode="after")
    def _rewards(self) -> Ppo:
        if not self.wrong_reward < self.right_reward:
            raise ValueError(
                f"wrong_reward = {self.wrong_reward} must be below right_reward = "
                f"{self.right_reward}"
            )
        return self


#: What DeepSpeed's config names too, and where the recipe says it
_OF_THE_RECIPE = {
    "optimizer.params.lr": "ppo.learning_rate",
    "optimizer.params.weight_decay": "ppo.weight_decay",
    "gradient_clipping": "ppo.max_grad_norm",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "bf16.enabled": "model.dtype",
}


class DeepSpeed(Section):
    """DeepSpeed's own settings; `extra` is laid over its JSON config, section by section."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    # To the CPU; all: parameters too. The optimizer is torch's AdamW; DeepSpeed's own is faster
    # there, but compiled on first use: extra.optimizer.params.torch_adam = false
    offload: Literal["none", "optimizer", "all"] = "none"
    extra: dict[str, Any] = {}

    @model_validator(mode="after")
    def _own_keys(self) -> DeepSpeed:
        for path, key in _OF_THE_RECIPE.items():
            part: Any = self.extra
            for name in path.split("."):
                part = part.get(name) if isinstance(part, dict) else None
            if part is not None:
                raise ValueError(f"extra.{path} has no effect: set {key}")
        return self

    @model_validator(mode="after")
    def _offload(self) -> DeepSpeed:
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError(
                'offload = "optimizer" needs ZeRO: set zero_stage to 1, 2 or 3, or offload = "none"'
            )
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                'offload = "all" moves parameters too, which only ZeRO-3 can: set zero_stage = 3, '
                'or offload = "optimizer"'
            )
        return self


class Servers(Section):
    """Policy servers, critic server, gateway. What is given by URL is not started, but used."""

    policy_servers: Processes = 1  # how many vLLM servers to start
    policy_urls: list[ServerUrl] = []
    critic_url: ServerUrl | None = None
    # CUDA_VISIBLE_DEVICES of what is started: one entry for each policy server, such as ["0,1"].
    # Give the trainer's ranks other ones (deepspeed --include localhost:2,3).
    policy_gpus: list[str] = []
    critic_gpus: str | None = None
    # How weights come to the servers. "shared-memory": of one host, on any device; "file": through
    # weights_path, on a disk that all see; "ipc", "nccl": vLLM's own, from GPU to GPU, where
    # trainer and server use one GPU, or different ones. "auto": a file if weights_path is given,
    # else shared memory, but "nccl" to servers on other hosts
    weight_transfer: Literal["auto", "shared-memory", "file", "ipc", "nccl"] = "auto"
    weights_path: Path | None = None
    # One GPU for servers and trainer: while the trainer updates, the servers give back the memory
    # of theirs (vLLM's sleep mode), and have it again for the sync
    sleep: bool = False
    vllm_args: list[str] = []
    critic_vllm_args: list[str] = []
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"
    start_timeout: Seconds = 600.0
    hang_timeout: Seconds = 120.0  # a server that makes no token for so long is restarted
    restarts: Whole = 3  # of one server in a row, then the run gives up
    parity_tolerance: Positive = 1e-3  # max |Δ logprob|; about 0.3 in bfloat16

    @model_validator(mode="after")
    def _weights(self) -> Servers:
        if self.weight_transfer == "file" and self.weights_path is None:
            raise ValueError(
                'weight_transfer = "file" needs weights_path, which all servers can read'
            )
        if self.weights_path is not None and self.weight_transfer not in ("auto", "file"):
            raise ValueError(
                f"weights_path has no effect with weight_transfer = {self.weight_transfer!r}: "
                'leave one of them out, or set weight_transfer = "file"'
            )
        return self

    @model_validator(mode="after")
    def _gpus(self) -> Servers:
        if self.policy_gpus and len(self.policy_gpus) != self.policy_servers:
            raise ValueError(
                f"policy_gpus has {len(self.policy_gpus)} entries for policy_servers = "
                f"{self.policy_servers}; give one to each"
            )
        if len({url.rstrip("/") for url in self.policy_urls}) < len(self.policy_urls):
            raise ValueError("policy_urls names a server twice; name each once")
        return self


class Evaluation(Section):
    """Accuracy on held-out problems, sampled; before training, every N steps, and at the end."""

    problems: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    samples: Some = 1
    temperature: Annotated[float, AfterValidator(_greedy_or_not)] = 1.0
    every: Whole = 0
    greedy: bool = False  # before and after training, at temperature 0 too


class Checkpoints(Section):
    """Written every N steps and at the end; the newest `keep` stay."""

    every: Whole = 20
    keep: Count = 2


class Logs(Section):
    """Where the numbers go beside metrics.jsonl."""

    tensorboard: bool = True
    wandb: str | None = None  # a Weights & Biases project
    rollouts: bool = True  # rollouts/step-*.parquet
    rollouts_megabytes: Positive = 1024.0  # the oldest files go when they come to more


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
    logs: Logs = Logs()

    @property
    def failure_reward(self) -> float:
        """What a stopped rollout is worth."""
        given = self.stopping.failure_reward
        return self.ppo.wrong_reward if given is None else given

    @property
    def asks_critic(self) -> bool:
        """Whether the gate takes V from a critic server, or an estimate that reads it."""
        stopping = self.stopping
        source = value_source(stopping.rule, stopping.value)
        return source == "critic" or "critic" in stopping.sources

    @property
    def needs_critic(self) -> bool:
        """Whether a critic is trained: for GAE, or for a stop rule that asks a critic server."""
        gae = self.ppo.advantage == "gae" and self.ppo.baseline == "critic"
        return gae or self.asks_critic

    @model_validator(mode="before")
    @classmethod
    def _corrected(cls, given: Any) -> Any:
        """Tokens of older weights are weighted, where it is known how likely they were."""
        names = ("rollout", "ppo", "servers")
        parts = [given.get(name, {}) for name in names] if isinstance(given, dict) else [None]
        if not all(isinstance(part, dict) for part in parts):
            return given
        rollout, ppo, servers = parts
        refill = RolloutSection.implied(rollout).get("schedule") == "refill"
        known = rollout.get("temperature", 1.0) == 1.0 or (
            servers.get("logprobs_mode") == "processed_logprobs"
        )
        if not (refill and known):
            return given
        return {**given, "ppo": {"importance_cap": USUAL_CAP} | ppo}

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        rollouts = self.rollout.prompts_per_step * self.rollout.n
        if rollouts < self.ppo.minibatches:
            raise ValueError(
                f"ppo.minibatches = {self.ppo.minibatches} but a step has only {rollouts} rollouts "
                "(rollout.prompts_per_step × rollout.n)"
            )
        if self.ppo.baseline == "probe":
            if "probe" not in self.stopping.sources:
                raise ValueError(
                    'ppo.baseline = "probe" needs what probes say: set stopping.sources = ["probe"]'
                )
            if self.needs_critic or self.ppo.advantage != "gae":
                raise ValueError(
                    'ppo.baseline = "probe" stands in the place of a critic: set ppo.advantage = '
                    '"gae", and no stopping.value or sources that ask a critic'
                )
        if self.servers.sleep and self.rollout.max_staleness:
            raise ValueError(
                "servers.sleep has the servers sleep while the trainer updates, and "
                "rollout.max_staleness has them sample: leave one of them out"
            )
        if self.ppo.advantage == "group" and self.rollout.n < 2:
            raise ValueError("ppo.advantage = 'group' needs rollout.n of at least 2")
        if self.rollout.dynamic_sampling and self.rollout.n < 2:
            raise ValueError(
                "rollout.dynamic_sampling compares the rollouts of a prompt: set rollout.n to at "
                "least 2, or leave it out"
            )
        if self.ppo.overlong_buffer > self.rollout.max_tokens:
            raise ValueError(
                f"ppo.overlong_buffer = {self.ppo.overlong_buffer} must not be above "
                f"rollout.max_tokens = {self.rollout.max_tokens}"
            )
        if self.ppo.lr_warmup_steps and "scheduler" in self.deepspeed.extra:
            raise ValueError(
                "ppo.lr_warmup_steps has no effect with deepspeed.extra.scheduler: leave one out"
            )
        if (
            self.ppo.importance_cap is not None
            and self.rollout.temperature != 1.0
            and self.servers.logprobs_mode == "raw_logprobs"
        ):
            raise ValueError(
                "ppo.importance_cap needs the logprobs that were sampled from; at a temperature "
                "other than 1 raw ones are not: servers.logprobs_mode = 'processed_logprobs'"
            )
        if not self.needs_critic:
            for key, used in (
                ("ppo.critic_only_steps", self.ppo.critic_only_steps),
                ("stopping.warmup = 'critic-loss'", self.stopping.warmup == "critic-loss"),
            ):
                if used:
                    raise ValueError(
                        f"{key} needs a critic, and ppo.advantage = 'group' trains none: leave it "
                        "out, or set ppo.advantage = 'gae'"
                    )
        return self


def differences(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, dotted; with both values.

    `before` may be of an older version: what it has no key for was as the default is.
    """
    pairs = {}
    for section in Recipe.model_fields:
        part, old = getattr(now, section), getattr(before, section, None)
        for key, field in type(part).model_fields.items():
            was = getattr(old, key, field.get_default(call_default_factory=True))
            pairs[f"{section}.{key}"] = (was, getattr(part, key))
    return {key: values for key, values in pairs.items() if values[0] != values[1]}


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
    places = {
        f"{section}.{key}": 0
        for section, keys in data.items()
        for key in (keys if isinstance(keys, dict) else ())
    }
    for place, override in enumerate(overrides, 1):
        key = _override(data, override)
        places[".".join(key.split(".")[:2])] = place
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"recipe {file}:\n" + "\n".join(map(_explain, error.errors()))) from error
    if idle := list(unused(recipe, places)):
        raise RecipeError(f"recipe {file}:\n" + "\n".join(f"  {one}" for one in idle))
    return recipe


def _override(data: dict[str, Any], override: str) -> str:
    """Lay it over the data; its dotted key."""
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
    return ".".join([*sections, key])


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
