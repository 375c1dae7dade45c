"""TRL's side: GRPO as it comes, with transformers' own generation, on the same work."""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trainer_benchmark.cases import CASES, GROUP, LEARNING_RATE, PROMPT, SHAPES
from trainer_benchmark.turns import Meter, Turns


class Measured(GRPOTrainer):
    """Knows how long it sampled and graded."""

    sampled_s = sampled_processor_s = 0.0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        started, processor = time.perf_counter(), time.process_time()
        made = super()._generate_and_score_completions(inputs)
        self.sampled_s = time.perf_counter() - started
        self.sampled_processor_s = time.process_time() - processor
        self.sampled = int(made["completion_mask"].sum())
        return made


class Turn(TrainerCallback):
    """A step of the trainer is a turn; waits for the next after each."""

    def __init__(self, turns: Turns) -> None:
        self.trainer: Any = None
        self._turns, self._meter = turns, Meter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self._turns.answer(ready=True)
        return self._next(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        step, processor = time.perf_counter() - self._began, time.process_time() - self._processor
        self._meter.look()
        self._turns.answer(
            update_s=step - self.trainer.sampled_s,
            update_processor_s=processor - self.trainer.sampled_processor_s,
            step_s=step,
            rollout_s=self.trainer.sampled_s,
            peak_memory_mb=self._meter.peak,
            tokens=self.trainer.sampled,
        )
        return self._next(control)

    def _next(self, control: Any) -> Any:
        if not self._turns.wait():
            control.should_training_stop = True
        self._began, self._processor = time.perf_counter(), time.process_time()
        return control


def main(name: str, model: str, rollouts: int) -> None:
    turns = Turns()
    case = CASES[name]
    shape = replace(SHAPES[case.shape], rollouts=rollouts)
    turn = Turn(turns)
    prompts = [{"prompt": PROMPT.format(10 + i)} for i in range(shape.rollouts // GROUP)]
    with tempfile.TemporaryDirectory() as folder:
        turn.trainer = Measured(
            model=model,
            reward_funcs=lambda completions, **_: [
                float(i % 3 == 0) for i in range(len(completions))
            ],
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=min(shape.rows, rollouts),
                gradient_accumulation_steps=max(1, rollouts // shape.rows),
                num_generations=GROUP,
                max_completion_length=shape.tokens,
                # The same work for both sides: nothing ends before its time.
                generation_kwargs={"min_new_tokens": shape.tokens},
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                temperature=1.0,
                beta=0.0,
                # As here: with float32 weights for the optimizer
                use_cpu=not torch.cuda.is_available(),
                bf16=shape.dtype == "bfloat16",
                model_init_kwargs={"dtype": "float32"},
                gradient_checkpointing=False,
                max_steps=1_000_000,
                logging_steps=1_000_000,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(prompts),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[turn],
            peft_config=None
            if case.lora is None
            else LoraConfig(r=case.lora, lora_alpha=2 * case.lora, target_modules="all-linear"),
        )
        turn.trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
