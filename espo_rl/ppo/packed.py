"""Micro-batches without padding, in which rollouts of one prompt share its tokens.

What a model does to each token by itself (its linear layers, nearly all of the work) is done once
for each token that there is. Attention alone sees rows again, padded on the right, in which every
rollout has its prompt before it; so it is the plain causal one, whatever kernel computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "espo_sdpa"
#: a share of the tokens; where less of them is padding or said before, rows are as good
LEAST = 0.05
#: tokens of rows up to which a CPU attends faster in float32: its kernel for bfloat16 is slow there
SHORT = 256
#: how far logits may be from those of rows, in their standard deviations: rounding
CLOSE = {torch.float32: 1e-3}
CLOSE_ROUGHLY = 0.1


@dataclass(frozen=True)
class Packed:
    """Rows' tokens in a line, [1, tokens] each.

    layout: takes the place of a mask, [1, 2, rows, time]: where in the line each token of a row is
    (padding: anywhere), and then, first numbers first, where in the rows each of the line's is.
    """

    tokens: Tensor
    positions: Tensor
    layout: Tensor

    @classmethod
    def of(cls, texts: Sequence[Tensor], prompts: Sequence[int]) -> Packed:
        """prompts: how many of each text's first tokens are its prompt's."""
        time = max(map(len, texts))
        rows = torch.zeros(len(texts), time, dtype=torch.long)
        shared: dict[bytes, int] = {}
        parts: list[Tensor] = []
        places: list[Tensor] = []
        length = 0
        for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
            key = text[:prompt].numpy().tobytes()
            new = 0 if key not in shared else prompt  # the first token that is not there yet
            start = shared.setdefault(key, length)
            rows[i, :prompt] = torch.arange(start, start + prompt)
            rows[i, new : len(text)] = torch.arange(length, length + len(text) - new)
            parts.append(text[new:])
            places.append(torch.arange(i * time + new, i * time + len(text)))
            length += len(text) - new
        back = torch.cat(places)
        layout = torch.stack([rows, torch.zeros_like(rows)])
        layout[1].view(-1)[:length] = back
        return cls(torch.cat(parts)[None], back[None] % time, layout[None])

    @property
    def worthwhile(self) -> bool:
        return self.tokens.numel() <= (1.0 - LEAST) * self.layout[0, 0].numel()

    def to(self, device: torch.device | str) -> Packed:
        return Packed(self.tokens.to(device), self.positions.to(device), self.layout.to(device))


def takes_packed(model: Any) -> bool:
    """Have a transformers model take packed micro-batches, as what `inputs` makes of them.

    Returns:
        whether it does: not if it has layers that look at other tokens than by this attention, or
        finds positions otherwise. Then it is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", ATTENTION):
        return False
    if getattr(config, "attention_chunk_size", None):
        return False
    texts = [torch.tensor(text) for text in ([1, 2, 3, 4, 5], [1, 2, 3, 6], [3, 2])]
    packed = Packed.of(texts, [3, 3, 1]).to(model.device)
    padded = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(model.device)
    training = model.training
    model.eval()
    expected = _first(model, {"input_ids": padded}).flatten(0, 1)
    try:
        model.set_attn_implementation(ATTENTION)
        _seen.clear()
        found = _first(model, inputs(packed))
        back = packed.layout[0, 1].flatten()[: packed.tokens.numel()]
        off = (found[0] - expected[back]).float().abs().max()
        close = CLOSE.get(model.dtype, CLOSE_ROUGHLY) * expected[back].float().std()
        if len(_seen) == config.num_hidden_layers and off <= close:
            return True
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        pass  # a model that cannot do with positions, or with this in place of a mask
    finally:
        model.train(training)
    model.set_attn_implementation("sdpa")
    return False


def inputs(packed: Packed) -> dict[str, Tensor]:
    """What a model is called with."""
    return {
        "input_ids": packed.tokens,
        "position_ids": packed.positions,
        "attention_mask": packed.layout,
    }


@torch.no_grad()
def _first(model: Any, given: dict[str, Tensor]) -> Tensor:
    """What a model says of each token: its states or logits."""
    said: Tensor = model(**given, use_cache=False)[0]
    return said


_seen: set[int] = set()  # layers that attended to a packed batch


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' own, in rows where there is a layout. [1, heads, tokens, size] each."""
    if attention_mask is None or attention_mask.dtype is not torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    _seen.add(id(module))
    shape = attention_mask.shape[2:]
    line = attention_mask[0, 0].flatten()
    back = attention_mask[0, 1].flatten()[: query.shape[2]]

    def in_rows(line_of: Tensor) -> Tensor:
        picked = line_of[0].transpose(0, 1).index_select(0, line)
        return picked.unflatten(0, shape).transpose(1, 2)

    settings.pop("position_ids", None)
    window, mask = settings.get("sliding_window"), None
    if window is not None and shape[1] > window:
        places = torch.arange(shape[1], device=query.device)
        behind = places[:, None] - places
        mask = ((behind >= 0) & (behind < window))[None, None]
    rows = [in_rows(one) for one in (query, key, value)]
    if query.device.type == "cpu" and query.dtype is torch.bfloat16 and shape[1] <= SHORT:
        rows = [one.float() for one in rows]
    said, _ = sdpa_attention_forward(module, *rows, mask, **settings)
    return said.flatten(0, 1).index_select(0, back).to(query.dtype)[None], None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
