"""The work of `espo_rl.base_model`: demonstrations, training, the checkpoint."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

import torch
import transformers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from espo_gateway.files import read_object, written_whole
from espo_rl.base_model.slips import Kind, Slip, slips
from espo_rl.record.output import OutputError, check_empty
from espo_rl.record.progress import progress_bar
from espo_rl.tasks.arithmetic import Arithmetic
from espo_rl.types import Problem

SPECIAL_TOKENS = ("<pad>", "<eos>", "<user>", "<assistant>")
ALPHABET = "0123456789+-=#" + ascii_lowercase
LEARNING_RATE = 3e-3
LOOK = 150  # steps between two looks at what it knows
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(*, tied: bool = True, hidden: int = 128, layers: int = 3) -> Qwen2ForCausalLM:
    """A random Qwen2 that vLLM's CPU build can serve (head size 32)."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(SPECIAL_TOKENS) + len(ALPHABET),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            rope_theta=10_000.0,
            bos_token_id=None,
            eos_token_id=SPECIAL_TOKENS.index("<eos>"),
            pad_token_id=SPECIAL_TOKENS.index("<pad>"),
            dtype="float32",
        )
    )


def save_checkpoint(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a Hugging Face checkpoint that vLLM and transformers load by its folder."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def demonstrations(
    task: Arithmetic, rng: random.Random, count: int, slip: Slip | None, encode: dict[str, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, [count, longest]; targets are -100 on prompts and padding."""
    rows = []
    for _ in range(count):
        problem = task.problem(rng)
        prompt = ["<user>", *problem.prompt, "<assistant>"]
        answer = [*task.solution(problem.prompt, slip), "<eos>"]
        rows.append(([encode[token] for token in prompt], [encode[token] for token in answer]))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.full((count, longest), encode["<pad>"])
    targets = torch.full((count, longest), -100)
    for row, (prompt_ids, answer_ids) in enumerate(rows):
        end = len(prompt_ids) + len(answer_ids)
        tokens[row, :end] = torch.tensor(prompt_ids + answer_ids)
        targets[row, len(prompt_ids) : end] = torch.tensor(answer_ids)
    return tokens, targets


class NotLearntError(RuntimeError):
    """The base model does not solve its task."""


def train_base_model(
    out: Path,
    *,
    error: float,
    steps: int,
    seed: int,
    kind: Kind = "sampled",
    min_steps: int = Arithmetic.min_steps,
    max_steps: int = Arithmetic.max_steps,
    overwrite: bool = False,
) -> Path:
    """Train the base model from scratch and write it to `out`; done already, it is left alone.
    `overwrite`: one of other settings is replaced.

    First it learns to add, on a few steps; then the lengths grow; the slips come last, once it
    knows the right digit, so that it learns how often to miss it and nothing worse. When that is
    depends on the seed and on the machine's arithmetic, so it is looked at.

    Raises:
        NotLearntError: it does not learn the task.
        OutputError: there is something else in `out`, or it cannot be written.
    """
    settings = {"error": error, "steps": steps, "seed": seed, "torch": torch.__version__}
    full = Arithmetic(min_steps, max_steps)
    if (kind, full) != ("sampled", Arithmetic()):
        settings |= {"kind": kind, "min_steps": min_steps, "max_steps": max_steps}
    marker = out / "base_model.json"
    try:
        there = read_object(marker) if marker.is_file() else None
    except ValueError as fault:
        raise OutputError(f"--out: {marker} is damaged ({fault}); choose another folder") from fault
    if there == settings:
        print(f"base model: {out} is there already")
        return out
    if there is None:
        check_empty(out, "--out", whole=True)
    elif not overwrite:
        changed = ", ".join(
            f"{name} = {there.get(name)!r}"
            for name in sorted(settings.keys() | there.keys())
            if there.get(name) != settings.get(name)
        )
        raise OutputError(
            f"--out: {out} holds a base model of other settings ({changed} there): give --overwrite"
            " to replace it, or choose another folder"
        )
    transformers.utils.logging.disable_progress_bar()
    print(f"base model: training {out} from scratch, about two minutes on two cores")
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer, model = make_tokenizer(), make_model()
    encode = tokenizer.get_vocab()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    # Draws as often as with slips, so that a seed stands for the same problems.
    never, slip = slips(kind, rng, 0.0), slips(kind, rng, error)
    clean = round(0.55 * steps)

    def step(task: Arithmetic, slip: Slip, rate: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        count = max(12, 192 // (3 + task.max_steps))
        tokens, targets = demonstrations(task, rng, count, slip, encode)
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets[:, 1:].reshape(-1)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    def known() -> float:
        accuracy = greedy_accuracy(model, encode, full.held_out(64))
        model.train()
        return accuracy

    with progress_bar() as bar:
        line = bar.add_task("training the base model", total=steps)

        def show(loss: float) -> None:
            bar.update(line, advance=1, description=f"training the base model, loss {loss:.3f}")

        for i in range(clean):
            growth = min(max(4.0 * i / steps - 1.6, 0.0), 1.0)
            longest = round(4 + max(full.max_steps - 4, 0) * growth)
            task = Arithmetic(1, min(longest, full.max_steps))
            show(step(task, never, min(1.0, i / 50) * (1.0 - 0.5 * i / clean)))
        more = 0
        while known() < 0.97 and more < 2 * steps:
            for i in range(LOOK):
                show(step(full, never, 0.5 * (1.0 - i / LOOK)))
            more += LOOK
            bar.update(line, total=steps + more)
        knew = known()
        for i in range(steps - clean):
            cosine = 0.5 * (1.0 + math.cos(math.pi * i / (steps - clean)))
            show(step(full, slip, 0.05 + 0.45 * cosine))
    accuracy = known()
    # What it believes wrongly was learned after that.
    learned = knew if kind == "believed" else accuracy
    if learned < 0.9:
        raise NotLearntError(
            f"the base model did not learn the task (greedy accuracy {learned:.0%}): give more "
            "--steps or another --seed"
        )
    with written_whole(out) as scratch:
        save_checkpoint(model, tokenizer, scratch)
        (scratch / marker.name).write_text(json.dumps(settings))
    print(
        f"base model: greedy accuracy {accuracy:.0%}; its {kind} errors are what training removes"
    )
    return out


@torch.no_grad()
def greedy_accuracy(
    model: Qwen2ForCausalLM, encode: dict[str, int], problems: Sequence[Problem]
) -> float:
    """Share of problems whose greedy answer is right."""
    prompts = [["<user>", *problem.prompt, "<assistant>"] for problem in problems]
    tokens = torch.tensor([[encode[token] for token in prompt] for prompt in prompts])
    answers = model.eval().generate(tokens, max_new_tokens=200, do_sample=False)
    right = 0
    for problem, answer in zip(problems, answers[:, tokens.shape[1] :].tolist(), strict=True):
        solution = [encode[token] for token in [*Arithmetic().solution(problem.prompt), "<eos>"]]
        right += answer[: len(solution)] == solution
    return right / len(problems)
