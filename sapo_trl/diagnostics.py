"""Tensors to named scalars. Sums stay on the device; `StepMetrics.reduce` moves them once per optimizer step."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from sapo_trl.config import SAPOConfig
from sapo_trl.loss import PackTokens
from sapo_trl.objective import gate_weight, temperatures, vespo_weight
from sapo_trl.routing_replay import changed_selections


class StepMetrics:
    """Weighted sums, plain counts and maxima of one optimizer step."""

    def __init__(self):
        self.sums: dict[str, list] = {}  # name -> [sum, weight]
        self.maxima: dict[str, Tensor] = {}
        self.routed: Tensor | None = None  # (layers, changed, counted, then each expert's assignments)

    def mean(self, name: str, total: Tensor, weight: Tensor | float) -> None:
        """Add to the mean `name` = sum of totals / sum of weights, over packs and processes."""
        old = self.sums.get(name, [0.0, 0.0])
        self.sums[name] = [old[0] + total, old[1] + weight]

    def maximum(self, name: str, value: Tensor) -> None:
        """Keep the largest value of `name`."""
        self.maxima[name] = torch.maximum(self.maxima.get(name, value), value)

    def routes(self, recorded: Tensor, live: Tensor, num_experts: int) -> None:
        """Add one pack's routing, both (T, MoE layers, k): which selections changed, and who is selected now."""
        changed, counted = changed_selections(recorded, live)
        layers = live.shape[1]
        load = torch.zeros(layers, num_experts, device=live.device)
        load.scatter_add_(1, live.transpose(0, 1).flatten(1).long(), _per_choice(counted, live.shape[2]))
        table = torch.cat([changed.sum(0)[:, None], counted.sum(0)[:, None], load], dim=1)
        self.routed = table if self.routed is None else self.routed + table

    def reduce_routes(self, accelerator: Accelerator, num_layers: int, num_experts: int) -> dict[str, float]:
        """Change of selection and expert load over packs and processes, per layer and over layers.

        A load is an expert's share of the layer's assignments; 1/E for each is even, with entropy log E.
        """
        nothing = torch.zeros(num_layers, 2 + num_experts, device=accelerator.device)
        table = accelerator.reduce(nothing if self.routed is None else self.routed, "sum")
        share = table[:, 2:] / table[:, 2:].sum(1, keepdim=True).clamp(min=1)
        layers = {
            "changed_frac": table[:, 0] / table[:, 1].clamp(min=1),
            "load_min": share.amin(1),
            "load_max": share.amax(1),
            "load_entropy": torch.special.entr(share).sum(1),
        }
        over_layers = {"changed_frac": torch.mean, "load_min": torch.amin, "load_max": torch.amax}
        values = {f"routing/{name}": over_layers.get(name, torch.mean)(x).item() for name, x in layers.items()}
        for name, x in layers.items():
            values |= {f"routing/layer_{i:02d}/{name}": value for i, value in enumerate(x.tolist())}
        return values

    def reduce(self, accelerator: Accelerator, names: tuple[str, ...], max_names: tuple[str, ...]) -> dict[str, float]:
        """All means and maxima over all processes, by one gather of one vector and one move to the host.

        `names` fixes the order, because a process whose packs are all empty has seen none of them. A mean without
        weight is left out.
        """
        flat = [x for name in names for x in self.sums.get(name, [0.0, 0.0])]
        flat += [self.maxima.get(name, float("-inf")) for name in max_names]
        vector = torch.stack(
            [torch.as_tensor(x, dtype=torch.float32, device=accelerator.device).detach() for x in flat]
        )
        table = accelerator.gather(vector).view(-1, len(flat))
        sums = table[:, : 2 * len(names)].sum(0).tolist()
        tops = table[:, 2 * len(names) :].max(0).values.tolist() if max_names else []
        means = {name: sums[2 * i] / sums[2 * i + 1] for i, name in enumerate(names) if sums[2 * i + 1] > 0}
        return means | {name: top for name, top in zip(max_names, tops, strict=True) if top > float("-inf")}


def _per_choice(counted: Tensor, k: int) -> Tensor:
    """(T, layers) -> (layers, T * k): 1.0 for each of a counted token's k assignments."""
    return counted.T.float().repeat_interleave(k, dim=1)


UPDATE = (
    "update/skipped_rows_frac", "update/forwarded_tokens", "update/shared_tokens", "update/trained_tokens",
    "update/packs", "update/oom_retries",
)  # fmt: skip
COMMON = ("entropy", "ratio/mean", "log_ratio/abs_mean", "log_ratio/clamped_frac", "effective_update_ratio")
CLIPS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
SAMPLER = ("sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean", "sampling/lost_frac")
MAXIMA = ("ratio/max",)
# Also logged per mini-batch of a rollout (staleness 0 .. N - 1), since that is where a gate acts
BY_MINI_BATCH = (
    "effective_update_ratio", "log_ratio/abs_mean", "ratio/max", "gate/weight_pos_mean", "gate/weight_neg_mean",
    "clip_ratio/region_mean", "entropy", "routing/changed_frac",
)  # fmt: skip


def metric_names(config: SAPOConfig, stock_objective: bool, with_router_loss: bool) -> tuple[str, ...]:
    """The means that `token_metrics` and the trainer produce under this config, in a fixed order."""
    names = [*COMMON, *UPDATE]
    if not stock_objective:
        names.remove("effective_update_ratio")
    elif config.loss_type not in ("sapo", "cispo", "vespo"):
        names += CLIPS
    elif config.loss_type == "cispo":
        names.append("cispo_clip_ratio")
    elif config.loss_type == "sapo":
        names += ["gate/weight_pos_mean", "gate/weight_neg_mean"]
    if config.beta != 0.0:
        names.append("kl")
    if config.use_vllm and config.vllm_importance_sampling_correction:
        names += SAMPLER
    if with_router_loss:
        names.append("aux_loss")
    if config.entropy_coef != 0.0 or config.use_adaptive_entropy:
        names.append("entropy_bonus")
    return tuple(names)


@torch.no_grad()
def token_metrics(metrics: StepMetrics, pack: PackTokens, kl: Tensor | None, config: SAPOConfig, stock: bool) -> None:
    """Add one pack. Every mean is over trained tokens of forwarded rows."""
    tokens = pack.inputs
    n = float(len(tokens.policy_logps))
    z, ratio = tokens.token_log_ratio.detach(), tokens.log_ratio.detach().exp()
    metrics.mean("entropy", pack.entropies.sum(), n)
    metrics.mean("ratio/mean", ratio.sum(), n)
    metrics.mean("log_ratio/abs_mean", z.abs().sum(), n)
    metrics.mean("log_ratio/clamped_frac", tokens.clamped.sum(), n)
    metrics.maximum("ratio/max", ratio.max())
    if kl is not None:
        metrics.mean("kl", kl.sum(), n)
    if stock:
        _gate_metrics(metrics, pack, ratio, n, config)
    if tokens.importance_ratio is not None:
        gap = (tokens.old_logps - pack.sampler_logps).abs().nan_to_num(nan=0.0)
        raw = (tokens.old_logps - pack.sampler_logps).nan_to_num(nan=0.0).exp()
        metrics.mean("sampling/sampling_logp_difference/mean", gap.sum(), n)
        metrics.mean("sampling/importance_sampling_ratio/mean", tokens.importance_ratio.sum(), n)
        metrics.mean("sampling/lost_frac", (tokens.importance_ratio < raw * (1 - 1e-6)).sum(), n)


def _gate_metrics(metrics: StepMetrics, pack: PackTokens, ratio: Tensor, n: float, config: SAPOConfig) -> None:
    """How much of the plain gradient is left: the mean gate weight, or one minus the clipped share."""
    tokens, positive = pack.inputs, pack.inputs.advantages > 0
    if config.loss_type == "sapo":
        tau = temperatures(tokens.advantages, config)
        weight = gate_weight(tokens.log_ratio.detach(), tau, config.gate, tokens.advantages)
        metrics.mean("effective_update_ratio", weight.sum(), n)
        metrics.mean("gate/weight_pos_mean", (weight * positive).sum(), positive.sum())
        negative = tokens.advantages < 0
        metrics.mean("gate/weight_neg_mean", (weight * negative).sum(), negative.sum())
    elif config.loss_type == "cispo":
        metrics.mean("cispo_clip_ratio", ((ratio > config.epsilon_high) & positive).sum(), n)
        metrics.mean("effective_update_ratio", (ratio.clamp(max=config.epsilon_high) / ratio).sum(), n)
    elif config.loss_type == "vespo":
        metrics.mean("effective_update_ratio", vespo_weight(tokens, config).sum(), n)
    else:
        low = (ratio < 1 - config.epsilon) & (tokens.advantages < 0)
        high = (ratio > 1 + config.epsilon_high) & positive
        metrics.mean("clip_ratio/low_mean", low.sum(), n)
        metrics.mean("clip_ratio/high_mean", high.sum(), n)
        metrics.mean("clip_ratio/region_mean", (low | high).sum(), n)
        metrics.mean("effective_update_ratio", n - (low | high).sum(), n)
