"""One rollout of a process, filled by TRL's hooks while completions are generated and scored, used by the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sapo_trl.rollout.rows import MiniBatch, Row, equal_reward_rows, rows_from_lists


def unscored(rewards: Tensor, weights: Tensor) -> Tensor:
    """True for completions that no function scores whose weight is not 0; rewards (..., functions), NaN for None."""
    return rewards[..., (weights != 0).to(rewards.device)].isnan().all(dim=-1)


@dataclass
class Rollout:
    """Everything that is known about a rollout.

    Attributes:
        order: index of each completion in the order in which they are cut into mini-batches; a group's completions go
            to different ones, as in TRL. Empty for an evaluation batch, which is one mini-batch.
        texts: the lists of prompts and completions as TRL holds them.
        generated: prompt ids, completion ids, and masks of tool tokens or None, one list entry per completion.
        limits: most tokens of each completion; empty where the run's limit is that of all.
        refills: generations before it that dynamic sampling has asked for in the same rollout.
        forced: tokens of each completion that an interruption of its thought has put in; None without a budget.
        routes: experts recorded while generating, per completion; None where nothing is recorded.
        rewards: of all processes, (B, functions), NaN for None.
        early_rows: rows whose passes without gradient ran while the rewards were computed.
        mini_batches: what is trained on, one per optimizer step.
        weights_step: with `rollouts_ahead`, the optimizer steps that its weights had seen when it was generated; where
            dynamic sampling has filled it up with newer ones, those of the oldest completions.
    """

    order: list[int] = field(default_factory=list)
    texts: list[list] = field(default_factory=list)
    generated: tuple[Sequence[list[int]], Sequence[list[int]], Sequence[list[int]] | None] = ((), (), None)
    limits: list[int] = field(default_factory=list)
    refills: int = 0
    forced: list[range] | None = None
    routes: list[Tensor] | None = None
    rewards: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    early_rows: list[Row] | None = None
    mini_batches: list[MiniBatch] = field(default_factory=list)
    weights_step: int = 0

    def split(self, rows: Sequence[Row], num_mini_batches: int) -> list[list[Row]]:
        """The rows of each mini-batch."""
        size = len(rows) // num_mini_batches
        shuffled = [rows[i] for i in self.order]
        return [shuffled[start : start + size] for start in range(0, len(rows), size)]

    def rows_without_rewards(self) -> list[Row]:
        """The rows as soon as they are generated, with their recorded routes; their advantage is NaN."""
        rows = rows_from_lists(*self.generated)
        self._give_routes(rows)
        self.early_rows = rows
        return rows

    def give_recorded(self, rows: Sequence[Row]) -> None:
        """Give the scored rows what was recorded while generating or while the rewards were computed."""
        self._give_routes(rows)
        for row, early in zip(rows, self.early_rows or (), strict=bool(self.early_rows)):
            if row.num_trained:
                row.old_logps, row.ref_logps, row.routes = early.old_logps, early.ref_logps, early.routes
                row.repeated_logps = early.repeated_logps

    def _give_routes(self, rows: Sequence[Row]) -> None:
        for row, routes in zip(rows, self.routes or (), strict=self.routes is not None):
            row.routes = routes[: len(row)]  # shorter where TRL masked a truncated completion

    def total_rewards(self, weights: Tensor) -> Tensor:
        """Weighted sum over functions, (B over all processes,); NaN for a completion without a reward that counts."""
        total = (self.rewards * weights.to(self.rewards.device)).nansum(dim=1)
        return total.masked_fill(unscored(self.rewards, weights), torch.nan)

    def right(self) -> Tensor:
        """1 where the first function that scores a completion gives at least 1, else 0, (B over all processes,); NaN
        for a completion without any reward."""
        scored = ~self.rewards.isnan()
        first = self.rewards.gather(1, scored.int().argmax(dim=1, keepdim=True)).squeeze(1)
        return (first >= 1.0).float().masked_fill(~scored.any(dim=1), torch.nan)

    @property
    def lengths(self) -> list[int]:
        """Tokens that the policy wrote, of each completion of this process."""
        _, completions, masks = self.generated
        return [sum(mask) for mask in masks] if masks is not None else [len(ids) for ids in completions]

    def equal_rewards(self, weights: Tensor, num_generations: int, process: int, num_local: int) -> Tensor:
        """True for the process's rows whose group got equal rewards, (num_local,)."""
        equal = equal_reward_rows(self.total_rewards(weights), num_generations)
        return equal[process * num_local : (process + 1) * num_local]
