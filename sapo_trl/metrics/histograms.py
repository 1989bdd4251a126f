"""Histograms on the device: counts per class on one fixed grid, from which quantiles are read after the reduction.

Ratios, gate weights and effective weights differ from 1 by 1e-5 on one token and by 1 on the next, so the grid is
logarithmic in |x| on both sides of 0, with a bin around 0 in the middle: a quantile is exact to half a bin, 2.5 % of
its distance from 0. ±1 is the middle of a bin, so a clipped token is read as gate weight 0 and effective weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PER_DECADE = 46
SMALLEST, LARGEST = (10 ** (exponent + 0.5 / PER_DECADE) for exponent in (-6, 6))


def _edges() -> Tensor:
    """Ascending and symmetric, (B - 1,): bin 0 lies below the first, bin B - 1 above the last."""
    decades = torch.log10(torch.tensor(LARGEST / SMALLEST, dtype=torch.float64))
    steps = torch.linspace(0, float(decades), round(float(decades) * PER_DECADE) + 1, dtype=torch.float64)
    positive = SMALLEST * 10**steps
    return torch.cat([-positive.flip(0), positive])


EDGES = _edges()
NUM_BINS = len(EDGES) + 1
_ON_DEVICE: dict[torch.device, Tensor] = {}


def counts_by_class(x: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """(classes, B) from values (T,) and their classes (T,); a value of class `num_classes` is not counted."""
    if x.device not in _ON_DEVICE:  # once, because the copy waits for the device
        _ON_DEVICE[x.device] = EDGES.to(x.device, torch.float32)
    flat = classes * NUM_BINS + torch.bucketize(x.float(), _ON_DEVICE[x.device])
    counts = torch.zeros((num_classes + 1) * NUM_BINS, device=x.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype)).view(-1, NUM_BINS)[:num_classes]


def quantiles(counts: Tensor, levels: Sequence[float]) -> list[float]:
    """Values at the levels in [0, 1] from counts (B,) on the host, each the middle of its bin; NaN without counts."""
    total = float(counts.sum())
    if total == 0:
        return [float("nan")] * len(levels)
    cumulated = counts.double().cumsum(0)
    # the value with at least a share `level` of all values at or below it
    ranks = torch.tensor([max(1.0, level * total) for level in levels], dtype=torch.float64)
    bins = torch.searchsorted(cumulated, ranks - 1e-9).clamp(max=NUM_BINS - 1)
    return [bin_middle(int(b)) for b in bins]


def bin_middle(index: int) -> float:
    """Geometric middle of a bin; 0 for the one around 0, the outermost edge for the open ones."""
    if index in (0, NUM_BINS - 1):
        return float(EDGES[0 if index == 0 else -1])
    low, high = float(EDGES[index - 1]), float(EDGES[index])
    if low < 0 < high:
        return 0.0
    return (1 if low > 0 else -1) * (low * high) ** 0.5


def compact(counts: Tensor, max_bins: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """(counts (b,), edges (b + 1,)) of the occupied part, neighbours joined to at most `max_bins`; the open bins end
    one decade further out."""
    edges = torch.cat([EDGES[:1] * 10, EDGES, EDGES[-1:] * 10]).numpy()
    full = counts.double().numpy()
    occupied = np.flatnonzero(full)
    first, last = int(occupied[0]), int(occupied[-1]) + 1
    step = math.ceil((last - first) / max_bins)
    starts = np.arange(first, last, step)
    return np.add.reduceat(full[first:last], starts - first), np.append(edges[starts], edges[last])
