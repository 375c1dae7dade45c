"""What the update asks of a causal language model: log π and entropy at the kept tokens alone.

Logits are by far the largest tensors of an update, tokens × vocabulary, so none is ever whole: the
model's head is applied to a slice of the vocabulary at a time, forward and backward, and what is
kept of it is one number a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espo_rl.ppo.losses import Statistics, entropy, token_logprobs
from espo_rl.ppo.packed import takes_packed
from espo_rl.ppo.samples import MicroBatch, View

#: numbers in a slice's logits: on a CPU few enough for its cache, on a GPU enough to keep it busy
SLICE = {"cpu": 1 << 20, "cuda": 1 << 25}
#: words in a slice, at least
NARROWEST = 16


class Policy:
    """Asks a model, or the engine that holds it, for what a micro-batch's tokens have to know.

    A model whose logits are more than a linear map of its hidden states (soft caps, scales) is
    asked for whole logits.
    """

    def __init__(self, model: Any, temperature: float) -> None:
        self._temperature = temperature
        linear = model.get_output_embeddings()
        self._head = Head(linear) if _says_all(model, linear) else None
        self.packs = takes_packed(model)

    def __call__(
        self, model: Any, batch: MicroBatch, *, entropy: bool = False, raw: bool = False
    ) -> Statistics:
        """Of the kept tokens of all rows, row after row, each [tokens], at the temperature.

        Args:
            entropy: wanted, too.
            raw: log π before temperature is wanted, too; it has no gradient.
        """
        targets, view = batch.targets, batch.view(packs=self.packs)
        if self._head is None:
            logits = model(**view.inputs, use_cache=False).logits.flatten(0, 1)
            kept = logits.index_select(0, view.before).float()
            return _whole(kept, targets, self._temperature, entropy, raw)
        asked = Question(view.before, targets, self._temperature, entropy, raw)
        logprobs, spread, before = self._answer(model, view, asked).unbind()
        return Statistics(logprobs, spread if entropy else None, before.detach() if raw else None)

    def go_by(self, model: Any, view: View) -> None:
        """One forward pass for those who look on: nothing is asked of the head."""
        none = view.before[:0]
        self._answer(model, view, Question(none, none, self._temperature, False, False))

    def _answer(self, model: Any, view: View, asked: Question) -> Tensor:
        if self._head is not None:
            self._head.question = asked
        try:
            answer: Tensor = model(**view.inputs, use_cache=False).logits
        finally:
            if self._head is not None:
                self._head.question = None
        return answer


@dataclass(frozen=True)
class Question:
    """At which positions what is asked of the head; see Policy."""

    places: Tensor  # of the states before the kept tokens, [tokens]
    targets: Tensor  # [tokens]
    temperature: float
    entropy: bool
    raw: bool


class Head:
    """A model's linear head, which answers questions where there is one, and is itself otherwise.

    In the model's place, as ZeRO-3 has its weight whole within its own call alone.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.question: Question | None = None
        self._linear, self._plain = linear, linear.forward
        # Of this module alone; mypy has no word for it.
        linear.forward = self._forward  # type: ignore[method-assign,assignment]

    def _forward(self, hidden: Tensor) -> Tensor:
        asked = self.question
        if asked is None:
            return self._plain(hidden)
        kept = hidden.flatten(0, 1).index_select(0, asked.places)
        return torch.stack(_Sliced.apply(kept, self._linear.weight, self._linear.bias, asked))


def _whole(
    logits: Tensor, targets: Tensor, temperature: float, spread: bool, raw: bool
) -> Statistics:
    before = token_logprobs(logits, targets).detach() if raw else None
    logits = logits / temperature
    return Statistics(token_logprobs(logits, targets), entropy(logits) if spread else None, before)


@torch.no_grad()
def _says_all(model: Any, head: Any) -> bool:
    """Whether a model's logits are what its head gives, and nothing is done to them after it."""
    given: list[Tensor] = []
    if not isinstance(head, nn.Linear):
        return False
    hook = head.register_forward_hook(lambda _, __, output: given.append(output.clone()))
    tokens = torch.tensor([[0, 1, 2, 3]], device=model.device)
    logits = model(input_ids=tokens, use_cache=False).logits
    hook.remove()
    return len(given) == 1 and torch.equal(given[0].to(logits.dtype), logits)


class _Sliced(torch.autograd.Function):
    """log π at the temperature, entropy and raw log π, each [tokens]; 0 where not asked for."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, asked: Question
    ) -> tuple[Tensor, Tensor, Tensor]:
        zeros = torch.zeros(len(hidden), device=hidden.device)
        lse, raw_lse = zeros - torch.inf, zeros - torch.inf
        picked, mean = zeros.clone(), zeros.clone()
        for start, logits in _slices(hidden, weight, bias):
            inside, places = _within(asked.targets, start, logits)
            picked += logits.gather(1, places).squeeze(1).where(inside, 0.0)
            if asked.raw:
                raw_lse = raw_lse.logaddexp(logits.logsumexp(1))
            logits /= asked.temperature
            here = logits.logsumexp(1)
            together = lse.logaddexp(here)
            if asked.entropy:
                part = (logits - here[:, None]).exp_().mul_(logits).sum(1)
                mean = mean * (lse - together).exp() + part * (here - together).exp()
            lse = together
        spread = lse - mean if asked.entropy else zeros
        ctx.save_for_backward(hidden, weight, bias, lse, spread)
        ctx.asked = asked
        return picked / asked.temperature - lse, spread, picked - raw_lse if asked.raw else zeros

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, lse, spread = ctx.saved_tensors
        asked, (of_logprob, of_entropy, _) = ctx.asked, gradients
        by_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        by_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        by_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        for start, logits in _slices(hidden, weight, bias):
            inside, places = _within(asked.targets, start, logits)
            # log π is known, so π is; its gradient takes its place.
            logits = logits.div_(asked.temperature).sub_(lse[:, None])
            slope = logits.exp()
            if asked.entropy:
                logits.add_(spread[:, None]).mul_(of_entropy[:, None]).add_(of_logprob[:, None])
                slope.mul_(logits).neg_()
            else:
                slope.mul_(-of_logprob[:, None])
            slope.scatter_add_(1, places, of_logprob.where(inside, 0.0)[:, None])
            slope = slope.div_(asked.temperature).to(weight.dtype)
            end = start + slope.shape[1]
            by_hidden += slope @ weight[start:end]
            if by_weight is not None:
                torch.mm(slope.T, hidden, out=by_weight[start:end])
            if by_bias is not None:
                by_bias[start:end] = slope.sum(0)
        return by_hidden.to(hidden.dtype), by_weight, by_bias, None


def _slices(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Logits of one slice of the vocabulary after the other, float32; with its first word."""
    width = max(NARROWEST, SLICE.get(hidden.device.type, SLICE["cuda"]) // max(1, len(hidden)))
    for start in range(0, len(weight), width):
        part = None if bias is None else bias[start : start + width]
        logits = nn.functional.linear(hidden, weight[start : start + width], part)
        yield start, logits.float()


def _within(targets: Tensor, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens' targets a slice holds [tokens], and where; somewhere for others [tokens, 1]."""
    places = targets - start
    width = logits.shape[1]
    return (places >= 0) & (places < width), places.clamp(0, width - 1)[:, None]
