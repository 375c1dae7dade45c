"""Whether a tokenizer's chat template can do what a task asks of it."""

from __future__ import annotations

from typing import Any

from espo_rl.config import RecipeError, TaskSection


def check_chat_template(tokenizer: Any, task: TaskSection, model: str) -> None:
    """Raise RecipeError where there is none, or a variable is none of its own."""
    if not task.chat:
        return
    if not tokenizer.chat_template:
        raise RecipeError(
            f"task.chat: the tokenizer of {model} has no chat template; set task.chat = false"
        )
    # The template itself would ignore them in silence.
    template = str(tokenizer.chat_template)
    if unknown := [key for key in task.chat_template_kwargs if key not in template]:
        raise RecipeError(
            f"task.chat_template_kwargs: the chat template of {model} has no " + ", ".join(unknown)
        )
