"""Evaluation while training: every problem counts once and weighs the same, whatever the batches and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sapo_trl.stats import mean_with_interval


@dataclass
class EvaluationRecord:
    """What the batches of one evaluation gave.

    Args:
        num_completions: of the whole set over all processes, None for a stream. Those beyond it are repeats, with which
            accelerate fills the last batch.
        num_generations: completions of a problem.

    Attributes:
        rewards: of each batch without repeats, (completions, functions), NaN for None.
        sizes: completions of each batch without repeats: what weighs its other metrics.
    """

    num_completions: int | None
    num_generations: int
    rewards: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, rewards: Tensor) -> None:
        """One batch over all processes, (B, functions)."""
        left = len(rewards) if self.num_completions is None else self.num_completions - sum(self.sizes)
        kept = rewards[: max(0, min(left, len(rewards)))].cpu()
        self.rewards.append(kept)
        self.sizes.append(len(kept))

    def values(
        self, logged: Mapping[str, Sequence[float]], names: Sequence[str], weights: Tensor, accuracy: str
    ) -> dict[str, float]:
        """Metric -> mean over the whole set.

        Args:
            logged: metric -> one value per batch.
            names: of the reward functions.
            weights: of the reward functions, (functions,).
            accuracy: the function whose mean is Pass@1.
        """
        found = {name: self._weighted(values) for name, values in logged.items() if len(values) == len(self.sizes)}
        found |= {name: values[-1] for name, values in logged.items() if len(values) != len(self.sizes) and values}
        if not sum(self.sizes):
            return found
        rewards = torch.cat(self.rewards).double().view(-1, self.num_generations, len(names))  # problems first
        scored = ~rewards.isnan().all(-1)
        total = (rewards * weights.double().cpu()).nansum(-1).masked_fill(~scored, math.nan)
        for i, name in enumerate(names):
            found[f"rewards/{name}/mean"] = rewards[..., i].nanmean().item()
            found[f"rewards/{name}/std"] = _std(rewards[..., i])
        per_problem = total.nanmean(dim=1)
        spread = total.nan_to_num(nan=math.inf).amin(1) >= total.nan_to_num(nan=-math.inf).amax(1)
        found |= {
            "reward": per_problem.nanmean().item(),
            "reward_std": _std(total),
            "frac_reward_zero_std": spread.float().mean().item(),
            "rewards/unscorable_frac": (~scored).float().mean().item(),
        }
        if accuracy in names:
            right = rewards[..., names.index(accuracy)].nanmean(dim=1)
            found |= _pass_at_1(right[~right.isnan()].tolist())
        return found

    def _weighted(self, values: Sequence[float]) -> float:
        pairs = [(x, n) for x, n in zip(values, self.sizes, strict=True) if not math.isnan(x) and n]
        return sum(x * n for x, n in pairs) / sum(n for _, n in pairs) if pairs else math.nan


def _pass_at_1(right: Sequence[float]) -> dict[str, float]:
    if not right:
        return {}
    interval = mean_with_interval(right)
    return {"pass_at_1": interval.mean, "pass_at_1_low": interval.low, "pass_at_1_high": interval.high}


def _std(values: Tensor) -> float:
    known = values[~values.isnan()]
    return known.std().item() if len(known) > 1 else math.nan


def by_set(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The names as they are logged: `eval_reward`, or `eval_<set>_reward` of one of several sets."""
    return {f"{prefix}_{name}": value for name, value in values.items()}
