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
    """Queries [start, end) against keys [first, last) of the pack; `is_causal` for a block against itself."""

    start: int
    end: int
    first: int
    last: int
    is_causal: bool = False


def plan_parts(sizes: Sequence[int], rows: Sequence[Sequence[int]]) -> tuple[Part, ...]:
    """The parts of a pack of pieces of `sizes` tokens end to end; a token's causal part comes before its others.

    Args:
        rows: each row's pieces, (prompt, completion) or one.
    """
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [part for start, size in zip(starts, sizes, strict=True) for part in _causal(start, start + size)]
    across: list[Part] = []
    for prompt, completion in (row for row in rows if len(row) == 2):
        first, start = starts[prompt], starts[completion]
        end = start + sizes[completion]
        if across and (across[-1].end, across[-1].first) == (start, first):  # side by side: one call
            start = across.pop().start
        across.append(Part(start, end, first, first + sizes[prompt]))
    return (*parts, *across)


def _causal(start: int, end: int) -> list[Part]:
    """Blocks on the diagonal, and halves against the half before."""
    if end - start <= BLOCK:
        return [Part(start, end, start, end, is_causal=True)]
    middle = (start + end + 1) // 2
    return [*_causal(start, middle), *_causal(middle, end), Part(middle, end, start, middle)]


class PartsAttention(torch.autograd.Function):
    """query (1, H, T, D), key and value (1, H_kv, T, D), parts, scale -> (1, H, T, D)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Part], scale: float | None
    ) -> Tensor:
        _, heads, length, size = query.shape
        wide = torch.promote_types(query.dtype, torch.float32)  # merged in no less
        out = torch.empty((1, length, heads, size), dtype=wide).transpose(1, 2)
        lse = torch.empty((1, length, heads), dtype=wide).transpose(1, 2)
        for start, end, first, last, is_causal in parts:
            keys, values = key[:, :, first:last], value[:, :, first:last]
            o, l = cpu_flash_attention(query[:, :, start:end], keys, values, 0.0, is_causal, scale=scale)  # noqa: E741
            before = lse[:, :, start:end]
            if is_causal:
                out[:, :, start:end], lse[:, :, start:end] = o, l
            else:
                out[:, :, start:end].lerp_(o.to(wide), (l - before).sigmoid().unsqueeze(-1))
                torch.logaddexp(before, l, out=before)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = outputs
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x, memory_format=torch.preserve_format) for x in (query, key, value)]
        for start, end, first, last, is_causal in ctx.parts:
            rows, keys = slice(start, end), slice(first, last)
            found = cpu_flash_attention_backward(
                grad[:, :, rows], query[:, :, rows], key[:, :, keys], value[:, :, keys], out[:, :, rows],
                lse[:, :, rows], 0.0, is_causal, scale=ctx.scale,
            )  # fmt: skip
            for total, share, where in zip(grads, found, (rows, keys, keys), strict=True):
                total[:, :, where] += share
        return (*grads, None, None)
