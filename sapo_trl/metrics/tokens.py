"""Metrics of a pack's tokens: ratios, gate weights by sign and direction, sequences, mismatch of the rollout engine."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sapo_trl.metrics.histograms import compact, quantiles
from sapo_trl.metrics.sequence import sequence_bound
from sapo_trl.metrics.step import CLASSES, DIRECTIONS, MEMBERS, StepMetrics
from sapo_trl.objective import LossInputs, Objective, SoftGate, clamp_log_ratio, per_token

FALLEN = math.log(0.8)  # where GRPO's clip stops a token with A < 0
RATIO_LEVELS = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)


@torch.no_grad()
def token_metrics(
    metrics: StepMetrics,
    tokens: LossInputs,
    entropies: Tensor,
    engine: tuple[Tensor | None, Tensor | None],
    kl: Tensor | None,
    objective: Objective,
    reference_gate: SoftGate,
) -> None:
    """Add one pack. Every mean is over the trained tokens of forwarded rows, unless its name says otherwise.

    Args:
        entropies, kl: per token, (T,); the KL to the reference may be unknown.
        engine: log-probs of the rollout engine, and where the correction for it is cut, (T,); None where unknown.
        reference_gate: SAPO's gate, for the metrics of sequences.
    """
    n = float(len(tokens.policy_logps))
    z, ratio = tokens.token_log_ratio.detach(), tokens.log_ratio.detach().exp()
    metrics.mean("entropy", entropies.sum(), n)
    metrics.mean("ratio/mean", ratio.sum(), n)
    metrics.mean("log_ratio/abs_mean", z.abs().sum(), n)
    metrics.mean("log_ratio/drift", z.square().sum() / 2, n)
    metrics.mean("log_ratio/clamped_frac", tokens.clamped.sum(), n)
    if len(ratio):  # rows whose tokens are all masked are forwarded where the routers' loss counts them
        metrics.maximum("ratio/max", ratio.max())
    _sequence_metrics(metrics, tokens, reference_gate)
    if kl is not None:
        metrics.mean("kl", kl.sum(), n)
    sampler_logps, cut = engine
    if sampler_logps is not None:
        _engine_metrics(metrics, tokens, tokens.old_logps - sampler_logps, cut)
    _gate_metrics(metrics, tokens, per_token(objective.weight(tokens), tokens, objective, "weight"))


def _engine_metrics(metrics: StepMetrics, tokens: LossInputs, gap: Tensor, cut: Tensor | None) -> None:
    """Trainer against rollout engine before any update: `gap` of their log-probs, and what the correction for it does.

    A mask removes a token where the ratio is 0; the shares that are removed are of tokens, of rows that have none left,
    and of |A|.
    """
    n, clamped, ratio = float(len(gap)), clamp_log_ratio(gap), tokens.importance_ratio
    metrics.mean("sampling/kl", (torch.expm1(clamped) - clamped).sum(), n)
    metrics.mean("sampling/log_ratio_abs_mean", clamped.abs().sum(), n)
    if ratio is None or cut is None:
        return
    removed, lengths = (ratio == 0).to(ratio.dtype), tokens.row_sum(torch.ones_like(ratio))
    metrics.mean("sampling/sampling_logp_difference/mean", gap.nan_to_num(nan=0.0).abs().sum(), n)
    metrics.mean("sampling/importance_sampling_ratio/mean", ratio.sum(), n)
    metrics.mean("sampling/lost_frac", cut.sum(), n)
    metrics.mean("sampling/removed_tokens_frac", removed.sum(), n)
    gone = (tokens.row_sum(removed) == lengths) & (lengths > 0)
    metrics.mean("sampling/removed_sequences_frac", gone.sum(), (lengths > 0).sum())
    sizes = tokens.advantages.abs()
    metrics.mean("sampling/removed_advantage_frac", (sizes * removed).sum(), sizes.sum())


def _sequence_metrics(metrics: StepMetrics, tokens: LossInputs, reference_gate: SoftGate) -> None:
    """Var_i of z, D_i and the share within the bound (Eq. 21), means over rows.

    The gate is SAPO's for every algorithm, so that runs can be compared.
    """
    tau = tokens.row_mean(reference_gate.temperatures(tokens.advantages))
    z, num_rows = tokens.token_log_ratio.detach(), tokens.num_rows
    variance, gap, bound = sequence_bound(z, tokens.rows, num_rows, tau)
    metrics.mean("sequence/log_ratio_var", variance.sum(), float(num_rows))
    metrics.mean("sequence/gate_gap", gap.sum(), float(num_rows))
    metrics.mean("sequence/within_bound_frac", (gap <= bound + 1e-6).sum(), float(num_rows))  # fp32's rounding of g


def _gate_metrics(metrics: StepMetrics, tokens: LossInputs, effective: Tensor) -> None:
    """Gate weight w, the factor on the plain gradient r A grad log pi, and effective weight w r.

    A gate or a clip has w <= 1. An objective that does not weigh by r, as TOPR does where A > 0, has w = 1/r, which has
    no bound on fallen tokens; all of their plain gradient is left, and the update ratio counts them as 1.

    Args:
        effective: w r per token, (T,), NaN where it is not known; such tokens are not counted.
    """
    ratio, advantages, known = tokens.log_ratio.detach().exp(), tokens.advantages, effective.isfinite()
    effective, counted = effective.nan_to_num(nan=0.0), known.sum()
    weight = effective / ratio
    side = advantages.sign() * (ratio - 1).sign()  # > 0: the step moves r further away from 1
    direction = torch.where(side < 0, 0, torch.where(side > 0, 1, 2))
    classes = torch.where(advantages > 0, direction, direction + len(DIRECTIONS))
    classes = classes.masked_fill((advantages == 0) | ~known, len(CLASSES))
    metrics.mean("effective_update_ratio", weight.clamp(max=1).sum(), counted)
    metrics.mean("gate/pull_mean", effective.sum(), counted)
    metrics.mean("gate/expansive_frac", (side > 0).sum(), float(len(ratio)))
    for name, members in MEMBERS.items():
        inside = sum((classes == member for member in members), torch.zeros_like(classes))
        metrics.mean(f"gate/weight_{name}_mean", (weight * inside).sum(), inside.sum())
        metrics.mean(f"gate/pull_{name}_mean", (effective * inside).sum(), inside.sum())
    z = tokens.token_log_ratio.detach()
    for i, (sign, way) in enumerate(CLASSES):
        if way != "unmoved":
            metrics.mean(f"log_ratio/abs_{sign}_{way}_mean", (z.abs() * (classes == i)).sum(), (classes == i).sum())
    metrics.mean("gate/leak_neg", *_leak_sums(tokens, effective))
    metrics.distribution((tokens.log_ratio.detach(), 1 - weight, effective - 1), classes)
    without_gradient = known & (effective == 0)
    metrics.mean("clip_ratio/low_mean", (without_gradient & (ratio < 1)).sum(), counted)
    metrics.mean("clip_ratio/high_mean", (without_gradient & (ratio > 1)).sum(), counted)
    metrics.mean("clip_ratio/region_mean", without_gradient.sum(), counted)


def _leak_sums(tokens: LossInputs, effective: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of |A| w r over the tokens with A < 0 whose r has fallen below 0.8, and over all."""
    acting = (tokens.advantages * effective).abs()
    fallen = (tokens.advantages < 0) & (tokens.token_log_ratio.detach() < FALLEN)
    return (acting * fallen).sum(), acting.sum()


def leak(tokens: LossInputs, effective: Tensor) -> Tensor:
    """`gate/leak_neg`: share of the gradient's weight that goes on pushing down tokens which have already fallen.

    Args:
        effective: w r per token, (T,); NaN, which is not known, counts as 0.
    """
    fallen, everything = _leak_sums(tokens, effective.nan_to_num(nan=0.0))
    return fallen / everything.clamp(min=1e-12)


def quantile_metrics(distributions: Tensor) -> dict[str, float]:
    """`ratio/p0.1` ... `ratio/p99.9`, and the gate's quantiles by sign and direction, from the reduced counts."""
    values = {}
    if not distributions.any():
        return values
    log_ratio, lost, gained = distributions
    for level, z in zip(RATIO_LEVELS, quantiles(log_ratio.sum(0), RATIO_LEVELS), strict=True):
        values[f"ratio/p{100 * level:g}"] = math.exp(z)
    for name, members in MEMBERS.items():
        if not lost[members].any():
            continue
        low, mid = quantiles(lost[members].sum(0), (0.99, 0.9))
        values |= {f"gate/weight_{name}_p1": 1 - low, f"gate/weight_{name}_p10": 1 - mid}
        mid, high = quantiles(gained[members].sum(0), (0.1, 0.99))
        values |= {f"gate/pull_{name}_p10": 1 + mid, f"gate/pull_{name}_p99": 1 + high}
    return values


def tracker_histograms(distributions: Tensor | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`log_ratio` and `gate_weight` as (counts (b,), edges (b + 1,)) over all classes; empty before the first step."""
    if distributions is None or not distributions.any():
        return {}
    counts, edges = compact(distributions[1].sum(0))
    return {"log_ratio": compact(distributions[0].sum(0)), "gate_weight": (counts[::-1], 1 - edges[::-1])}
