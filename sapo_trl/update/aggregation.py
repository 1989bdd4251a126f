"""How tokens are averaged: the weight of each token of a row in the loss of one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MiniBatchCounts:
    """Denominators of one optimizer step, per process (the mean over processes where tokens are counted).

    `num_rows` counts every row, also those that need no forward pass.
    """

    num_rows: int
    num_tokens: float
    num_rollout_tokens: float
    num_mini_batches: int
    max_completion_length: int


# Name -> weight of each token of rows with n trained tokens, (R,) or a number.
AGGREGATIONS: dict[str, Callable[[Tensor, MiniBatchCounts], Tensor | float]] = {
    # mean over a row's tokens, then over rows: SAPO Eq. 5, GRPO, GSPO
    "sequence-mean": lambda n, counts: 1 / (n.clamp(min=1) * counts.num_rows),
    # sum over a row's tokens, mean over rows: LUSPO, arXiv 2602.05261
    "sequence-sum": lambda n, counts: 1 / counts.num_rows,
    # mean over the mini-batch's tokens: BNPO
    "token-mean": lambda n, counts: 1 / max(counts.num_tokens, 1.0),
    # mean over the rollout's tokens, as TRL computes DAPO (arXiv 2503.14476)
    "rollout-token-mean": lambda n, counts: counts.num_mini_batches / max(counts.num_rollout_tokens, 1.0),
    # a constant: Dr. GRPO, arXiv 2503.20783
    "constant": lambda n, counts: 1 / (counts.num_rows * counts.max_completion_length),
}


def row_weights(aggregation: str, lengths: Tensor, counts: MiniBatchCounts) -> Tensor:
    """Weight of each token of a row, (R,), from the rows' numbers of trained tokens `lengths`, (R,)."""
    return torch.ones(len(lengths)) * AGGREGATIONS[aggregation](lengths, counts)
