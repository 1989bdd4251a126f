"""How tokens are averaged: the weight of each token of a row in the loss of one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MiniBatchCounts:
    """Denominators of one optimizer step, per process (the mean over processes).

    `num_rows` counts also rows that need no forward pass; a filter of prompts takes away theirs.
    """

    num_rows: float
    num_tokens: float
    num_rollout_tokens: float
    num_mini_batches: int
    max_completion_length: int
    num_rollout_prompts: float = 0.0


# Name -> weight of each token of rows with n trained tokens, whose prompts have g of them, both (R,): (R,) or a number.
AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, MiniBatchCounts], Tensor | float]] = {
    # mean over a row's tokens, then over rows: SAPO Eq. 5, GRPO, GSPO
    "sequence-mean": lambda n, g, counts: 1 / (n.clamp(min=1) * (counts.num_rows or 1)),
    # sum over a row's tokens, mean over rows: LUSPO, arXiv 2602.05261
    "sequence-sum": lambda n, g, counts: 1 / (counts.num_rows or 1),
    # mean over the tokens of all completions of a prompt, then over the rollout's prompts: ScaleRL, arXiv 2510.13786
    "prompt-mean": lambda n, g, counts: counts.num_mini_batches / (g.clamp(min=1) * (counts.num_rollout_prompts or 1)),
    # mean over the mini-batch's tokens: BNPO
    "token-mean": lambda n, g, counts: 1 / max(counts.num_tokens, 1.0),
    # mean over the rollout's tokens, as TRL computes DAPO (arXiv 2503.14476)
    "rollout-token-mean": lambda n, g, counts: counts.num_mini_batches / max(counts.num_rollout_tokens, 1.0),
    # a constant: Dr. GRPO, arXiv 2503.20783
    "constant": lambda n, g, counts: 1 / ((counts.num_rows or 1) * counts.max_completion_length),
}


def row_weights(aggregation: str, lengths: Tensor, counts: MiniBatchCounts, group_tokens: Tensor) -> Tensor:
    """Weight of each token of a row, (R,).

    Args:
        lengths: the rows' numbers of trained tokens, (R,).
        group_tokens: those of all completions of their prompt, (R,); 0 for rows that don't count.
    """
    weights = torch.ones(len(lengths)) * AGGREGATIONS[aggregation](lengths, group_tokens, counts)
    return weights.masked_fill(group_tokens == 0, 0.0)
