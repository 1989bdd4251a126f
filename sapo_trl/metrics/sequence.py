"""The variance of a sequence's log-ratios, and the bound under which its mean gate is close to the gate of the mean."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_bound(z: Tensor, rows: Tensor, num_rows: int, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Var_i of z, D_i = |mean_t g(z_t) - g(mean_t z_t)| and its bound tau^2/4 Var_i (SAPO, Eq. 21), (R,) each.

    g(z) = sech^2(tau z/2), the soft gate under r - 1 ≈ z. All three are 0 for a row without tokens.

    Args:
        z: log-ratio of each token, (T,).
        rows: index of the token's row, (T,) in [0, R).
        num_rows: R.
        tau: temperature of each row, (R,).
    """
    # not bincount, which waits for the device
    counts = z.new_zeros(num_rows).index_add(0, rows, torch.ones_like(z)).clamp(min=1)
    row_mean = lambda x: x.new_zeros(num_rows).index_add(0, rows, x) / counts  # noqa: E731
    gate = lambda x, tau: torch.cosh(tau * x / 2) ** -2  # noqa: E731
    mean = row_mean(z)
    variance = row_mean((z - mean[rows]) ** 2)
    gap = (row_mean(gate(z, tau[rows])) - gate(mean, tau)).abs()
    return variance, gap, tau**2 / 4 * variance
