"""The sums of one optimizer step: they stay on the device, and `StepMetrics.reduce` moves them once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from sapo_trl.metrics.histograms import NUM_BINS, counts_by_class
from sapo_trl.metrics.table import GROUPS, MAXIMA, MEANS
from sapo_trl.moe.routing_replay import changed_selections

# What processes tell each other beside the metrics: a loss or gradient that is not finite, a signal to stop, an output
# folder that is gone, and a checksum of the parameters.
FLAGS = ("nonfinite", "stop", "folder", "replica")

# A token's class: the sign of A, then the step's direction: r moves towards 1, away from it, or r is exactly 1.
DIRECTIONS = ("corrective", "expansive", "unmoved")
CLASSES = tuple((sign, direction) for sign in ("pos", "neg") for direction in DIRECTIONS)
# Numbers that are 0 on-policy: z = log r, 1 - w, and w r - 1
DISTRIBUTIONS = ("log_ratio", "weight_lost", "pull_gained")
MEMBERS = {name: [i for i, class_ in enumerate(CLASSES) if name in class_] for name in GROUPS}


class StepMetrics:
    """Weighted sums, plain counts and maxima of one optimizer step."""

    def __init__(self):
        self.sums: dict[str, list] = {}  # name -> [sum, weight]
        self.maxima: dict[str, Tensor] = {}
        self.flags: dict[str, Tensor | float] = {}  # what processes tell each other, one of FLAGS each
        self.distributions: Tensor | None = None  # (DISTRIBUTIONS, CLASSES, bins)
        self.routed: Tensor | None = None  # (layers, changed, counted, entropy, positions, assignments per expert)

    def mean(self, name: str, total: Tensor | float, weight: Tensor | float) -> None:
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

    def routes(self, recorded: Tensor, now: Tensor, entropies: Tensor, num_experts: int) -> None:
        """Add one pack's routing: which of the recorded selections have changed, and how loaded the experts are now.

        Args:
            recorded, now: selected experts, (T, MoE layers, k).
            entropies: of the routers' distributions over all experts, (T, MoE layers).
        """
        changed, counted = changed_selections(recorded, now)
        load = torch.zeros(now.shape[1], num_experts, device=now.device)
        is_counted = counted.T.float().repeat_interleave(now.shape[2], dim=1)  # (MoE layers, T k)
        load.scatter_add_(1, now.transpose(0, 1).flatten(1).long(), is_counted)
        sums = [changed.sum(0), counted.sum(0), entropies.sum(0), torch.full_like(load[:, 0], len(now))]
        table = torch.cat([torch.stack(sums, dim=1), load], dim=1)
        self.routed = table if self.routed is None else self.routed + table

    def reduce(
        self, accelerator: Accelerator, routers: tuple[int, int] = (0, 0)
    ) -> tuple[dict[str, float], dict[str, list[float]], Tensor]:
        """Means and maxima over all processes, every process's flags, and the distributions (DISTRIBUTIONS, CLASSES,
        bins) on the host.

        There is one gather of one vector, and one copy to the host. The order is that of the table of metrics, because
        a process whose packs are all empty has measured none of them. A mean without weight is left out.

        Args:
            routers: (MoE layers, experts) where `routes` is recorded.

        Raises:
            KeyError: a mean or maximum that is not in the table of metrics.
        """
        if unknown := (self.sums.keys() - set(MEANS)) | (self.maxima.keys() - set(MAXIMA)):
            raise KeyError(f"not in the table of metrics (sapo_trl/metrics/table.py): {', '.join(sorted(unknown))}")
        flat = [x for name in MEANS for x in self.sums.get(name, [0.0, 0.0])]
        flat += [self.maxima.get(name, float("-inf")) for name in MAXIMA]
        flat += [self.flags.get(name, 0.0) for name in FLAGS]
        device, shape = accelerator.device, (len(DISTRIBUTIONS), len(CLASSES), NUM_BINS)
        scalars = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=device).detach() for x in flat])
        counts = torch.zeros(shape, device=device) if self.distributions is None else self.distributions
        routed = torch.zeros(routers[0], 4 + routers[1], device=device) if self.routed is None else self.routed
        local = torch.cat([scalars, counts.flatten(), routed.flatten()])
        everywhere = accelerator.gather(local).view(accelerator.num_processes, -1).cpu()
        numbers, counts, routed = everywhere.split([len(flat), counts.numel(), routed.numel()], dim=1)
        sums, tops, flags = numbers.split([2 * len(MEANS), len(MAXIMA), len(FLAGS)], dim=1)
        sums, tops = sums.sum(0).tolist(), tops.amax(0).tolist()
        values = {name: sums[2 * i] / sums[2 * i + 1] for i, name in enumerate(MEANS) if sums[2 * i + 1] > 0}
        values |= {name: top for name, top in zip(MAXIMA, tops, strict=True) if top > float("-inf")}
        if routers[0]:
            values |= route_metrics(routed.sum(0).view(routers[0], -1))
        return values, dict(zip(FLAGS, flags.T.tolist(), strict=True)), counts.sum(0).view(shape)


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
