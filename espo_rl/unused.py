"""Settings that have no effect together with others, so that nobody believes they had one.

What was said last counts: a switch turned after a setting makes it idle on purpose, as an ablation
does with what its recipe says, and a setting given for what is switched off is a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espo_gateway.stop.rules import BETA, P_STAR, threshold_of, value_source

#: the keys that say whether a critic server is asked, and whether there is a critic at all
ASKS_CRITIC = "stopping.rule stopping.value stopping.sources stopping.value_head"
NEEDS_CRITIC = f"ppo.advantage ppo.baseline {ASKS_CRITIC}"


#: DeepSpeed's schedulers that have the rate in their own params
SETS_RATE = {"WarmupLR", "WarmupDecayLR", "OneCycle", "LRRangeTest"}


@dataclass(frozen=True)
class Idle:
    """keys: that do nothing `when` it holds of a recipe. switches: the keys that decide on it.
    fix: what would make use of them."""

    keys: str
    switches: str
    when: Callable[[Any], bool]
    fix: str


def _of_kind(kind: str, keys: str) -> Idle:
    return Idle(
        " ".join(f"task.{key}" for key in keys.split()),
        "task.kind",
        # Of a kind that is not known here nothing is known, either.
        lambda recipe: recipe.task.kind in ({"arithmetic", "dataset", "reasoning-gym"} - {kind}),
        f'task.kind = "{kind}"',
    )


def _of_rule(keys: str, switches: str, when: Callable[[Any], bool], fix: str) -> Idle:
    """Without a rule nothing is stopped, however: that is plain PPO."""
    name = " ".join(f"stopping.{key}" for key in keys.split())
    return Idle(
        name,
        " ".join(f"stopping.{key}" for key in switches.split()),
        lambda recipe: recipe.stopping.rule != "none" and when(recipe.stopping),
        fix,
    )


def _is_file(recipe: Any, source: str) -> bool:
    """Whether task.train, or task.eval, names a lone file."""
    return Path(getattr(recipe.task, source) or ".").expanduser().is_file()


def _split(split: str, source: str) -> Idle:
    """A lone file is whichever split it is asked for; a slice of it is one of the file."""
    return Idle(
        f"task.{split}",
        f"task.{source}",
        lambda recipe: _is_file(recipe, source) and "[" not in getattr(recipe.task, split),
        f"a data set of several as task.{source}, or a slice, such as 'train[:90%]'",
    )


def _of_the_hub(subset: str, source: str) -> Idle:
    return Idle(
        f"task.{subset}",
        f"task.{source}",
        lambda recipe: _is_file(recipe, source),
        f"a data set of several as task.{source}, on the hub or in a folder",
    )


def _scheduler(extra: Mapping[str, Any]) -> object:
    given = extra.get("scheduler")
    return given.get("type") if isinstance(given, dict) else None


IDLE = (
    _of_kind("arithmetic", "min_steps max_steps steps"),
    _of_kind(
        "dataset",
        "train eval subset train_split eval_split problem_column answer_column answer_pattern "
        "eval_subset eval_problem_column eval_answer_column eval_answer_pattern",
    ),
    _of_kind("reasoning-gym", "name options"),
    Idle(
        "task.min_steps task.max_steps",
        "task.steps",
        lambda recipe: recipe.task.steps is not None,
        "no task.steps",
    ),
    Idle(
        "task.eval_split task.eval_subset task.eval_problem_column task.eval_answer_column "
        "task.eval_answer_pattern",
        "task.eval",
        lambda recipe: recipe.task.eval is None,
        "task.eval",
    ),
    _of_the_hub("subset", "train"),
    _of_the_hub("eval_subset", "eval"),
    _split("train_split", "train"),
    _split("eval_split", "eval"),
    Idle(
        "task.grader_workers task.grader_timeout",
        "task.grader",
        lambda recipe: recipe.task.grader == "exact",
        'another task.grader than "exact", which needs no process of its own',
    ),
    Idle(
        "task.answer_tags",
        "task.grader",
        lambda recipe: ":" in recipe.task.grader,
        "a built-in task.grader: a function of yours gets the whole text",
    ),
    Idle(
        "task.pattern",
        "task.grader",
        lambda recipe: recipe.task.grader != "regex",
        'task.grader = "regex"',
    ),
    Idle(
        "model.reference ppo.kl_place ppo.kl_estimator",
        "ppo.kl_coefficient",
        lambda recipe: not recipe.ppo.kl_coefficient,
        "ppo.kl_coefficient above 0",
    ),
    Idle(
        "model.lora_alpha model.lora_targets",
        "model.lora_rank",
        lambda recipe: recipe.model.lora_rank is None,
        "model.lora_rank",
    ),
    Idle(
        "model.critic ppo.critic_learning_rate ppo.value_clip",
        NEEDS_CRITIC,
        lambda recipe: not recipe.needs_critic,
        'a critic: ppo.advantage = "gae" with ppo.baseline = "critic"',
    ),
    Idle(
        "ppo.clip_low ppo.clip_high ppo.dual_clip ppo.value_clip",
        "ppo.epochs ppo.minibatches",
        # What an update compares with is what the models say as it begins.
        lambda recipe: recipe.ppo.epochs == recipe.ppo.minibatches == 1,
        "a second optimizer step in an update, so ppo.epochs or ppo.minibatches above 1",
    ),
    Idle(
        "ppo.learning_rate ppo.critic_learning_rate",
        "deepspeed.extra",
        lambda recipe: SETS_RATE.issuperset([_scheduler(recipe.deepspeed.extra)]),
        "no deepspeed.extra.scheduler that has rates of its own",
    ),
    Idle(
        "ppo.whiten",
        "ppo.advantage",
        lambda recipe: recipe.ppo.advantage != "gae",
        'ppo.advantage = "gae"',
    ),
    Idle(
        "ppo.gamma ppo.lam",
        NEEDS_CRITIC,
        lambda recipe: not recipe.needs_critic and recipe.ppo.advantage != "gae",
        'ppo.advantage = "gae"',
    ),
    Idle(
        "servers.critic_url servers.critic_gpus servers.critic_vllm_args",
        ASKS_CRITIC,
        lambda recipe: not recipe.asks_critic,
        'stopping.value = "critic" with a rule that reads it, and no stopping.value_head',
    ),
    Idle(
        "servers.critic_gpus servers.critic_vllm_args",
        "servers.critic_url",
        lambda recipe: recipe.servers.critic_url is not None,
        "a critic server of the run's own, so no servers.critic_url",
    ),
    Idle(
        "servers.policy_servers servers.policy_gpus servers.vllm_args",
        "servers.policy_urls",
        lambda recipe: bool(recipe.servers.policy_urls),
        "policy servers of the run's own, so no servers.policy_urls",
    ),
    Idle(
        "rollout.max_staleness rollout.keep_kv",
        "rollout.schedule",
        lambda recipe: recipe.rollout.schedule == "batch",
        'rollout.schedule = "refill"',
    ),
    Idle(
        "logs.rollouts_megabytes",
        "logs.rollouts",
        lambda recipe: not recipe.logs.rollouts,
        "logs.rollouts = true",
    ),
    _of_rule(
        "beta",
        "rule",
        lambda stopping: threshold_of(stopping.rule).name != "beta",
        "a rule that compares with β, such as value-gated",
    ),
    _of_rule(
        "beta_min beta_max",
        "rule",
        lambda stopping: threshold_of(stopping.rule) is not BETA,
        "a rule that compares a score with β, such as value-gated",
    ),
    _of_rule(
        "p_star p_star_max",
        "rule",
        lambda stopping: threshold_of(stopping.rule) is not P_STAR,
        "a rule that compares with p*, such as success-probability",
    ),
    _of_rule(
        "beta p_star",
        "threshold",
        lambda stopping: stopping.threshold in ("audit", "quantile"),
        'stopping.threshold = "fixed" or "share"',
    ),
    _of_rule(
        "beta_min beta_max p_star_max",
        "threshold",
        lambda stopping: stopping.threshold == "fixed",
        "a threshold that moves",
    ),
    _of_rule(
        "threshold",
        "rule",
        lambda stopping: stopping.rule == "random" and stopping.threshold != "share",
        'another rule than "random", which always follows "share"',
    ),
    _of_rule(
        "target_share",
        "threshold rule",
        lambda stopping: (
            stopping.threshold not in ("share", "quantile") and stopping.rule != "random"
        ),
        'stopping.threshold = "share" or "quantile"',
    ),
    _of_rule(
        "beta_step",
        "threshold rule",
        lambda stopping: stopping.threshold != "share" or stopping.rule == "random",
        'stopping.threshold = "share"',
    ),
    _of_rule(
        "right_lost false_positives confidence evidence",
        "threshold rule",
        lambda stopping: not stopping.bounded,
        'stopping.threshold = "audit"',
    ),
    _of_rule(
        "audited_right",
        "audit_share",
        lambda stopping: not stopping.audit_share,
        "a stopping.audit_share above 0",
    ),
    _of_rule(
        "right_lost",
        "false_positives",
        lambda stopping: stopping.false_positives is not None,
        "no stopping.false_positives, which stands in its place",
    ),
    _of_rule(
        "epsilon",
        "rule",
        lambda stopping: stopping.rule != "value-gated",
        "a rule that multiplies β with V: value-gated",
    ),
    _of_rule(
        "value",
        "rule",
        lambda stopping: value_source(stopping.rule, "constant") != "constant",
        "a rule that takes V from where it is told, such as value-gated",
    ),
    _of_rule(
        "window",
        "rule value warmup",
        lambda stopping: not stopping.estimates,
        'an estimate of success: stopping.value = "stream" with a rule that reads it',
    ),
    _of_rule(
        "constant",
        "rule value",
        lambda stopping: value_source(stopping.rule, stopping.value) != "constant",
        'stopping.value = "constant" with a rule that reads it',
    ),
    _of_rule(
        "sources",
        "rule value",
        lambda stopping: bool(stopping.sources) and not stopping.read,
        'an estimate of success: stopping.value = "stream" with a rule that reads it',
    ),
    _of_rule(
        "value_head",
        "sources rule value",
        lambda stopping: not stopping.reads_critic,
        'stopping.sources = ["critic"], or stopping.value = "critic" with a rule that reads it',
    ),
    _of_rule(
        "value_every",
        "value_head sources rule value",
        lambda stopping: stopping.head is None or not stopping.asks,
        'stopping.value_head with stopping.sources = ["critic"]',
    ),
    _of_rule(
        "ask_every",
        "value_head sources rule value",
        lambda stopping: not stopping.asks or stopping.head is not None,
        'stopping.sources = ["probe"], or ["critic"] without stopping.value_head',
    ),
    _of_rule(
        "ask_growth",
        "sources rule value",
        lambda stopping: not stopping.asks,
        'stopping.sources = ["probe"] or ["critic"]',
    ),
    _of_rule(
        "probe_phrase probe_end",
        "sources rule value",
        lambda stopping: "probe" not in stopping.read,
        'stopping.sources = ["probe"]',
    ),
    _of_rule(
        "warmup_batches",
        "warmup",
        lambda stopping: stopping.warmup != "batches",
        'stopping.warmup = "batches"',
    ),
    _of_rule(
        "warmup_loss warmup_change warmup_share",
        "warmup",
        lambda stopping: stopping.warmup != "critic-loss",
        'stopping.warmup = "critic-loss"',
    ),
    _of_rule(
        "warmup_explained",
        "warmup",
        lambda stopping: stopping.warmup != "explained-variance",
        'stopping.warmup = "explained-variance"',
    ),
)


def unused(recipe: Any, given: Mapping[str, int]) -> Iterator[str]:
    """What is given and does nothing, with what to change.

    Args:
        recipe: a `config.Recipe`, which reads this.
        given: the dotted keys that somebody wrote, with their places: what stands in the recipe's
            file comes first, overrides in their order after it.
    """
    for idle in IDLE:
        if not idle.when(recipe):
            continue
        switches = idle.switches.split()
        turned = max(given.get(switch, -1) for switch in switches)
        for key in idle.keys.split():
            value, default = _value(recipe, key)
            if given.get(key, -2) >= turned and value != default:
                found = ", ".join(f"{one} = {_value(recipe, one)[0]!r}" for one in switches)
                yield (
                    f"{key} = {value!r} has no effect with {found}: leave it out; it needs "
                    f"{idle.fix}"
                )


def _value(recipe: Any, key: str) -> tuple[Any, Any]:
    """A dotted key's value and its default."""
    section, _, name = key.partition(".")
    part = getattr(recipe, section)
    return getattr(part, name), type(part).model_fields[name].get_default(call_default_factory=True)
