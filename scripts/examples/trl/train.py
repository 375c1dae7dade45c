"""TRL's GRPO, its rollouts sampled, and the failed ones stopped, by the gateway.

  python -m espo_gateway.vllm_plugin MODEL --port 8000
  python -m espo_gateway --upstream http://127.0.0.1:8000 --target-share 0.1
  python scripts/examples/trl/train.py MODEL --steps 3

Sums, so that nothing is downloaded; what a trainer of your own needs of it are `Rollouts` and
`with_stops`.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from openai import OpenAI
from trl import GRPOConfig, GRPOTrainer

from espo_gateway.client import Outcome, outcomes
from espo_rl.ppo.parameters import gathered, tensor_specs
from espo_rl.servers.weights import WeightPublisher

Reward = Callable[..., list[float]]


class Rollouts:
    """TRL's `rollout_func`: a completion for every prompt, from the gateway.

    Args:
        gateway: its URL.
        server: vLLM's own URL, which gets the policy's weights before it samples; None where TRL
            brings them there itself (`use_vllm=True`).
        espo: what the requests ask of the gateway's monitor, e.g. {"min_tokens": 16}.
    """

    def __init__(
        self, gateway: str, server: str | None = None, espo: dict[str, Any] | None = None
    ) -> None:
        self.client = OpenAI(base_url=gateway + "/v1", api_key="none")
        self.model = self.client.models.list().data[0].id
        self.server = server
        self.espo = espo or {}

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        if self.server is not None:
            asyncio.run(self.publish(self.server, trainer))
        arguments, tokenizer = trainer.args, trainer.processing_class
        prompt_ids = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            for prompt in prompts
        ]
        answer = self.client.completions.create(
            model=self.model,
            prompt=prompt_ids,
            max_tokens=arguments.max_completion_length,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            logprobs=0,
            extra_body={"top_k": arguments.top_k, "return_token_ids": True, "espo": self.espo},
        )
        choices: list[Any] = sorted(answer.choices, key=lambda choice: choice.index)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [choice.token_ids for choice in choices],
            "logprobs": [choice.logprobs.token_logprobs for choice in choices],
            # Any other name goes on to the reward functions.
            "outcome": sorted(outcomes(answer), key=lambda outcome: outcome.index),
        }

    async def publish(self, server: str, trainer: GRPOTrainer) -> None:
        """The policy's weights into vLLM, through shared memory."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        async with WeightPublisher([server]) as publisher:
            version = str(trainer.state.global_step)
            await publisher.publish(tensor_specs(model), gathered(model), version=version)


def with_stops(reward: Reward) -> Reward:
    """A reward function of TRL's, but that a stopped rollout gets the paper's reward of failure."""

    @functools.wraps(reward)
    def rewards(outcome: list[Outcome], **columns: Any) -> list[float]:
        return [o.reward(graded) for o, graded in zip(outcome, reward(**columns), strict=True)]

    return rewards


def right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The reward that the trainer had before."""
    texts = [completion[0]["content"] for completion in completions]
    return [1.0 if text == a else 0.0 for text, a in zip(texts, answer, strict=True)]


def sums(count: int) -> Dataset:
    rng = random.Random(0)
    pairs = [(rng.randrange(50), rng.randrange(50)) for _ in range(count)]
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"{a}+{b}="}], "answer": str(a + b)}
            for a, b in pairs
        ]
    )


def trainer_for(
    model: str, rollouts: Rollouts, out: Path, *, steps: int, **settings: Any
) -> GRPOTrainer:
    """Ready to `train`. settings: of TRL's `GRPOConfig`."""
    return GRPOTrainer(
        model=model,
        reward_funcs=[with_stops(right)],
        train_dataset=sums(256),
        rollout_func=rollouts,
        args=GRPOConfig(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=64,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            **settings,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the checkpoint that vLLM was started with")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gateway", default="http://127.0.0.1:8100", metavar="URL")
    parser.add_argument("--server", default="http://127.0.0.1:8000", metavar="URL")
    parser.add_argument("--out", type=Path, default=Path("trl"), metavar="FOLDER")
    arguments = parser.parse_args()
    rollouts = Rollouts(arguments.gateway, arguments.server)
    trainer_for(arguments.model, rollouts, arguments.out, steps=arguments.steps).train()


if __name__ == "__main__":
    main()
