"""From the rows of a rollout to mini-batches of packs: which rows are forwarded, where, and what comes before."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sapo_trl.config import SAPOConfig
from sapo_trl.moe.routing_replay import Routing
from sapo_trl.rollout.rollout import Rollout
from sapo_trl.rollout.rows import MiniBatch, Row
from sapo_trl.update.balance import rebalance
from sapo_trl.update.check import ROUNDING, noise_in_training, packed_equals_plain, precision
from sapo_trl.update.memory import MemoryProbe
from sapo_trl.update.packing import PackedForward
from sapo_trl.update.passes import LogProbPasses


@dataclass
class UpdatePlan:
    """Plans the update of a rollout.

    Attributes:
        skips_zero_advantage: rows whose advantage is exactly 0 can't move the weights and are not forwarded.
        has_images: prompts contain images, which TRL hands over after the rewards.
        counts_all_rows: rows without a trained token are forwarded too (their prompts count in the routers' loss).
        is_checked: `check` has run.
    """

    forward: PackedForward
    passes: LogProbPasses
    memory: MemoryProbe
    routing: Routing
    config: SAPOConfig
    skips_zero_advantage: bool
    has_images: bool
    counts_all_rows: bool = False
    is_checked: bool = False

    def check(self, model: nn.Module, ids: Tensor) -> None:
        """`packed_equals_plain`, once before the first rollout, and a warning where dropout is to be off and the model
        is random all the same; `ids`: tokens of a real prompt, (T,)."""
        if self.is_checked:
            return
        self.is_checked = True
        packed_equals_plain(self.forward, model, ids)
        if self.config.disable_dropout and (noise := noise_in_training(self.forward, model, ids)):
            warnings.warn(
                f"two passes of the model in training differ by {noise:.2g} a token: it draws random numbers in its "
                "forward pass (a dropout called as a function, noise on a router), which is noise in the ratio r, and "
                "no movement of the policy. Switch it off in the model's config.",
                stacklevel=2,
            )

    def before_rewards(self, rollout: Rollout, model: nn.Module) -> None:
        """Passes for old and reference log-probs while the rewards are computed, where they don't depend on them.

        They do where rows with advantage 0 are skipped: then the rewards come first, unless `overlap_rewards` says that
        rewards are slower than passes over such rows. What runs never depends on the clock, so a seed gives the same
        numbers. A round of dynamic sampling has no order yet, and no passes.
        """
        if self.has_images or not rollout.order or (self.skips_zero_advantage and not self.config.overlap_rewards):
            return
        rows = rollout.rows_without_rewards()
        self.memory.settle(model, max(row.num_prompt for row in rows))
        self.passes.record(self.active(rollout.split(rows, self.config.num_mini_batches)))

    def after_rewards(
        self,
        rollout: Rollout,
        rows: list[Row],
        num_tokens: float,
        model: nn.Module,
        timed: Callable[[str], AbstractContextManager],
    ) -> dict[str, float]:
        """Fill `rollout.mini_batches`; returns metrics of the balance between processes.

        Args:
            num_tokens: trained tokens of the rollout, mean over processes.
            model: the wrapped policy.
            timed: context that measures the named phase.
        """
        self.memory.settle(model, max(row.num_prompt for row in rows))
        parts = rollout.split(rows, self.config.num_mini_batches)
        active, metrics = self._rebalanced(self.active(parts))
        with timed("old_and_reference_logps"):
            self.passes.record(active)
        rollout.mini_batches = self.forward.plan_mini_batches(parts, active, num_tokens)
        return metrics

    def engine_check(self, rollout: Rollout, engine_dtype: torch.dtype) -> dict[str, float]:
        """Does the rollout engine hold the policy's weights? How far its log-probs are off, over what rounding explains
        in the coarser of the two number formats: a metric, which the collapse guard judges. Every process must call
        it."""
        off, formats = self.passes.engine_gap(rollout), (precision(self.forward, self.passes.policy), engine_dtype)
        return {} if off is None else {"sampling/engine_check": off / max(ROUNDING[dtype] for dtype in formats)}

    def evaluation(self, rows: list[Row], num_tokens: float, num_generations: int) -> MiniBatch:
        """An evaluation batch as one mini-batch."""
        active = self.active([rows])
        self.passes.record(active)
        (mini_batch,) = self.forward.plan_mini_batches([rows], active, num_tokens)
        return replace(mini_batch, num_generations=num_generations)

    def active(self, parts: list[list[Row]]) -> list[list[Row]]:
        """The rows that are forwarded: they have trained tokens, count in an average, and can move the weights."""
        skips = self.skips_zero_advantage

        def wanted(row: Row) -> bool:
            counts = self.counts_all_rows or bool(row.num_trained and row.group_tokens != 0)
            return counts and not (skips and row.advantage == 0.0)

        return [[row for row in rows if wanted(row)] for rows in parts]

    def _rebalanced(self, active: list[list[Row]]) -> tuple[list[list[Row]], dict[str, float]]:
        """The active rows rebalanced over processes, unless they hold routes or pictures, too large to send."""
        early = self.config.overlap_rewards or not self.skips_zero_advantage
        has_routes = self.routing.follows_generation or (self.routing.is_recorded and early)
        accelerator = self.forward.accelerator
        if accelerator.num_processes == 1 or not self.config.balance_rows or has_routes or self.has_images:
            return active, {}
        for rows in active:
            self.forward.share(rows)
        moved, before, after = rebalance(active, self.forward.cost, accelerator)
        return moved, {"update/imbalance_before_dealing": before, "update/imbalance": after}
