"""Tensors to named scalars. Sums stay on the device; `StepMetrics.reduce` moves them once per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from sapo_trl.config import SAPOConfig
from sapo_trl.metrics.histograms import NUM_BINS, compact, counts_by_class, quantiles
from sapo_trl.moe.routing_replay import changed_selections
from sapo_trl.objective import LossInputs, clamp_log_ratio, gate_weight, temperatures, vespo_weight
from sapo_trl.update.loss import PackTokens


class StepMetrics:
    """Weighted sums, plain counts and maxima of one optimizer step."""

    def __init__(self):
        self.sums: dict[str, list] = {}  # name -> [sum, weight]
        self.maxima: dict[str, Tensor] = {}
        self.distributions: Tensor | None = None  # (DISTRIBUTIONS, CLASSES, bins)
        self.routed: Tensor | None = None  # (layers, changed, counted, entropy, positions, assignments per expert)

    def mean(self, name: str, total: Tensor, weight: Tensor | float) -> None:
        """Add to the mean `name` = sum of totals / sum of weights, over packs and processes."""
        old = self.sums.get(name, [0.0, 0.0])
        self.sums[name] = [old[0] + total, old[1] + weight]

    def maximum(self, name: str, value: Tensor) -> None:
        """Keep the largest value of `name`."""
        self.maxima[name] = torch.maximum(self.maxima.get(name, value), value)

    def distribution(self, values: Sequence[Tensor], classes: Tensor) -> None:
        """Count one pack's values of each of `DISTRIBUTIONS`, (T,), by class."""
        counts = torch.stack([counts_by_class(x, classes, len(CLASSES)) for x in values])
        self.distributions = counts if self.distributions is None else self.distributions + counts

    def routes(self, recorded: Tensor, live: Tensor, entropies: Tensor, num_experts: int) -> None:
        """Add one pack's routing, both (T, MoE layers, k): which selections changed, and who is selected now.

        `entropies` are those of the router's distribution over all experts, (T, MoE layers).
        """
        changed, counted = changed_selections(recorded, live)
        layers = live.shape[1]
        load = torch.zeros(layers, num_experts, device=live.device)
        load.scatter_add_(1, live.transpose(0, 1).flatten(1).long(), _per_choice(counted, live.shape[2]))
        sums = [changed.sum(0), counted.sum(0), entropies.sum(0), torch.full_like(load[:, 0], len(live))]
        table = torch.cat([torch.stack(sums, dim=1), load], dim=1)
        self.routed = table if self.routed is None else self.routed + table

    def reduce(
        self,
        accelerator: Accelerator,
        names: tuple[str, ...],
        max_names: tuple[str, ...],
        routers: tuple[int, int] = (0, 0),
    ) -> tuple[dict[str, float], Tensor]:
        """All means and maxima over all processes, and the distributions (DISTRIBUTIONS, CLASSES, bins) on the host.

        One gather of one vector, one move to the host. `names` fixes the order, because a process whose packs are all
        empty has seen none of them. A mean without weight is left out.

        Args:
            routers: (MoE layers, experts) where `routes` is watched.
        """
        flat = [x for name in names for x in self.sums.get(name, [0.0, 0.0])]
        flat += [self.maxima.get(name, float("-inf")) for name in max_names]
        device, shape = accelerator.device, (len(DISTRIBUTIONS), len(CLASSES), NUM_BINS)
        scalars = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=device).detach() for x in flat])
        counts = torch.zeros(shape, device=device) if self.distributions is None else self.distributions
        routed = torch.zeros(routers[0], 4 + routers[1], device=device) if self.routed is None else self.routed
        local = torch.cat([scalars, counts.flatten(), routed.flatten()])
        everywhere = accelerator.gather(local).view(accelerator.num_processes, -1).cpu()
        numbers, counts, routed = everywhere.split([len(flat), counts.numel(), routed.numel()], dim=1)
        sums, tops = numbers[:, : 2 * len(names)].sum(0).tolist(), numbers[:, 2 * len(names) :].amax(0).tolist()
        values = {name: sums[2 * i] / sums[2 * i + 1] for i, name in enumerate(names) if sums[2 * i + 1] > 0}
        values |= {name: top for name, top in zip(max_names, tops, strict=True) if top > float("-inf")}
        if routers[0]:
            values |= route_metrics(routed.sum(0).view(routers[0], -1))
        return values, counts.sum(0).view(shape)


def route_metrics(table: Tensor) -> dict[str, float]:
    """Change of selection, router entropy (nats) and expert load of `StepMetrics.routed`, per layer and overall.

    A load is an expert's share of the layer's assignments; 1/E for each is even, with entropy log E.
    """
    share = table[:, 4:] / table[:, 4:].sum(1, keepdim=True).clamp(min=1)
    layers = {
        "changed_frac": table[:, 0] / table[:, 1].clamp(min=1),
        "router_entropy": table[:, 2] / table[:, 3].clamp(min=1),
        "load_min": share.amin(1),
        "load_max": share.amax(1),
        "load_entropy": torch.special.entr(share).sum(1),
    }
    over_layers = {"changed_frac": torch.mean, "load_min": torch.amin, "load_max": torch.amax}
    values = {f"routing/{name}": over_layers.get(name, torch.mean)(x).item() for name, x in layers.items()}
    for name, x in layers.items():
        values |= {f"routing/layer_{i:02d}/{name}": value for i, value in enumerate(x.tolist())}
    return values


class RatioDump:
    """Log-ratios of one process's rows in one optimizer step, for Figures 2-3 of the paper (`report/bound.py`)."""

    def __init__(self):
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.num_rows = 0

    def add(self, tokens: LossInputs) -> None:
        """One pack; the one place of an update that waits for the device, in the steps that ask for it."""
        advantages = torch.zeros(tokens.num_rows, device=tokens.rows.device).scatter_(0, tokens.rows, tokens.advantages)
        rows = tokens.rows + self.num_rows
        self.parts.append((tokens.token_log_ratio.detach().cpu(), rows.cpu(), advantages.cpu()))
        self.num_rows += tokens.num_rows

    def save(self, output_dir: str, step: int, mini_batch: int, process: int) -> None:
        """`dump/step_<n>_process_<p>.npz` with log_ratio (T,), rows (T,), advantages (R,), step and mini_batch."""
        if not self.parts:
            return
        log_ratio, rows, advantages = (torch.cat(parts).numpy() for parts in zip(*self.parts, strict=True))
        path = Path(output_dir) / "dump" / f"step_{step:06d}_process_{process}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")  # a report of a running run reads whole files only
        with part.open("wb") as file:
            np.savez(file, log_ratio=log_ratio, rows=rows, advantages=advantages, step=step, mini_batch=mini_batch)
        part.replace(path)


def tracker_histograms(distributions: Tensor | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`log_ratio` and `gate_weight` as (counts (b,), edges (b + 1,)) over all classes; empty before the first step."""
    if distributions is None or not distributions.any():
        return {}
    counts, edges = compact(distributions[1].sum(0))
    return {"log_ratio": compact(distributions[0].sum(0)), "gate_weight": (counts[::-1], 1 - edges[::-1])}


def _per_choice(counted: Tensor, k: int) -> Tensor:
    """(T, layers) -> (layers, T * k): 1.0 for each of a counted token's k assignments."""
    return counted.T.float().repeat_interleave(k, dim=1)


# Sign of A, then where the step moves r: back towards 1, further away, or r = 1 exactly.
DIRECTIONS = ("corrective", "expansive", "unmoved")
CLASSES = tuple((sign, direction) for sign in ("pos", "neg") for direction in DIRECTIONS)
# Grid values that are small where nothing happens: z = log r, 1 - w, and w r - 1
DISTRIBUTIONS = ("log_ratio", "weight_lost", "pull_gained")
GROUPS = {
    name: [i for i, class_ in enumerate(CLASSES) if name in class_]
    for name in ("pos", "neg", "corrective", "expansive")
}
RATIO_LEVELS = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)

UPDATE = (
    "update/skipped_rows_frac", "update/skipped_tokens", "update/forwarded_tokens", "update/shared_tokens",
    "update/trained_tokens", "update/packs", "update/oom_retries",
)  # fmt: skip
COMMON = (
    "entropy", "ratio/mean", "log_ratio/abs_mean", "log_ratio/clamped_frac", "sequence/log_ratio_var",
    "sequence/gate_gap", "sequence/within_bound_frac", "sampling/kl", "sampling/log_ratio_abs_mean",
)  # fmt: skip
GATE = (
    "effective_update_ratio", "gate/pull_mean", "gate/expansive_frac",
    *(f"gate/{kind}_{name}_mean" for kind in ("weight", "pull") for name in GROUPS),
)  # fmt: skip
CLIPS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
SAMPLER = ("sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean", "sampling/lost_frac")
MAXIMA = ("ratio/max",)


def metric_names(config: SAPOConfig, stock_objective: bool, with_router_loss: bool) -> tuple[str, ...]:
    """The means that `token_metrics` and the update produce under this config, in a fixed order."""
    names = [*COMMON, *UPDATE]
    if stock_objective:
        names += GATE
        if config.loss_type not in ("sapo", "cispo", "vespo"):
            names += CLIPS
    if config.beta != 0.0:
        names.append("kl")
    if config.use_vllm and config.vllm_importance_sampling_correction:
        names += SAMPLER
    if with_router_loss:
        names.append("aux_loss")
    if config.entropy_coef != 0.0 or config.use_adaptive_entropy:
        names.append("entropy_bonus")
    return tuple(names)


def by_mini_batch(values: dict[str, float], index: int) -> dict[str, float]:
    """What a step says about its tokens, once more under the mini-batch's index (its staleness in updates)."""
    apart = ("update/", "routing/layer_")
    return {f"mini_batch_{index}/{name}": value for name, value in values.items() if not name.startswith(apart)}


def update_pull(tokens: LossInputs, config: SAPOConfig) -> Tensor:
    """What each token's A grad log pi is multiplied by in the objective's gradient, (T,): w r for a gate.

    1 on-policy for every algorithm. GSPO's is that of the row, as if its ratio were spread evenly over its tokens.
    """
    ratio = tokens.log_ratio.detach().exp()
    if config.loss_type == "sapo":
        tau = temperatures(tokens.advantages, config)
        return gate_weight(tokens.log_ratio.detach(), tau, config.gate, tokens.advantages) * ratio
    if config.loss_type == "cispo":
        return ratio.clamp(max=config.epsilon_high)
    if config.loss_type == "vespo":
        return vespo_weight(tokens, config)
    low, high = clipped_tokens(tokens, config)
    return ratio.masked_fill(low | high, 0.0)


def clipped_tokens(tokens: LossInputs, config: SAPOConfig) -> tuple[Tensor, Tensor]:
    """(below, above): tokens that a hard clip gives no gradient, (T,) each; `delta` is the upper bound for A < 0."""
    ratio, advantages = tokens.log_ratio.detach().exp(), tokens.advantages
    low = (ratio < 1 - config.epsilon) & (advantages < 0)
    high = (ratio > 1 + config.epsilon_high) & (advantages > 0)
    return low, high if config.delta is None else high | (ratio > config.delta)


@torch.no_grad()
def token_metrics(metrics: StepMetrics, pack: PackTokens, kl: Tensor | None, config: SAPOConfig, stock: bool) -> None:
    """Add one pack. Every mean is over trained tokens of forwarded rows, unless its name says otherwise."""
    tokens = pack.inputs
    n = float(len(tokens.policy_logps))
    z, ratio = tokens.token_log_ratio.detach(), tokens.log_ratio.detach().exp()
    metrics.mean("entropy", pack.entropies.sum(), n)
    metrics.mean("ratio/mean", ratio.sum(), n)
    metrics.mean("log_ratio/abs_mean", z.abs().sum(), n)
    metrics.mean("log_ratio/clamped_frac", tokens.clamped.sum(), n)
    metrics.maximum("ratio/max", ratio.max())
    _sequence_metrics(metrics, tokens, config)
    if kl is not None:
        metrics.mean("kl", kl.sum(), n)
    if pack.sampler_logps is not None:
        gap = clamp_log_ratio(tokens.old_logps - pack.sampler_logps)  # trainer against sampler, before any update
        metrics.mean("sampling/kl", (torch.expm1(gap) - gap).sum(), n)
        metrics.mean("sampling/log_ratio_abs_mean", gap.abs().sum(), n)
    if stock:
        _gate_metrics(metrics, tokens, config)
    if tokens.importance_ratio is not None:
        gap = (tokens.old_logps - pack.sampler_logps).abs().nan_to_num(nan=0.0)
        raw = (tokens.old_logps - pack.sampler_logps).nan_to_num(nan=0.0).exp()
        metrics.mean("sampling/sampling_logp_difference/mean", gap.sum(), n)
        metrics.mean("sampling/importance_sampling_ratio/mean", tokens.importance_ratio.sum(), n)
        metrics.mean("sampling/lost_frac", (tokens.importance_ratio < raw * (1 - 1e-6)).sum(), n)


def _sequence_metrics(metrics: StepMetrics, tokens: LossInputs, config: SAPOConfig) -> None:
    """Var_i of z, D_i = |mean_t g(z_t) - g(mean_t z_t)| with g(z) = sech^2(tau z/2), and D_i <= tau^2/4 Var_i (Eq. 21).

    Means over rows. The gate is SAPO's whatever the algorithm, so that runs compare.
    """
    z, rows = tokens.token_log_ratio.detach(), float(tokens.num_rows)
    mean = tokens.row_mean(z)
    variance = tokens.row_mean((z - mean[tokens.rows]) ** 2)
    token_tau = temperatures(tokens.advantages, config)
    tau = tokens.row_mean(token_tau)
    gate = lambda x, tau: torch.cosh(tau * x / 2) ** -2  # noqa: E731
    gap = (tokens.row_mean(gate(z, token_tau)) - gate(mean, tau)).abs()
    bound = tau**2 / 4 * variance
    metrics.mean("sequence/log_ratio_var", variance.sum(), rows)
    metrics.mean("sequence/gate_gap", gap.sum(), rows)
    metrics.mean("sequence/within_bound_frac", (gap <= bound + 1e-6).sum(), rows)  # 1e-6: fp32's rounding of g


def _gate_metrics(metrics: StepMetrics, tokens: LossInputs, config: SAPOConfig) -> None:
    """Gate weight w and pull w r: how much of the plain gradient r A grad log pi is left, and how large it then is."""
    pull, ratio, advantages = update_pull(tokens, config), tokens.log_ratio.detach().exp(), tokens.advantages
    weight = pull / ratio
    side = advantages.sign() * (ratio - 1).sign()  # > 0: the step moves r further away from 1
    direction = torch.where(side < 0, 0, torch.where(side > 0, 1, 2))
    classes = torch.where(advantages > 0, direction, direction + len(DIRECTIONS))
    classes = classes.masked_fill(advantages == 0, len(CLASSES))
    counted = float(len(ratio))
    metrics.mean("effective_update_ratio", weight.sum(), counted)
    metrics.mean("gate/pull_mean", pull.sum(), counted)
    metrics.mean("gate/expansive_frac", (side > 0).sum(), counted)
    for name, members in GROUPS.items():
        inside = sum(classes == member for member in members)
        metrics.mean(f"gate/weight_{name}_mean", (weight * inside).sum(), inside.sum())
        metrics.mean(f"gate/pull_{name}_mean", (pull * inside).sum(), inside.sum())
    metrics.distribution((tokens.log_ratio.detach(), 1 - weight, pull - 1), classes)
    if config.loss_type not in ("sapo", "cispo", "vespo"):
        low, high = clipped_tokens(tokens, config)
        metrics.mean("clip_ratio/low_mean", low.sum(), counted)
        metrics.mean("clip_ratio/high_mean", high.sum(), counted)
        metrics.mean("clip_ratio/region_mean", (low | high).sum(), counted)


def quantile_metrics(distributions: Tensor) -> dict[str, float]:
    """`ratio/p0.1` ... `ratio/p99.9`, and the gate's quantiles by sign and direction, from the reduced counts."""
    values = {}
    if not distributions.any():
        return values
    log_ratio, lost, gained = distributions
    for level, z in zip(RATIO_LEVELS, quantiles(log_ratio.sum(0), RATIO_LEVELS), strict=True):
        values[f"ratio/p{100 * level:g}"] = math.exp(z)
    for name, members in GROUPS.items():
        if not lost[members].any():
            continue
        low, mid = quantiles(lost[members].sum(0), (0.99, 0.9))
        values |= {f"gate/weight_{name}_p1": 1 - low, f"gate/weight_{name}_p10": 1 - mid}
        mid, high = quantiles(gained[members].sum(0), (0.1, 0.99))
        values |= {f"gate/pull_{name}_p10": 1 + mid, f"gate/pull_{name}_p99": 1 + high}
    return values
