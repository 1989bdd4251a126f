"""Exact causal attention of a pack on a CPU: parts of torch's flash kernel, merged by their log-sum-exps.

A token's keys are cut into parts (its own block, earlier blocks of its piece, the prompt that its row shares), each one
call of the kernel. Two parts are merged by their log-sum-exps l, as flash attention merges its tiles:

    o = (e^l1 o1 + e^l2 o2) / (e^l1 + e^l2)        l = log(e^l1 + e^l2)

and the kernel's backward pass, given the merged o and l, returns each part's share of the exact gradient. So a shared
prompt attends once for all of its rows, nothing is padded, and little is computed above the diagonal: the kernel itself
computes all of a row's first 512 keys for every query. On one EPYC core, 8 heads of 32: two groups of four rows with
prompts of 100 tokens took 0.68 of the time of sdpa over padded rows, one with a prompt of 1000 tokens 0.47.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapo_trl.trl_seams import cpu_flash_attention, cpu_flash_attention_backward

# Tokens of a causal block: 64, 128 and 256 took the same time within 5 %, 32 and 512 5 to 25 % more
BLOCK = 128


class Part(NamedTuple):
    """Queries [start, end) against earlier keys [first, last) of the pack."""

    start: int
    end: int
    first: int
    last: int


class Parts(NamedTuple):
    """Blocks of the diagonal, by their sizes, and what else their queries attend to."""

    blocks: list[int]
    across: list[Part]


def plan_parts(sizes: Sequence[int], rows: Sequence[Sequence[int]]) -> Parts:
    """The parts of a pack of pieces of `sizes` tokens end to end.

    Args:
        rows: each row's pieces, (prompt, completion) or one.
    """
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = Parts([], [])
    for start, size in zip(starts, sizes, strict=True):
        _add_causal(parts, start, start + size)
    shared: list[Part] = []
    for prompt, completion in (row for row in rows if len(row) == 2):
        first, start = starts[prompt], starts[completion]
        end = start + sizes[completion]
        if shared and (shared[-1].end, shared[-1].first) == (start, first):  # side by side: one call
            start = shared.pop().start
        shared.append(Part(start, end, first, first + sizes[prompt]))
    return Parts(parts.blocks, parts.across + shared)


def _add_causal(parts: Parts, start: int, end: int) -> None:
    """Blocks on the diagonal, and halves against the half before."""
    if end - start <= BLOCK:
        parts.blocks.append(end - start)
        return
    middle = (start + end + 1) // 2
    _add_causal(parts, start, middle)
    _add_causal(parts, middle, end)
    parts.across.append(Part(middle, end, start, middle))


class PartsAttention(torch.autograd.Function):
    """query (1, H, T, D), key and value (1, H_kv, T, D), parts, scale -> (1, H, T, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Parts, scale: float | None) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)  # merged in no less
        blocks = zip(*(x.split(parts.blocks, dim=2) for x in (query, key, value)), strict=True)
        found = [cpu_flash_attention(*block, 0.0, True, scale=scale) for block in blocks]
        out, lse = (_joined(x).to(wide) for x in zip(*found, strict=True))
        for start, end, first, last in parts.across:
            keys, values = key[:, :, first:last], value[:, :, first:last]
            o, l = cpu_flash_attention(query[:, :, start:end], keys, values, 0.0, False, scale=scale)  # noqa: E741
            before = lse[:, :, start:end]
            out[:, :, start:end].lerp_(o.to(wide), (l - before).sigmoid().unsqueeze(-1))
            torch.logaddexp(before, l, out=before)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        parts, (query, key, value, out, lse) = ctx.parts, ctx.saved_tensors
        of_queries = (outputs[0], query, out, lse)
        blocks = zip(*(x.split(parts.blocks, dim=2) for x in (*of_queries, key, value)), strict=True)
        found = [
            cpu_flash_attention_backward(grad, q, k, v, o, l, 0.0, True, scale=ctx.scale)
            for grad, q, o, l, k, v in blocks  # noqa: E741
        ]
        grads = [_joined(x) for x in zip(*found, strict=True)]
        for start, end, first, last in parts.across:
            rows, keys = slice(start, end), slice(first, last)
            grad, q, o, l = (x[:, :, rows] for x in of_queries)  # noqa: E741
            shares = cpu_flash_attention_backward(
                grad, q, key[:, :, keys], value[:, :, keys], o, l, 0.0, False, scale=ctx.scale
            )
            for total, share, where in zip(grads, shares, (rows, keys, keys), strict=True):
                total[:, :, where] += share
        return (*grads, None, None)


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    """(1, H, t, ...) each -> (1, H, T, ...), a token's heads side by side in memory, as in the blocks."""
    return torch.cat([x.transpose(1, 2) for x in blocks], dim=1).transpose(1, 2)
