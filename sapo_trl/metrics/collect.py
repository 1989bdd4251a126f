"""From the sums of an optimizer step to the numbers that are logged."""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor

from sapo_trl.metrics.step import StepMetrics
from sapo_trl.metrics.tokens import quantile_metrics
from sapo_trl.rollout.rows import MiniBatch, tokens_forwarded

# Prefixes of what says nothing about the mini-batch's tokens, or too much
NOT_BY_MINI_BATCH = ("update/", "routing/layer_")


def step_values(
    metrics: StepMetrics,
    mini_batch: MiniBatch,
    accelerator: Accelerator,
    oom_retries: int,
    routers: tuple[int, int],
    is_update: bool,
) -> tuple[dict[str, float], dict[str, list[float]], Tensor]:
    """(metric -> value over all processes, flag -> value of each process, distributions (kinds, classes, bins)).

    Args:
        routers: (MoE layers, experts) where the experts' selection was recorded, else zeros.
        is_update: an optimizer step follows, whose numbers are logged once more under the mini-batch's index, which is
            its staleness in updates.
    """
    forwarded = [row for pack in mini_batch.packs for row in pack]
    per_process = 1.0 / accelerator.num_processes  # makes the reduced mean a total over processes
    tokens = float(sum(tokens_forwarded(pack) for pack in mini_batch.packs))
    trained = float(sum(row.num_trained for row in forwarded))
    if "aux_loss" in metrics.sums:
        metrics.mean("aux_loss", 0.0, 1.0)  # summed over packs, each its share
    metrics.mean("update/skipped_rows_frac", len(mini_batch.rows) - len(forwarded), len(mini_batch.rows))
    metrics.mean("update/skipped_tokens", sum(r.num_trained for r in mini_batch.rows) - trained, per_process)
    metrics.mean("update/forwarded_tokens", tokens, per_process)
    metrics.mean("update/shared_tokens", sum(len(row) for row in forwarded) - tokens, per_process)
    metrics.mean("update/trained_tokens", trained, per_process)
    metrics.mean("update/packs", len(mini_batch.packs), 1.0)
    metrics.mean("update/oom_retries", oom_retries, per_process)
    values, flags, distributions = metrics.reduce(accelerator, routers)
    values |= quantile_metrics(distributions)
    if is_update:
        names = [name for name in values if not name.startswith(NOT_BY_MINI_BATCH)]
        values |= {f"mini_batch_{mini_batch.index}/{name}": values[name] for name in names}
    return values, flags, distributions
