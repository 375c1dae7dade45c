"""From rollouts to training samples, and on to micro-batches shared out over the ranks.

Rows are padded on the right, which needs no attention mask in a causal model: no real token sees
it. For models that can, the same tokens come without padding, too (`packed.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from espo_gateway.stop.regret import MISSING_LOGPROB
from espo_rl.ppo.packed import Packed, inputs
from espo_rl.types import Rollout


@dataclass
class Sample:
    """What the trainer knows of a rollout: its prompt, the tokens it keeps, its reward."""

    tokens: Tensor  # [prompt + kept]
    prompt: int
    group: int
    reward: float
    columns: dict[str, Tensor] = field(default_factory=dict)  # one number a kept token, each [kept]
    newest: Tensor | None = None  # which kept tokens the newest weights sampled, [kept]; None: all

    @classmethod
    def of(
        cls, rollout: Rollout, baseline: NDArray[np.float32] | None = None, version: str = ""
    ) -> Sample:
        """With `served_logprobs`, the server's, NaN where it gave none, for a column.

        baseline: V before each token where it is no critic's, [kept]: the column `baseline`.
        version: of the newest weights.
        """
        versions = rollout.token_versions[: rollout.trained]
        served = torch.tensor(rollout.logprobs[: rollout.trained], dtype=torch.float32)
        beside = {} if baseline is None else {"baseline": torch.from_numpy(baseline)}
        return cls(
            tokens=torch.tensor(rollout.prompt_ids + rollout.token_ids[: rollout.trained]),
            prompt=len(rollout.prompt_ids),
            group=rollout.group,
            reward=rollout.reward,
            columns=beside | {"served_logprobs": served.where(served > MISSING_LOGPROB, torch.nan)},
            newest=torch.tensor([one in ("", version) for one in versions]) if version else None,
        )

    @property
    def kept(self) -> int:
        return len(self.tokens) - self.prompt


@dataclass
class MicroBatch:
    """Rows for one forward pass. One without rows of its own is a dummy: no token of it counts."""

    indices: list[int]  # which samples the rows are
    tokens: Tensor  # [rows, time]
    response: Tensor  # where the next token is a kept one, bool [rows, time - 1]
    columns: dict[str, Tensor]  # each [kept tokens of all rows], row after row
    packed: Packed | None = None  # the same tokens without padding, where that is worthwhile

    @property
    def targets(self) -> Tensor:
        """The kept tokens, row after row."""
        return self.tokens[:, 1:][self.response]

    def view(self, *, packs: bool) -> View:
        """What a model is called with; packs: it takes packed tokens."""
        rows = nn.functional.pad(self.response, (0, 1)).flatten().nonzero().squeeze(1)
        if self.packed is None or not packs:
            return View({"input_ids": self.tokens}, rows, rows + 1)
        line = self.packed.layout[0, 0].flatten()
        return View(inputs(self.packed), line[rows], line[rows + 1])


@dataclass(frozen=True)
class View:
    """A micro-batch as a model sees it.

    before, kept: where, in its answers in a line, that before each kept token is, and that at it.
    """

    inputs: dict[str, Tensor]
    before: Tensor
    kept: Tensor


def micro_batches(
    samples: Sequence[Sample], budget: int, *, rank: int, ranks: int, device: torch.device | str
) -> Iterator[MicroBatch]:
    """One rank's share of the samples, as many micro-batches as every other rank has.

    Under ZeRO every forward and backward pass is a collective, so a rank with less to do makes up
    the number with dummies.

    Args:
        budget: padded tokens of one micro-batch; a longer sample is alone in one.
    """
    lengths = [len(sample.tokens) for sample in samples]
    groups = [sample.group for sample in samples]
    for indices in share(lengths, budget, rank, ranks, groups):
        yield _collate(samples, indices, device)


def share(
    lengths: Sequence[int],
    budget: int,
    rank: int,
    ranks: int,
    groups: Sequence[int] | None = None,
) -> list[list[int]]:
    """Indices of the samples in each micro-batch of one rank.

    Rows of like length are together; those of a group instead, as they share a prompt, where that
    makes no more micro-batches.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    longest: dict[int, int] = {}
    for i in by_length:
        longest.setdefault(groups[i] if groups else i, lengths[i])
    orders = [by_length]
    if groups:
        by_group = sorted(by_length, key=lambda i: (-longest[groups[i]], groups[i]))
        orders.insert(0, by_group)
    ways = [
        [_cut(order[start::ranks], lengths, budget) for start in range(ranks)] for order in orders
    ]
    shares = min(ways, key=lambda of: max(map(len, of)))
    dummies = max(map(len, shares)) - len(shares[rank])
    return shares[rank] + [[]] * dummies


def _cut(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    cuts: list[list[int]] = []
    longest = 0
    for i in order:
        longest = max(longest, lengths[i])
        if not cuts or (len(cuts[-1]) + 1) * longest > budget:
            cuts.append([])
            longest = lengths[i]
        cuts[-1].append(i)
    return cuts


def _collate(
    samples: Sequence[Sample], indices: list[int], device: torch.device | str
) -> MicroBatch:
    rows = [samples[i] for i in indices]
    # A dummy is the shortest text that has a next token.
    texts = [row.tokens for row in rows] or [samples[0].tokens[:2]]
    packed = Packed.of(texts, [row.prompt for row in rows] or [0])
    tokens = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    response = torch.zeros_like(tokens[:, 1:], dtype=torch.bool)
    for i, row in enumerate(rows):
        response[i, row.prompt - 1 : len(row.tokens) - 1] = True
    columns = {
        name: torch.cat([row.columns[name] for row in rows] or [torch.zeros(0)]).to(device)
        for name in samples[0].columns
    }
    return MicroBatch(
        indices,
        tokens.to(device),
        response.to(device),
        columns,
        packed.to(device) if packed.worthwhile else None,
    )
