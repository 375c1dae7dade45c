"""The sections of a recipe: every setting with its default, and what it must be. `stopping` has a
file of its own.

A comment above or beside a setting is its explanation (`explain`). The values here are defaults
that work; what the paper (arXiv 2605.29860) gives stands in the recipes espo-1.5b and espo-7b.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from espo_rl.config.bounds import (
    Count,
    GreedyOrNot,
    Megabytes,
    NotNegative,
    Number,
    Positive,
    Processes,
    Seconds,
    Section,
    Seed,
    ServerUrl,
    Share,
    Some,
    Steps,
    Tag,
    Temperature,
    Tokens,
    Updates,
    Whole,
    Written,
)
from espo_rl.config.stopping import Stopping as Stopping  # checkpoints of before name it as here
from espo_rl.types import SEEDS

#: rounds of new prompts for those that dynamic sampling drops; then the step trains on what it has
DYNAMIC_ROUNDS = 3
#: times that a failed rollout is asked for again
RESAMPLES = 2
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

Tags = Annotated[tuple[Tag, Tag], Strict(False)]


class Run(Section):
    """Where the run writes, how long it goes, what it draws from."""

    output: Written = Path("runs/run")  # its folder; all that it leaves is there
    steps: Annotated[int, Field(ge=1, le=99_999_999)] = 100  # of training
    seed: Seed = 0  # of the problems, their order, and what is sampled


class Model(Section):
    """Hugging Face checkpoints, by folder or hub name."""

    path: str  # of the policy
    critic: str | None = None  # where the critic begins; the policy itself when not given
    reference: str | None = None  # for the KL term; the initial policy when not given
    # Of weights, in the trainer and in the servers. In bfloat16 a change shows when it has grown to
    # half of a number's last place: at 1e-6 after tens of updates, so for short runs float32
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False  # less memory in the update, for a third more time
    liger: bool = False  # Liger's fused kernels in the update, on a GPU
    # LoRA: the policy's weights stay as they are, adapters of this rank beside its linear layers
    # learn. A critic is a head on frozen layers then, and without model.reference the KL term
    # compares with the policy without its adapters
    lora_rank: Annotated[int, Field(ge=1, le=4096)] | None = None
    lora_alpha: Positive | None = None  # adapters count alpha / rank; None: twice the rank
    # Names of layers, such as ["q_proj", "v_proj"]; None: all linear ones but the head
    lora_targets: Annotated[list[Tag], Field(min_length=1)] | None = None


class TaskSection(Section):
    """What is asked, and how answers are graded."""

    kind: str = "arithmetic"  # or "dataset", "reasoning-gym": a name in tasks/kinds.py
    min_steps: Steps = 2  # arithmetic: how many additions a problem has at least
    max_steps: Steps = 24  # and at most
    # One of these numbers of steps instead; list one twice, and it comes twice as often
    steps: Annotated[list[Steps], Field(min_length=1)] | None = None
    # dataset: a JSONL, JSON, Parquet or CSV file, a folder, or a name on the Hugging Face hub
    train: str | None = None
    eval: str | None = None  # without one, a tenth of the training problems is held out
    subset: str | None = None  # of a data set on the hub
    train_split: str = "train"  # of it, what is trained on
    eval_split: str = "test"  # and what is evaluated on
    # Columns: dots lead into nested ones; of a chat column the last user message counts
    problem_column: str = "problem"
    answer_column: str = "answer"  # the answer, or a text that ends with it
    answer_pattern: str | None = None  # group 1 of its last match: "#### (.*)" for GSM8K
    # Where the evaluation set is laid out differently. None: as above, but the subset only of train
    eval_subset: str | None = None
    eval_problem_column: str | None = None  # None: problem_column
    eval_answer_column: str | None = None  # None: answer_column
    eval_answer_pattern: str | None = None  # None: answer_pattern
    name: str | None = None  # reasoning-gym: the data set's
    options: dict[str, Any] = {}  # reasoning-gym: the data set's own settings
    chat: bool = True  # prompts through the tokenizer's chat template; false: as plain text
    system: str | None = None  # message of the chat
    # Variables of the chat template: { enable_thinking = false } for Qwen3's
    chat_template_kwargs: dict[str, Any] = {}
    template: str = "{problem}"  # of the prompt; {problem} stands for the problem
    # "exact", "math", "regex", "task" (reasoning-gym's own) or "package.module:function"
    grader: str = "exact"
    pattern: str | None = None  # regex: group 1 of its last match is the answer given
    # Built-in graders read no thoughts: what stands before the last closing tag does not count, and
    # one that is open has no answer
    thought_tags: list[Tags] = [("<think>", "</think>")]
    # Of a text with answer tags only the last such answer counts
    answer_tags: list[Tags] = [("<answer>", "</answer>")]
    grader_workers: Processes = 2  # that grade; one that crashes costs one rollout
    grader_timeout: Seconds = 10.0  # of one answer, which is wrong after it

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


def with_schedule(given: dict[str, Any]) -> dict[str, Any]:
    """A rollout section as it is given, with what schedule and max_staleness say of each other."""
    if given.get("schedule") == "refill":
        return {"max_staleness": 1} | given
    return ({"schedule": "refill"} if given.get("max_staleness") else {}) | given


class RolloutSection(Section):
    """How completions are sampled."""

    prompts_per_step: Some = 16  # how many problems
    n: Some = 8  # rollouts of each prompt
    temperature: Temperature = 1.0  # of sampling in training
    max_tokens: Tokens = 1024  # of one rollout at most
    concurrency: Some = 64  # rollouts under way at a time
    timeout: Seconds = 600.0  # of one request
    retries: Some = 5  # of a request that failed on its way
    # "batch": a step's rollouts are sampled, then trained on. "refill": whenever the engine has
    # room, it samples for the next steps; rollouts under way go on when the weights change
    schedule: Literal["batch", "refill"] = "batch"
    # refill: of how many updates before a step its tokens may be, and so how many steps are sampled
    # ahead: 1, unless more is said. Above 0 it means refill
    max_staleness: Annotated[int, Field(ge=0, le=16)] = 0
    # refill: what is under way when the weights change keeps the keys and values of its tokens so
    # far, which are of older weights; false: they are computed anew, a prefill of all that runs
    keep_kv: bool = True
    # DAPO: drop prompts whose rollouts all got the same reward, and sample others in their stead
    dynamic_sampling: bool = False

    @property
    def ahead(self) -> int:
        """How many steps are sampled ahead of the one that is due."""
        return self.max_staleness if self.schedule == "refill" else 0

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, given: Any) -> Any:
        return with_schedule(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _seeds(self) -> RolloutSection:
        rounds = DYNAMIC_ROUNDS if self.dynamic_sampling else 1
        # Seeds name the rollouts under way: those of two steps must differ.
        most = SEEDS // (rounds * (1 + RESAMPLES))
        if self.prompts_per_step * self.n > most:
            raise ValueError(
                f"prompts_per_step = {self.prompts_per_step:,} × n = {self.n:,} are more than the "
                f"{most:,} rollouts that a step has seeds for, with those asked again: lower one"
            )
        return self

    @model_validator(mode="after")
    def _schedule(self) -> RolloutSection:
        if self.schedule == "refill" and not self.max_staleness:
            raise ValueError(
                'schedule = "refill" samples ahead: set max_staleness to 1 or more, or schedule = '
                '"batch"'
            )
        return self


class Ppo(Section):
    """The update."""

    learning_rate: Positive = 1e-6  # of the actor
    critic_learning_rate: Positive | None = None  # of the critic; None: learning_rate
    # Over so many training steps the rate grows from 1/n to all of it; the actor's first one is
    # that after critic_only_steps
    lr_warmup_steps: Updates = 0
    weight_decay: NotNegative = 0.0  # AdamW's
    epochs: Count = 1  # passes over the rollouts of a step
    minibatches: Count = 2  # optimizer steps in each
    micro_batch_tokens: Tokens = 16384  # padded ones in one forward pass
    critic_only_steps: Updates = 0  # at the start, the actor stands still
    max_grad_norm: Positive = 1.0  # gradients are clipped to it
    # Advantages: with a critic (GAE), or against the other rollouts of the prompt (GRPO)
    advantage: Literal["gae", "group"] = "gae"
    # gae: V before each token: a critic's, or the estimate of success that reads an answer probe
    # (stopping.sources), as it stood when it was last asked: credit by token without a critic
    baseline: Literal["critic", "probe"] = "critic"
    gamma: Share = 1.0  # discount of the returns
    lam: Share = 1.0  # λ of GAE
    whiten: bool = True  # gae: advantages to mean 0 and deviation 1 over the batch's tokens
    clip_low: Positive = 0.2  # the ratio is clipped below 1 minus this
    clip_high: Positive = 0.2  # and above 1 plus this
    # Bound of the ratio where the advantage is negative (3.0 is usual); None: there is none
    dual_clip: Annotated[float, Field(gt=1, le=1e9)] | None = None
    value_clip: Positive | None = None  # V is kept within this of what it was; None: it is not
    # The mean over a minibatch's tokens, or over each rollout's and then over rollouts
    aggregation: Literal["token-mean", "sequence-mean"] = "token-mean"
    entropy_bonus: Number = 0.0  # weight of the entropy in the loss
    kl_coefficient: NotNegative = 0.0  # weight of the KL to model.reference
    kl_place: Literal["loss", "reward"] = "loss"  # in the loss, or in the reward of each token
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # of http://joschu.net/blog/kl-approx.html
    # The server's logprobs against the trainer's: each token's policy loss is weighted by
    # min(π_trainer/π_server, cap). With rollout.schedule = "refill" it is 2.0 unless another is
    # said, where the server's logprobs are those sampled from: of a token of older weights they are
    # these weights' own
    importance_cap: Positive | None = None
    right_reward: Number = 1.0  # of a right answer
    wrong_reward: Number = -1.0  # of a wrong one
    # DAPO's soft overlong penalty: grows to 1 over so many tokens before max_tokens
    overlong_buffer: Whole = 0

    @property
    def kl_in_reward(self) -> bool:
        """Whether rewards, and so advantages, depend on what the policy says."""
        return bool(self.kl_coefficient) and self.kl_place == "reward"

    @model_validator(mode="after")
    def _rewards(self) -> Ppo:
        # What differs by less is taken for rounding, and in float32 it may be.
        size = max(1.0, abs(self.wrong_reward), abs(self.right_reward))
        if self.right_reward - self.wrong_reward < 1e-3 * size:
            raise ValueError(
                f"wrong_reward = {self.wrong_reward} must be below right_reward = "
                f"{self.right_reward}, by {1e-3 * size:g} at least"
            )
        return self


#: What DeepSpeed's config names too, and where the recipe says it
_OF_THE_RECIPE = {
    "optimizer.params.lr": "ppo.learning_rate",
    "optimizer.params.weight_decay": "ppo.weight_decay",
    "gradient_clipping": "ppo.max_grad_norm",
    # A step's gradient is of all its rollouts; DeepSpeed would divide it once more.
    "gradient_accumulation_steps": "ppo.micro_batch_tokens",
    "train_batch_size": "rollout.prompts_per_step and rollout.n",
    "train_micro_batch_size_per_gpu": "ppo.micro_batch_tokens",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "bf16.enabled": "model.dtype",
    "fp16.enabled": "model.dtype",
}


class DeepSpeed(Section):
    """DeepSpeed's own settings."""

    zero_stage: Literal[0, 1, 2, 3] = (
        0  # what the ranks share: 1 optimizer, 2 and gradients, 3 and parameters
    )
    # To the CPU; all: parameters too. The optimizer is torch's AdamW; DeepSpeed's own is faster
    # there, but compiled on first use: extra.optimizer.params.torch_adam = false
    offload: Literal["none", "optimizer", "all"] = "none"
    extra: dict[str, Any] = {}  # laid over DeepSpeed's JSON config, section by section

    @model_validator(mode="after")
    def _own_keys(self) -> DeepSpeed:
        for path, key in _OF_THE_RECIPE.items():
            *tables, last = path.split(".")
            part: Any = self.extra
            for depth, name in enumerate(tables, 1):
                part = part.get(name, {})
                if not isinstance(part, dict):
                    where = ".".join(tables[:depth])
                    raise ValueError(f"extra.{where} = {part!r} must be a table of settings")
            if part.get(last) is not None:
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
    policy_urls: list[ServerUrl] = []  # running servers, http://host:port, in their place
    critic_url: ServerUrl | None = None  # a running critic server
    # CUDA_VISIBLE_DEVICES of what is started: one entry for each policy server, such as ["0,1"].
    # Give the trainer's ranks other ones (deepspeed --include localhost:2,3)
    policy_gpus: list[str] = []
    critic_gpus: str | None = None  # the same of the critic server
    # How weights come to the servers. "shared-memory": of one host, on any device; "file": through
    # weights_path, on a disk that all see; "ipc", "nccl": vLLM's own, from GPU to GPU, where
    # trainer and server use one GPU, or different ones. "auto": a file if weights_path is given,
    # else shared memory, but "nccl" to servers on other hosts
    weight_transfer: Literal["auto", "shared-memory", "file", "ipc", "nccl"] = "auto"
    weights_path: Written | None = None  # of the file
    # One GPU for servers and trainer: while the trainer updates, the servers give back the memory
    # of theirs (vLLM's sleep mode), and have it again for the sync
    sleep: bool = False
    vllm_args: list[str] = []  # of policy servers that are started
    critic_vllm_args: list[str] = []  # of a critic server that is started
    # Whether the servers' logprobs are those before the temperature, or those sampled from
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"
    start_timeout: Seconds = 600.0  # for a server to be there
    # A server that makes no token for so long is restarted; or that answers no call about weights,
    # but these may take two minutes at least
    hang_timeout: Seconds = 120.0
    restarts: Whole = 3  # of one server in a row, then the run gives up
    # mean |Δ logprob| of the probe, server against trainer; None: 1e-3, and 0.3 in bfloat16
    parity_tolerance: Positive | None = None

    @property
    def weights_timeout(self) -> float:
        """Seconds that one call about weights may take: a large model may come from a slow disk."""
        return max(self.hang_timeout, 120.0)

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

    problems: Annotated[int, Field(ge=1, le=1_000_000)] = 256  # how many, held out
    samples: Some = 1  # of each
    temperature: GreedyOrNot = 1.0  # 0 is greedy
    every: Updates = 0  # between two; 0: before and after training alone
    greedy: bool = False  # before and after training, at temperature 0 too

    @model_validator(mode="after")
    def _greedy(self) -> Evaluation:
        if not self.temperature and (self.samples > 1 or self.greedy):
            given = "greedy = true" if self.greedy else f"samples = {self.samples}"
            raise ValueError(
                f"{given} at temperature = 0 asks for the same answers again: leave it out, or set "
                "another temperature"
            )
        return self


class Checkpoints(Section):
    """What `--resume` goes on from; written at the end, too."""

    every: Updates = 20  # between two; 0: none but at an interruption
    keep: Count = 2  # the newest ones stay


class Logs(Section):
    """Where the numbers go beside metrics.jsonl."""

    tensorboard: bool = True  # event files
    wandb: str | None = None  # a Weights & Biases project
    rollouts: bool = True  # rollouts/step-*.parquet
    rollouts_megabytes: Megabytes = 1024.0  # the oldest files go when they come to more
