"""From rollouts to training samples, and on to padded micro-batches shared out over the ranks.

Padding is on the right and needs no attention mask in a causal model: no real token sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from espo_gateway.stop.regret import MISSING_LOGPROB
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

    @property
    def targets(self) -> Tensor:
        """The kept tokens, row after row."""
        return self.tokens[:, 1:][self.response]


def micro_batches(
    samples: Sequence[Sample], budget: int, *, rank: int, ranks: int, device: torch.device | str
) -> Iterator[MicroBatch]:
    """One rank's share of the samples, as many micro-batches as every other rank has.

    Under ZeRO every forward and backward pass is a collective, so a rank with less to do makes up
    the number with dummies.

    Args:
        budget: padded tokens of one micro-batch; a longer sample is alone in one.
    """
    for indices in share([len(sample.tokens) for sample in samples], budget, rank, ranks):
        yield _collate(samples, indices, device)


def share(lengths: Sequence[int], budget: int, rank: int, ranks: int) -> list[list[int]]:
    """Indices of the samples in each micro-batch of one rank; rows of like length together."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    shares = [_cut(order[start::ranks], lengths, budget) for start in range(ranks)]
    dummies = max(map(len, shares)) - len(shares[rank])
    return shares[rank] + [[]] * dummies


def _cut(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    cuts = []
    while order:
        rows = max(1, budget // lengths[order[0]])
        cuts.append(order[:rows])
        order = order[rows:]
    return cuts


def _collate(
    samples: Sequence[Sample], indices: list[int], device: torch.device | str
) -> MicroBatch:
    rows = [samples[i] for i in indices]
    # A dummy is the shortest text that has a next token.
    texts = [row.tokens for row in rows] or [samples[0].tokens[:2]]
    tokens = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    response = torch.zeros_like(tokens[:, 1:], dtype=torch.bool)
    for i, row in enumerate(rows):
        response[i, row.prompt - 1 : len(row.tokens) - 1] = True
    columns = {
        name: torch.cat([row.columns[name] for row in rows] or [torch.zeros(0)]).to(device)
        for name in samples[0].columns
    }
    return MicroBatch(indices, tokens.to(device), response.to(device), columns)
