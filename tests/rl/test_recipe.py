"""Recipes: what a user writes, and what they are told when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from espo_rl.config import RECIPES, Recipe, RecipeError, load_recipe
from espo_rl.unused import IDLE as IDLE_KEYS


@pytest.mark.parametrize("name", [recipe.stem for recipe in RECIPES.glob("*.toml")])
def test_every_shipped_recipe_holds(name: str) -> None:
    assert load_recipe(name).model.path


def test_overrides_take_toml_values_and_bare_words() -> None:
    recipe = load_recipe(
        "arithmetic",
        [
            *("run.seed=7", "ppo.learning_rate=1e-4", "ppo.clip_high=1"),
            *("stopping.rule=none", "run.output=runs/x y", 'task.answer_tags=[["<a>", "</a>"]]'),
        ],
    )
    assert (recipe.run.seed, recipe.ppo.learning_rate, recipe.ppo.clip_high) == (7, 1e-4, 1.0)
    assert recipe.task.answer_tags == [("<a>", "</a>")]
    assert (recipe.stopping.rule, str(recipe.run.output)) == ("none", "runs/x y")
    for truth in ("true", "True"):
        assert load_recipe("arithmetic", [f"evaluation.greedy={truth}"]).evaluation.greedy


def test_an_override_takes_a_value_away() -> None:
    """As `--explain` writes it: else a data set of one's own would keep a recipe's pattern."""
    own = ["task.train=mine.jsonl", "task.eval=mine.jsonl", "task.answer_pattern=None"]
    assert load_recipe("qwen2.5-0.5b-gsm8k").task.answer_pattern is not None
    assert load_recipe("qwen2.5-0.5b-gsm8k", own).task.answer_pattern is None
    taken = load_recipe("arithmetic", ["stopping.beta=2", "stopping.beta=None"])
    assert taken.stopping.beta is None
    assert str(load_recipe("arithmetic", ['run.output="None"']).run.output) == "None"
    with pytest.raises(RecipeError, match=r"run\.steps: .*\(got None\)"):
        load_recipe("arithmetic", ["run.steps=None"])


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("ppo.learning_rte=1", ["ppo.learning_rte", "no such key", "learning_rate"]),
        ("nosuch.key=1", ["nosuch", "no such key", "rollout"]),
        ("rollout.n=0", ["rollout.n", "greater than or equal to 1"]),
        ("stopping.rule=luck", ["stopping.rule", "value-gated"]),
        ("stopping.rule=confidence", ["stopping", "surprise"]),
        ("stopping.audit_share=0", ["stopping", "audit_share"]),
        ("ppo.minibatches=10000", ["ppo.minibatches", "rollouts"]),
        ("task.kind=dataset", ["task", "train"]),
        ("task.kind=reasoning-gym", ["task", "name", "chain_sum"]),
        ("task.template=solve this", ["task", "{problem}"]),
        ("task.grader=regex", ["task", "pattern"]),
        ("task.pattern=answer: .*", ["task", "pattern", "group"]),
        ("task.answer_pattern=(", ["task", "answer_pattern", "regular expression"]),
        ("task.grader=task", ["task", "reasoning-gym"]),
        ("task.min_steps=25", ["task", "min_steps = 25", "max_steps = 24"]),
        ("task.steps=[2,27]", ["task.steps", "26"]),
        ("task.steps=[]", ["task.steps", "at least 1 item"]),
        ("nonsense", ["section.key=value"]),
        ("run.steps=5\nppo.learning_rate=1e-3", ["an argument of its own"]),
        ("run.steps.more=1", ["run.steps.more"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_fix(override: str, names: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("arithmetic", [override])
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["deepspeed.offload=optimizer"], ["offload", "zero_stage to 1, 2 or 3"]),
        (["servers.sleep=true", "rollout.max_staleness=1"], ["sleep", "refill"]),
        (["servers.weight_transfer=file"], ["weight_transfer", "weights_path"]),
        (
            ["servers.weight_transfer=ipc", "servers.weights_path=/w"],
            ["weights_path has no effect", "'ipc'"],
        ),
        (
            ["deepspeed.offload=all", "deepspeed.zero_stage=2"],
            ["offload", "zero_stage = 3"],
        ),
        (["ppo.advantage=group", "rollout.n=1"], ["ppo.advantage", "rollout.n"]),
        (["ppo.advantage=group", "ppo.critic_only_steps=2"], ["ppo.critic_only_steps", "gae"]),
        (["ppo.advantage=group", "stopping.warmup=critic-loss"], ["critic-loss", "gae"]),
        (["rollout.dynamic_sampling=true", "rollout.n=1"], ["dynamic_sampling", "rollout.n"]),
        (["ppo.overlong_buffer=200"], ["ppo.overlong_buffer = 200", "rollout.max_tokens = 160"]),
        (["task.chat=false", "task.system=Think."], ["system", "chat = false"]),
        (["task.system=Think.", "task.chat=false"], ["system", "chat = false"]),
        (
            ["ppo.lr_warmup_steps=2", 'deepspeed.extra={scheduler = {type = "OneCycle"}}'],
            ["ppo.lr_warmup_steps", "deepspeed.extra.scheduler"],
        ),
        (
            ["deepspeed.extra={gradient_accumulation_steps = 8}"],
            ["extra.gradient_accumulation_steps", "ppo.micro_batch_tokens"],
        ),
        (
            ["deepspeed.extra={fp16 = {enabled = true}}"],
            ["extra.fp16.enabled", "model.dtype"],
        ),
        (
            ["deepspeed.extra={optimizer = {params = {lr = 1.0}}}"],
            ["deepspeed", "extra.optimizer.params.lr", "ppo.learning_rate"],
        ),
        (
            ["deepspeed.extra={gradient_clipping = 1.0}"],
            ["extra.gradient_clipping", "ppo.max_grad_norm"],
        ),
        (["deepspeed.extra={bf16 = true}"], ["extra.bf16 = True", "table"]),
        (["deepspeed.extra={optimizer = {params = 1}}"], ["extra.optimizer.params = 1", "table"]),
        (
            ["deepspeed.zero_stage=1", "deepspeed.extra={zero_optimization = 3}"],
            ["extra.zero_optimization = 3", "table"],
        ),
        # Rewards that float32, or the noise of a group's, would make equal.
        (["ppo.right_reward=1e-4", "ppo.wrong_reward=0"], ["wrong_reward = 0.0", "by 0.001"]),
        (["ppo.right_reward=1e9", "ppo.wrong_reward=999999999"], ["wrong_reward", "by 1e+06"]),
        # The same greedy answers once more.
        (["evaluation.temperature=0", "evaluation.samples=8"], ["samples = 8", "temperature = 0"]),
        (["evaluation.temperature=0", "evaluation.greedy=true"], ["greedy = true"]),
        (['servers.policy_urls=["http://a:1", "http://a:1/"]'], ["policy_urls", "twice"]),
        (["stopping.min_tokens=161"], ["stopping.min_tokens = 161", "rollout.max_tokens = 160"]),
        (
            ['stopping.sources=["probe"]', "stopping.ask_every=161"],
            ["stopping.ask_every = 161", "rollout.max_tokens = 160"],
        ),
        (
            ['stopping.sources=["probe", "critic"]', "stopping.value_head=h"],
            ["value_head has the engine decide", 'leave "probe" out'],
        ),
        (
            ['stopping.sources=["critic"]', "stopping.value_head=h", "stopping.value_every=161"],
            ["stopping.value_every = 161", "rollout.max_tokens = 160"],
        ),
        (
            ['stopping.sources=["critic"]', "stopping.value_head=h", "stopping.warmup=critic-loss"],
            ["critic-loss", "value_head", "explained-variance"],
        ),
        # What a controller would move at once.
        (["stopping.threshold=share", "stopping.p_star=0.9"], ["p_star = 0.9", "1e-06 to 0.5"]),
        (
            ["stopping.rule=value-gated", "stopping.threshold=share", "stopping.beta=100"],
            ["beta = 100", "0.5 to 20", "fixed"],
        ),
        (
            ["stopping.rule=length", "stopping.threshold=share", "stopping.beta=0.5"],
            ["beta = 0.5", "1 to 1.04858e+06"],
        ),
        # Seeds of a step that would be those of the next one, with what is asked again.
        (["rollout.prompts_per_step=65536", "rollout.n=2"], ["prompts_per_step = 65,536", "n = 2"]),
        (["rollout.n=1366"], ["n = 1,366", "21,845"]),
        (["rollout.n=456", "rollout.dynamic_sampling=true"], ["n = 456", "7,281"]),
    ],
)
def test_settings_that_do_not_go_together_are_named_with_the_fix(
    overrides: list[str], names: list[str]
) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("arithmetic", overrides)
    assert all(name in str(error.value) for name in names)


VALUE_OF_CRITIC = "stopping.value=critic"

#: a scheduler with rates of its own
RATES = "WarmupLR"
#: what is given, and which key of it does nothing
IDLE = [
    (["task.train=data.jsonl"], "task.train"),
    (["task.problem_column=question"], "task.problem_column"),
    (["task.name=chain_sum"], "task.name"),
    (["task.kind=dataset", "task.train=a.jsonl", "task.max_steps=9"], "task.max_steps"),
    (["task.kind=dataset", "task.train=a.jsonl", "task.eval_subset=b"], "task.eval_subset"),
    (["task.kind=reasoning-gym", "task.name=x", "task.eval=b"], "task.eval"),
    (["task.steps=[3]", "task.max_steps=9"], "task.max_steps"),
    (["task.pattern=is (.*)"], "task.pattern"),
    (["model.reference=other"], "model.reference"),
    (["ppo.kl_place=reward"], "ppo.kl_place"),
    (["ppo.kl_estimator=k1"], "ppo.kl_estimator"),
    (["ppo.advantage=group", "model.critic=other"], "model.critic"),
    (["ppo.advantage=group", "ppo.critic_learning_rate=1e-3"], "ppo.critic_learning_rate"),
    (["ppo.advantage=group", "ppo.value_clip=0.2"], "ppo.value_clip"),
    (["ppo.advantage=group", "ppo.lam=0.9"], "ppo.lam"),
    (["servers.critic_url=http://a:1"], "servers.critic_url"),
    (["servers.policy_urls=['http://a:1']", "servers.policy_servers=2"], "servers.policy_servers"),
    (["servers.policy_urls=['http://a:1']", "servers.vllm_args=['--x']"], "servers.vllm_args"),
    (["logs.rollouts=false", "logs.rollouts_megabytes=5"], "logs.rollouts_megabytes"),
    (["stopping.beta=3.0"], "stopping.beta"),
    (["stopping.rule=value-gated", "stopping.p_star=0.1"], "stopping.p_star"),
    (["stopping.p_star=0.1"], "stopping.p_star"),  # the audits set it
    (["stopping.target_share=0.5"], "stopping.target_share"),
    (["stopping.beta_step=0.5"], "stopping.beta_step"),
    (["stopping.threshold=share", "stopping.right_lost=0.1"], "stopping.right_lost"),
    (["stopping.threshold=fixed", "stopping.evidence=3"], "stopping.evidence"),
    (["stopping.rule=random", "stopping.confidence=0.8"], "stopping.confidence"),
    (["stopping.false_positives=0.1", "stopping.right_lost=0.1"], "stopping.right_lost"),
    (["stopping.epsilon=0.3"], "stopping.epsilon"),
    (
        [
            "stopping.rule=regret-only",
            "stopping.threshold=fixed",
            "stopping.audit_share=0",
            "stopping.audited_right=cut",
        ],
        "stopping.audited_right",
    ),
    (["stopping.rule=value-gated", "stopping.constant=0.3"], "stopping.constant"),
    (["stopping.warmup=none", "stopping.warmup_batches=9"], "stopping.warmup_batches"),
    (["stopping.warmup_share=0.5"], "stopping.warmup_share"),
    (["stopping.warmup_explained=0.5"], "stopping.warmup_explained"),
    (["stopping.value=critic"], "stopping.value"),  # p* is of the stream's estimate
    (["stopping.rule=surprise", "stopping.value=constant"], "stopping.value"),
    (["stopping.rule=random", "stopping.threshold=fixed"], "stopping.threshold"),
    (["stopping.rule=regret-only", "stopping.window=3"], "stopping.window"),
    (["stopping.rule=length", "stopping.beta_max=300"], "stopping.beta_max"),
    (["ppo.advantage=group", "ppo.whiten=false"], "ppo.whiten"),
    (["ppo.minibatches=1", "ppo.clip_high=0.28"], "ppo.clip_high"),
    (["ppo.minibatches=1", "ppo.value_clip=0.2"], "ppo.value_clip"),
    (["servers.critic_vllm_args=['--x']"], "servers.critic_vllm_args"),
    (["stopping.value_head=h"], "stopping.value_head"),
    (["stopping.sources=['critic']", "stopping.value_every=8"], "stopping.value_every"),
    (
        ["stopping.sources=['critic']", "stopping.value_head=h", "stopping.ask_every=8"],
        "stopping.ask_every",
    ),
    (["stopping.rule=value-gated", "stopping.value_head=h"], "stopping.value_head"),
    (
        ["stopping.sources=['critic']", "stopping.value_head=h", "servers.critic_url=http://a:1"],
        "servers.critic_url",
    ),
    (["task.grader_workers=3"], "task.grader_workers"),
    (["task.grader_timeout=3"], "task.grader_timeout"),
    (["task.grader=my:own", "task.answer_tags=[]"], "task.answer_tags"),
    (["task.kind=dataset", f"task.train={__file__}", "task.subset=main"], "task.subset"),
    (["task.kind=dataset", f"task.train={__file__}", "task.train_split=x"], "task.train_split"),
    (
        [f"deepspeed.extra={{scheduler = {{type = '{RATES}'}}}}", "ppo.learning_rate=1e-3"],
        "ppo.learning_rate",
    ),
    (
        ["task.kind=dataset", "task.train=a/b", f"task.eval={__file__}", "task.eval_subset=main"],
        "task.eval_subset",
    ),
]


@pytest.mark.parametrize(("overrides", "key"), IDLE)
def test_a_setting_without_an_effect_is_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(RecipeError, match=rf"  {key} = .* has no effect with .*leave it out"):
        load_recipe("arithmetic", overrides)


def test_a_file_is_held_to_the_same(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[model]\npath = "x"\n[task]\ntrain = "data.jsonl"\n')
    with pytest.raises(RecipeError, match=r"task\.train = 'data\.jsonl' has no effect"):
        load_recipe(path)
    assert load_recipe(path, ["task.kind=dataset"]).task.train == "data.jsonl"


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        # Ablations of what a recipe, or a study, says.
        ("espo-7b", ["stopping.rule=none"]),
        ("espo-7b", ["stopping.rule=random"]),
        ("espo-7b", ["stopping.rule=success-probability", "stopping.threshold=audit"]),
        ("espo-7b", ["ppo.advantage=group", "stopping.rule=none", "stopping.warmup=none"]),
        ("arithmetic", ["stopping.right_lost=0.1", "stopping.threshold=share"]),
        ("arithmetic", ["model.critic=x", "ppo.advantage=group"]),
        ("arithmetic", ["servers.policy_urls=['http://a:1']"]),
        ("arithmetic-mixed", ["task.steps=[2]"]),
        ("arithmetic-mixed", ["task.kind=dataset", "task.train=a.jsonl"]),
        # A default that is said does no harm.
        ("arithmetic", ["stopping.beta_step=0.1", "ppo.kl_place=loss"]),
        ("arithmetic", ["stopping.rule=random", "stopping.threshold=share"]),
        # In tokens, as far as nothing moves it.
        ("arithmetic", ["stopping.rule=length", "stopping.threshold=fixed", "stopping.beta=300"]),
        # A critic that only a source asks has what a critic has.
        ("arithmetic", ["ppo.advantage=group", "ppo.lam=0.9", 'stopping.sources=["critic"]']),
        ("arithmetic", ["task.kind=dataset", "task.train=a/b", "task.subset=main"]),
        ("arithmetic", ["stopping.value_head=h", "stopping.rule=none"]),
        ("arithmetic", ["stopping.value_head=h", 'stopping.sources=["probe"]']),
    ],
)
def test_what_is_switched_off_later_is_idle_on_purpose(recipe: str, overrides: list[str]) -> None:
    load_recipe(recipe, overrides)


def test_every_key_of_the_table_is_a_recipes() -> None:
    recipe = load_recipe("arithmetic")
    for idle in IDLE_KEYS:
        for key in f"{idle.keys} {idle.switches}".split():
            section, _, name = key.partition(".")
            assert name in type(getattr(recipe, section)).model_fields


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], True),
        (["ppo.advantage=group"], False),
        (["ppo.advantage=group", "stopping.value=critic", "stopping.rule=surprise"], False),
        (["ppo.advantage=group", "stopping.value=critic", "stopping.rule=value-gated"], True),
    ],
)
def test_a_critic_is_trained_where_something_reads_it(overrides: list[str], needed: bool) -> None:
    assert load_recipe("arithmetic", overrides).needs_critic is needed


@pytest.mark.parametrize(
    ("overrides", "schedule", "ahead", "cap"),
    [
        ([], "batch", 0, None),
        (["rollout.schedule=refill"], "refill", 1, 2.0),
        (["rollout.max_staleness=1"], "refill", 1, 2.0),  # as it was said before
        (["rollout.schedule=refill", "rollout.max_staleness=3"], "refill", 3, 2.0),
        (["rollout.max_staleness=2", "ppo.importance_cap=1.5"], "refill", 2, 1.5),
        (["rollout.max_staleness=2", "rollout.schedule=batch"], "batch", 0, None),
        (["rollout.schedule=refill", "rollout.temperature=0.8"], "refill", 1, None),
        (
            [
                "rollout.schedule=refill",
                "rollout.temperature=0.8",
                "servers.logprobs_mode=processed_logprobs",
            ],
            "refill",
            1,
            2.0,
        ),
    ],
)
def test_what_a_schedule_implies(
    overrides: list[str], schedule: str, ahead: int, cap: float | None
) -> None:
    recipe = load_recipe("arithmetic", ["rollout.temperature=1.0", *overrides])
    assert (recipe.rollout.schedule, recipe.rollout.ahead) == (schedule, ahead)
    assert recipe.ppo.importance_cap == cap
    # What is written down says it all, and reads as the same.
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.schedule=refill", "rollout.max_staleness=0"], "set max_staleness to 1 or more"),
        (["rollout.schedule=batch", "rollout.max_staleness=1"], "rollout.max_staleness = 1 has no"),
        (["rollout.keep_kv=false"], "rollout.keep_kv = False has no"),
        (["rollout.schedule=refil"], "'batch' or 'refill'"),
        (["rollout.max_staleness=-1"], "rollout.max_staleness"),
        (["rollout.max_staleness=many"], "rollout.max_staleness"),
    ],
)
def test_a_schedule_that_is_none_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("arithmetic", overrides)


def test_a_missing_recipe_lists_those_that_ship() -> None:
    with pytest.raises(RecipeError, match="arithmetic"):
        load_recipe("no-such-recipe")


def test_a_file_that_is_no_toml_says_where(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(RecipeError, match=r"bad\.toml"):
        load_recipe(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ['stopping.sources=["history"]'],
        ['stopping.sources=["probe"]', "ppo.advantage=group"],
        ['stopping.sources=["probe", "critic"]'],
    ],
)
def test_a_baseline_without_its_probes_is_refused(overrides: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"ppo\.baseline"):
        load_recipe("arithmetic", ["ppo.baseline=probe", *overrides])


@pytest.mark.parametrize("rule", ["none", "random", "regret-only"])
def test_sources_that_a_later_rule_does_not_read_are_idle(tmp_path: Path, rule: str) -> None:
    """As any setting that an ablation makes idle: said first, they are no mistake."""
    text = (RECIPES / "arithmetic.toml").read_text()
    path = tmp_path / "probing.toml"
    path.write_text(text.replace("[stopping]", '[stopping]\nsources = ["probe", "critic"]'))
    assert load_recipe(path).stopping.asks
    recipe = load_recipe(path, [f"stopping.rule={rule}"])
    assert not recipe.stopping.asks
    assert not recipe.asks_critic
    if rule != "none":
        with pytest.raises(RecipeError, match=r"stopping\.sources"):
            load_recipe("arithmetic", [f"stopping.rule={rule}", 'stopping.sources=["probe"]'])


def test_a_head_is_read_by_whoever_reads_a_critic_and_takes_none() -> None:
    head, group = "stopping.value_head=h", "ppo.advantage=group"
    for reads in (["stopping.sources=['critic']"], ["stopping.rule=value-gated", VALUE_OF_CRITIC]):
        recipe = load_recipe("arithmetic", [*reads, head])
        assert recipe.needs_critic  # for its advantages
        recipe = load_recipe("arithmetic", [*reads, head, group])
        assert str(recipe.stopping.head) == "h"
        assert not recipe.needs_critic
        assert load_recipe("arithmetic", [*reads, group]).needs_critic
    unread = load_recipe("arithmetic", [head, "stopping.rule=none"])
    assert unread.stopping.head is None


def test_a_baseline_of_probes_trains_no_critic() -> None:
    settings = ["ppo.baseline=probe", 'stopping.sources=["probe"]', "ppo.lam=0.95"]
    assert not load_recipe("arithmetic", settings).needs_critic
