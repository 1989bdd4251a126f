"""Attention inside packs: every row sees itself alone, whatever lies beside it.

Outside attention a pack is one sequence of T tokens. A prompt that several rows share lies in it once; inside attention
each of these rows gets the prompt's queries, keys and values again, so that every row is an ordinary causal sequence
and any causal kernel does. The repeated prompt costs attention only, which is little beside the weights it saves.

segments  text models whose attention goes through transformers' interface: `segment_attention`
flash     the same with flash attention and explicit `cu_seq_lens`: `varlen_attention`
padded    everything else: rows of a pack side by side, right-padded, with an attention mask

All three return the same numbers; `layout_of` says which one a model gets and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SEGMENTS = "sapo_segments"
VARLEN = "sapo_flash_varlen"

# Rows of a pack share one attention grid while the shortest is at least this share of the longest: fewer, larger
# calls against padding inside the grid.
GRID_FILL = 0.75


def send(x: Tensor | None, device: torch.device) -> Tensor | None:
    """A host tensor on the device, without waiting for it."""
    if x is None or device.type != "cuda":
        return x if x is None else x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Grid:
    """R rows of at most L tokens side by side. `gather` (R * L,) are their positions in the pack, padding pointing at
    some token of the row; None where they lie in the pack as they are, from `start` on."""

    rows: int
    length: int
    start: int
    gather: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """(T, H, D) -> (R, H, L, D)."""
        size = self.rows * self.length
        x = x[self.start : self.start + size] if self.gather is None else x.index_select(0, self.gather)
        return x.reshape(self.rows, self.length, *x.shape[1:]).transpose(1, 2)

    def to(self, device: torch.device) -> Grid:
        return replace(self, gather=send(self.gather, device))


@dataclass(frozen=True)
class Segments:
    """The grids of a pack, and where each token of the pack is found in them laid end to end, `scatter` (T,); None
    where that is its own position."""

    grids: tuple[Grid, ...]
    scatter: Tensor | None

    def to(self, device: torch.device) -> Segments:
        return Segments(tuple(grid.to(device) for grid in self.grids), send(self.scatter, device))


def plan_segments(positions: Sequence[Tensor], num_tokens: int) -> Segments:
    """Grids of rows of similar length, from each row's positions in the pack, (length,), all on the host."""
    order = sorted(range(len(positions)), key=lambda i: -len(positions[i]))
    scatter = torch.empty(num_tokens, dtype=torch.long)
    grids, first, base = [], 0, 0
    while first < len(order):
        length = len(positions[order[first]])
        members = [positions[i] for i in order[first:] if len(positions[i]) >= GRID_FILL * length]
        gather = torch.cat([F.pad(p, (0, length - len(p)), value=int(p[0])) for p in members])
        for r, own in enumerate(members):
            scatter[own] = torch.arange(base + r * length, base + r * length + len(own))
        in_place = torch.equal(gather, torch.arange(len(gather)) + gather[0])
        grids.append(Grid(len(members), length, int(gather[0]), None if in_place else gather))
        first, base = first + len(members), base + len(gather)
    in_place = base == num_tokens and torch.equal(scatter, torch.arange(num_tokens))
    return Segments(tuple(grids), None if in_place else scatter)


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

    The rows of a grid are right-padded, so causality alone hides the padding from every real token: no mask.
    """
    if segments is None:
        raise ValueError("segment attention got no segments; the packed layout does not fit.")
    _refuse_unsupported(attention_mask, kwargs)
    # On a GPU only half-precision kernels take grouped heads; for fp32 sdpa would fall back to a dense L x L product
    grouped = query.device.type == "cpu" or query.dtype != torch.float32
    if not grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    flat = [x[0].transpose(0, 1) for x in (query, key, value)]  # (T, H, D)
    outputs = []
    for grid in segments.grids:
        q, k, v = (grid.of(x) for x in flat)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (R * L, H, D)
    out = torch.cat(outputs)
    return (out if segments.scatter is None else out.index_select(0, segments.scatter)).unsqueeze(0), None


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
    """transformers' flash attention `kernel` over the rows that `cu_seq_lens` bound, shared prompts repeated for it.

    Shapes as in `segment_attention`; `expand` (sum of lengths,) and `collapse` (T,) are those of `PackInputs`.
    """
    _refuse_unsupported(attention_mask, kwargs)
    if expand is not None:
        query, key, value = (x.index_select(2, expand) for x in (query, key, value))
    out, _ = ALL_ATTENTION_FUNCTIONS[kernel](module, query, key, value, None, **kwargs)
    return (out if collapse is None else out.index_select(1, collapse)), None


def _refuse_unsupported(attention_mask: Tensor | None, kwargs: dict) -> None:
    names = ("sliding_window", "softcap", "s_aux", "position_bias")
    unsupported = [name for name in names if kwargs.get(name) is not None]
    if attention_mask is not None or unsupported:
        raise ValueError(f"packed attention got {unsupported or 'a mask'}; the packed layout does not fit.")


AttentionInterface.register(SEGMENTS, segment_attention)
AttentionInterface.register(VARLEN, varlen_attention)


def layout_of(model: PreTrainedModel | PeftModel) -> tuple[str, str]:
    """(layout, reason) for a model: `segments`, `flash` or `padded`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config.get_text_config()
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "padded", "prompt-learning adapters prepend tokens to every row"
    if config is not base.config:
        return "padded", f"{type(base).__name__} is multimodal"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return "padded", f"layers of kind {', '.join(sorted(kinds - {'full_attention'}))} carry state across rows"
    if not base._supports_attention_backend:
        return "padded", f"{type(base).__name__} does not use transformers' attention interface"
    if getattr(config, "attention_dropout", 0.0):
        return "padded", f"attention_dropout={config.attention_dropout}"
    if "flash" in (config._attn_implementation or ""):
        return "flash", f"attn_implementation={config._attn_implementation}"
    return "segments", "text model with full attention"


@contextmanager
def packed_attention(model: PreTrainedModel, layout: str):
    """Inside, the model attends within rows. Backward passes belong inside too: checkpointing forwards again."""
    config = model.config
    usual = config._attn_implementation
    if layout != "padded":
        config._attn_implementation = {"segments": SEGMENTS, "flash": VARLEN}[layout]
    try:
        yield
    finally:
        config._attn_implementation = usual
