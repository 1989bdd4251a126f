"""Attention inside packs: each row attends to its own tokens only.

Outside attention a pack is one sequence of T tokens. A prompt that several rows share is in it once; inside attention
each of these rows gets the prompt's keys and values. On a CPU the kernel is ours to call in parts, so nothing is
computed twice (`cpu_attention.py`); elsewhere each row becomes an ordinary causal sequence again, for which any causal
kernel will do, and the repeated prompt costs attention only.

segments  text models whose attention goes through transformers' interface: `segment_attention`
flash     the same through one kernel call for all rows, bounded by `cu_seq_lens`: `varlen_attention`. The kernel is
          transformers' flash attention or, with sdpa on a GPU in half precision, torch's own after a trial
padded    everything else: the rows of a pack as a batch, right-padded, with an attention mask

All three return the same numbers. `model.layout_of` says which one a model gets and why, and `update/check.py` measures
that it gives the model's own log-probs.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from sapo_trl.model import head_shape, text_config
from sapo_trl.rollout.rows import Row
from sapo_trl.trl_seams import ALL_ATTENTION_FUNCTIONS, attention_named, repeat_kv
from sapo_trl.update.cpu_attention import Parts, PartsAttention, plan_parts

SEGMENTS = "sapo_segments"
VARLEN = "sapo_flash_varlen"
TORCH_VARLEN = "sapo_torch_varlen"

# Relative error up to which half precision counts as the same result
TRIAL_ERROR = 0.02


class LayoutError(ValueError):
    """A model asks its attention for something that rows end to end cannot give."""


@dataclass(frozen=True)
class Segments:
    """A pack as pieces of `sizes` tokens end to end (shared prompts, completions, whole rows).

    Attributes:
        rows: each row's pieces, (prompt, completion) or one.
    """

    sizes: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]

    @cached_property
    def parts(self) -> Parts:
        """Those of `cpu_attention`; every layer reads them."""
        return plan_parts(self.sizes, self.rows)


def plan_segments(rows: Sequence[Row]) -> Segments:
    """Pieces of rows in the order of `packing.row_positions`."""
    uses = Counter(row.prompt_key for row in rows if row.prompt_key is not None)
    sizes: list[int] = []
    prompts: dict[int, int] = {}
    pieces: list[tuple[int, ...]] = []
    for row in rows:
        key = row.prompt_key
        if key is None or uses[key] < 2:
            pieces.append((len(sizes),))
            sizes.append(len(row))
            continue
        if key not in prompts:
            prompts[key] = len(sizes)
            sizes.append(row.num_prompt)
        pieces.append((prompts[key], len(sizes)))
        sizes.append(len(row) - row.num_prompt)
    return Segments(tuple(sizes), tuple(pieces))


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segments: Segments | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a pack; query (1, H, T, D), key and value (1, H_kv, T, D) -> (1, T, H, D).

    On a CPU `cpu_attention`, where the heads of keys and values are equally wide, which its kernel asks for. Otherwise
    one call of sdpa a row.
    """
    if segments is None:
        raise LayoutError("segment attention got no segments; the packed layout does not fit.")
    _refuse_unsupported(attention_mask, kwargs)
    query, key, value = _in_compute_dtype(query, key, value)
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        return PartsAttention.apply(query, key, value, segments.parts, scaling).transpose(1, 2), None
    return _row_attention(query, key, value, segments, scaling), None


def _row_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """(1, T, H, D)."""
    # On a GPU only half-precision kernels take grouped heads; for fp32 sdpa would fall back to a dense L x L product
    grouped = query.device.type == "cpu" or query.dtype != torch.float32
    if not grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    cut = [x.split(segments.sizes, dim=2) for x in (query, key, value)]  # pieces (1, H, t, D)
    outputs: dict[int, Tensor] = {}
    for row in segments.rows:
        q, k, v = (torch.cat([pieces[i] for i in row], dim=2) for pieces in cut)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for i, piece in zip(row, out.split([segments.sizes[i] for i in row], dim=2), strict=True):
            outputs.setdefault(i, piece)  # a shared prompt has the same output in every row
    return torch.cat([outputs[i] for i in range(len(segments.sizes))], dim=2).transpose(1, 2)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kernel: str = "",
    expand: Tensor | None = None,
    collapse: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention function `kernel` over the rows that `cu_seq_lens` bound, shared prompts repeated for it.

    Shapes as in `segment_attention`; `expand` (sum of lengths,) and `collapse` (T,) are those of `PackInputs`.
    """
    _refuse_unsupported(attention_mask, kwargs)
    query, key, value = _in_compute_dtype(query, key, value)
    if expand is not None:
        query, key, value = (x.index_select(2, expand) for x in (query, key, value))
    config: Any = module.config
    with attention_named(config, kernel):
        out, _ = ALL_ATTENTION_FUNCTIONS[kernel](module, query, key, value, None, **kwargs)
    return (out if collapse is None else out.index_select(1, collapse)), None


def torch_varlen_attention(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs,
) -> tuple[Tensor, None]:
    """torch's own flash kernel for rows end to end; shapes as in `segment_attention`, half precision only."""
    from torch.nn.attention.varlen import varlen_attn  # some versions of torch lack it, which the trial reports

    grouped: dict[str, Any] = {"enable_gqa": True}
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11
        grouped = {}
        key, value = (repeat_kv(x, query.shape[1] // key.shape[1]) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out: Any = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=(-1, 0), **grouped
    )
    return out.unsqueeze(0), None


def torch_varlen_trial(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's kernel cannot be used, or None; tried on two rows, forward and backward, against sdpa.

    Whether it can depends on the GPU, the width of a head and how torch was built, so it is tried and not looked up.
    """
    if any(hasattr(config, name) for name in ("qk_head_dim", "qk_nope_head_dim", "v_head_dim")):
        return "keys and values have heads of different widths"
    heads, kv_heads, size = head_shape(config)
    lengths, generator = (7, 5), torch.Generator().manual_seed(0)
    shapes = [(1, h, sum(lengths), size) for h in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    bounds = torch.tensor([0, 7, 12], dtype=torch.int32, device=device)
    try:
        rows = zip(*(x.split(lengths, dim=2) for x in inputs), strict=True)
        expected = torch.cat([F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True) for row in rows], 2)
        out, _ = torch_varlen_attention(None, *inputs, None, cu_seq_lens_q=bounds, max_length_q=7)
        pairs = [
            (out, expected.transpose(1, 2)),
            *zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True),
        ]
    except (RuntimeError, NotImplementedError, ImportError, TypeError, ValueError) as error:
        return (str(error).strip() or repr(error)).splitlines()[0]
    errors = [((a - b).float().norm() / b.float().norm().clamp(min=1e-6)).item() for a, b in pairs]
    right = all(error < TRIAL_ERROR for error in errors)  # NaN is not
    return None if right else f"its results are {', '.join(f'{error:.1g}' for error in errors)} off sdpa's"


def _in_compute_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast would for attention, but before anything is copied, and so that sdpa finds its kernels."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _refuse_unsupported(attention_mask: Tensor | None, kwargs: dict) -> None:
    names = ("sliding_window", "softcap", "s_aux", "position_bias")
    unsupported = [name for name in names if kwargs.get(name) is not None]
    if kwargs.get("dropout"):  # one mask would serve all rows of a shared prompt
        unsupported.append("dropout")
    if attention_mask is not None or unsupported:
        raise LayoutError(f"packed attention got {unsupported or 'a mask'}; the packed layout does not fit.")


AttentionInterface.register(SEGMENTS, segment_attention)
AttentionInterface.register(VARLEN, varlen_attention)
AttentionInterface.register(TORCH_VARLEN, torch_varlen_attention)


def packed_attention(model: PreTrainedModel, layout: str) -> AbstractContextManager[None]:
    """Context in which the model attends within rows; backward passes too, as checkpointing runs the forward again."""
    if layout == "padded":
        return nullcontext()
    return attention_named(text_config(model), {"segments": SEGMENTS, "flash": VARLEN}[layout])
