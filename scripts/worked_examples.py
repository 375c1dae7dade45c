"""A small pretrained model learns to write two of reasoning-gym's tasks out, by a short SFT.

SmolLM2-135M-Instruct answers neither as it is. Some hundred worked examples teach it the form, not
the matter: how many legs a lobster has and what 15 times 10 is, it must know or learn from rewards,
and its errors come as they come. No example is of a held-out problem.

  python scripts/worked_examples.py --model HuggingFaceTB/SmolLM2-135M-Instruct \\
      --out runs/real/base --tasks leg_counting

Writes a Hugging Face checkpoint, and beside it worked.json: examples, tokens, seconds, losses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark.arguments import count, positive
from espo_gateway.files import written_whole
from espo_gateway.optional import needed
from espo_rl.config import TaskSection
from espo_rl.dry_run.footprint import Machine
from espo_rl.record.output import OutputError, check_empty
from espo_rl.tasks.gym import GymTask
from espo_rl.tasks.task import TaskError

#: after the steps; what `stopping.probe_phrase` leads to
ANSWER = "\n\nThe final answer is \\boxed{%s}"


def legs(row: Mapping[str, Any]) -> str:
    """leg_counting: each animal's legs times how many, and the sum so far."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    lines, total = [], 0
    for animal, number in row["metadata"]["animals"].items():
        each = ANIMALS[animal]
        total += number * each
        lines.append(f"{animal}: {number} * {each} = {number * each}, total {total}")
    return "\n".join(lines)


def letters(row: Mapping[str, Any]) -> str:
    """letter_counting: each word spelt, how often the letter is in it, and the sum so far."""
    letter, total, lines = row["metadata"]["target_letter"], 0, []
    for word in row["metadata"]["span"]:
        number = word.lower().count(letter)
        total += number
        lines.append(f"{' '.join(word)}: {number}, total {total}")
    return "\n".join(lines)


WORKED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "leg_counting": legs,
    "letter_counting": letters,
}
#: of the data sets, as the recipe and the studies ask for them
OPTIONS: dict[str, dict[str, Any]] = {"leg_counting": {"max_animals": 3, "max_instances": 9}}


def section(task: str) -> TaskSection:
    """The task as it is trained on."""
    options = OPTIONS.get(task, {})
    return TaskSection(kind="reasoning-gym", name=task, options=options, grader="math")


def examples(task: str, count: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """Prompts and completions as chats, of problems that no evaluation asks."""
    problems = GymTask(section(task)).training(seed)
    return [
        {
            "prompt": [{"role": "user", "content": problem.prompt}],
            "completion": [
                {
                    "role": "assistant",
                    "content": WORKED[task](problem.extra) + ANSWER % problem.answer,
                }
            ],
        }
        for problem in islice(problems, count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--tasks", nargs="+", choices=WORKED, default=list(WORKED), help="(default: both)"
    )
    parser.add_argument("--examples", type=count, default=320, help="of each task (default: 320)")
    parser.add_argument("--learning-rate", type=positive, default=2e-4, help="(default: 2e-4)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        check_empty(options.out, "--out", whole=True)
        needed("trl", "dev")
        with written_whole(options.out) as folder:
            train(options, folder)
    except (ImportError, OSError, OutputError, TaskError, ValueError) as error:
        parser.error(str(error))


def train(options: argparse.Namespace, out: Path) -> None:
    """Write the checkpoint. Raises OSError: the model cannot be loaded; transformers' message."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [row for task in options.tasks for row in examples(task, options.examples, options.seed)]
    machine = Machine.here()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            output_dir=str(out),
            num_train_epochs=1,
            per_device_train_batch_size=8,
            learning_rate=options.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=5,
            bf16=not machine.slow_bfloat16,
            use_cpu=not machine.gpus,
            gradient_checkpointing=False,
            completion_only_loss=True,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
    )
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    trainer.model.to(torch.bfloat16).save_pretrained(out)
    trainer.processing_class.save_pretrained(out)
    history = trainer.state.log_history
    said = {
        **{"model": options.model, "tasks": options.tasks, "examples_each": options.examples},
        **{"learning_rate": options.learning_rate, "seed": options.seed},
        "tokens": max(int(row.get("num_tokens", 0)) for row in history),
        "seconds": round(seconds, 1),
        "losses": [row["loss"] for row in history if "loss" in row],
    }
    (out / "worked.json").write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
