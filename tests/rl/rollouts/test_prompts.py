"""The prompt of a problem, by the tokenizer and the task's template."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from espo_rl.base_model.train import make_tokenizer
from espo_rl.config import TaskSection
from espo_rl.rollouts.collector import Prompter
from espo_rl.types import Problem

PROBLEM = Problem(id="358c", prompt="358c", answer="164")


def test_plain_prompts_are_the_problem_alone() -> None:
    tokenizer = make_tokenizer()
    ids = Prompter(tokenizer, chat=False)(PROBLEM)
    assert tokenizer.convert_ids_to_tokens(ids) == list("358c")


def test_chat_prompts_open_the_assistants_turn_once() -> None:
    tokenizer = make_tokenizer()
    ids = Prompter(tokenizer)(PROBLEM)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<user>", *"358c", "<assistant>"]


@pytest.mark.parametrize("special", [True, False])
def test_tags_that_are_special_tokens_are_wanted_in_the_answer(special: bool) -> None:
    """By itself a server leaves them out of its text: nobody could tell thoughts from answers."""
    tokenizer, tags = make_tokenizer(), [("[THINK]", "[/THINK]")]
    task = TaskSection(thought_tags=tags)
    assert not Prompter.of(tokenizer, task).special  # the tokenizer knows nothing of them
    tokenizer.add_tokens([*tags[0]], special_tokens=special)
    assert Prompter.of(tokenizer, task).special is special
    assert not Prompter.of(tokenizer, TaskSection()).special


def test_special_tokens_are_not_doubled() -> None:
    """A tokenizer that adds a token of its own to any text must not add it to a template's."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    tokenizer.chat_template = "<eos>" + tokenizer.chat_template
    assert tokenizer.encode("3") == [1, *tokenizer.convert_tokens_to_ids(["3"])]
    assert Prompter(tokenizer)(PROBLEM).count(1) == 1


#: what the templates of Qwen3, Qwen3-Thinking-2507 and DeepSeek-R1 write at a prompt's end
ENDS = {
    "qwen3": (
        "<assistant>{% if enable_thinking is defined and enable_thinking is false %}"
        "<think></think>{% endif %}"
    ),
    "thinking-2507": "<assistant><think>{{ '\n' }}",
    "deepseek-v3.1": "<assistant>{% if thinking %}<think>{% else %}</think>{% endif %}",
}


@pytest.mark.parametrize(
    ("name", "variables", "end", "opened"),
    [
        ("qwen3", {}, "<assistant>", ""),
        ("qwen3", {"enable_thinking": True}, "<assistant>", ""),
        ("qwen3", {"enable_thinking": False}, "<assistant><think></think>", ""),
        ("thinking-2507", {}, "<assistant><think>\n", "<think>"),
        ("deepseek-v3.1", {"thinking": True}, "<assistant><think>", "<think>"),
        ("deepseek-v3.1", {"thinking": False}, "<assistant></think>", ""),
    ],
)
def test_reasoning_models_templates(
    name: str, variables: dict[str, Any], end: str, opened: str
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "\n"])
    tokenizer.chat_template = "<user>{{ messages[-1]['content'] }}" + ENDS[name]
    prompter = Prompter.of(tokenizer, TaskSection(chat_template_kwargs=variables))
    assert tokenizer.decode(prompter(PROBLEM)).replace(" ", "") == f"<user>358c{end}"
    assert prompter.opened(PROBLEM) == opened


@pytest.mark.parametrize(
    ("begun", "opened"),
    [
        ("<assistant><think>Okay, let me see. I begin with the first of them: ", "<think>"),
        ("<assistant><THINK>", "<THINK>"),
        ("<assistant><think>a <think>b</think>", ""),
        ("<assistant><think></think><answer>", ""),
        ("<assistant>", ""),
    ],
)
def test_an_answers_beginning_may_open_a_thought(begun: str, opened: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<user>{{ messages[-1]['content'] }}" + begun
    asked = replace(PROBLEM, prompt="what is <think>?")
    assert Prompter.of(tokenizer, TaskSection()).opened(asked) == opened


def test_a_plain_prompt_may_open_a_thought() -> None:
    asked = replace(PROBLEM, prompt="<think> or [THINK]? 358c[THINK]")
    tags = [("<think>", "</think>"), ("[THINK]", "[/THINK]")]
    for wanted in (tags, tags[:1]):
        prompter = Prompter.of(make_tokenizer(), TaskSection(chat=False, thought_tags=wanted))
        assert prompter.opened(asked) == ("[THINK]" if wanted == tags else "")


@pytest.mark.parametrize(
    ("template", "opened"),
    [
        ("{problem}", ""),
        ("Begin with <think>. {problem}", ""),
        ("{problem} Assistant: <think>\nOkay, ", "<think>"),
        ("<think> {problem} <think></think>", ""),
    ],
)
def test_a_plain_prompts_template_may_open_a_thought(template: str, opened: str) -> None:
    prompter = Prompter.of(make_tokenizer(), TaskSection(chat=False, template=template))
    prompt = template.replace("{problem}", "what is <think>?")
    assert prompter.opened(replace(PROBLEM, prompt=prompt)) == opened


def test_a_long_tag_is_seen() -> None:
    tags = ("<" + "reasoning " * 100 + ">", "</>")
    task = TaskSection(chat=False, template="{problem}" + tags[0], thought_tags=[tags])
    assert Prompter.of(make_tokenizer(), task).opened(PROBLEM) == tags[0]


def test_the_system_prompt_comes_first() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<pad>' if m['role'] == 'system' else '<user>' }}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ids = Prompter(tokenizer, system="add")(PROBLEM)
    tokens = ["<pad>", *"add", "<user>", *"358c", "<assistant>"]
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
