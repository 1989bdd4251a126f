"""Old and reference log-probs of a rollout: the passes without gradient before its first update."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from sapo_trl.config import SAPOConfig
from sapo_trl.model import inner_model
from sapo_trl.moe.routing_replay import Routing
from sapo_trl.rollout.rollout import Rollout
from sapo_trl.rollout.rows import Row, gathered, set_logps
from sapo_trl.trl_seams import disable_gradient_checkpointing, use_adapter
from sapo_trl.update.budget import PackBudget
from sapo_trl.update.check import CHECK_TOKENS
from sapo_trl.update.engine import Engine
from sapo_trl.update.packing import PackedForward

NOISE_ROWS = 4  # of each process and rollout, for the metric log_ratio/noise_abs_mean


@dataclass
class LogProbPasses:
    """Computes log-probs into rows, once per row, before any update.

    Attributes:
        policy: the policy without its distributed wrapper.
        reference: the reference model; None where beta is 0 or the policy without its adapters is the reference.
    """

    forward: PackedForward
    policy: nn.Module
    reference: nn.Module | None
    routing: Routing
    budget: PackBudget
    engine: Engine
    config: SAPOConfig

    def record(self, parts: Sequence[list[Row]]) -> None:
        """Old log-probs of all mini-batches but the first, whose current ones are its old ones, and reference log-probs
        of all.

        Packs hold rows of several mini-batches, so that more of them share their prompts.
        """
        later = [row for rows in parts[1:] for row in rows if row.old_logps is None]
        policy, options = inner_model(self.policy, self.forward.accelerator), self.config.gradient_checkpointing_kwargs
        assert not isinstance(options, str)  # transformers has read the JSON
        with torch.no_grad(), disable_gradient_checkpointing(policy, options):
            if self.policy.training and self.config.old_logprobs == "trainer" and len(parts) > 1:
                for rows in self._shared_packs(parts, later):
                    self._record_old(rows, self._noise_rows(parts[0], rows))
            if self.config.beta == 0.0:
                return
            packs = self._packs([row for rows in parts for row in rows if row.ref_logps is None])
            if self.reference is not None:
                self.score("ref_logps", self.reference, packs)
            else:
                adapted = self.forward.accelerator.unwrap_model(self.policy)
                with use_adapter(adapted, adapter_name="ref" if "ref" in adapted.peft_config else None):
                    self.score("ref_logps", self.policy, packs)

    def _noise_rows(self, on_policy: list[Row], others: list[Row]) -> list[Row]:
        """Rows of the mini-batch that is trained first, to be scored beside `others`; none where the pass uses the
        update's own packs, and has no noise."""
        if self.config.level == "sequence" or not others:
            return []
        return [row for row in on_policy if row.num_trained and row.old_logps is None][:NOISE_ROWS]

    def _record_old(self, rows: list[Row], noise_rows: list[Row]) -> None:
        routes = [row.routes for row in noise_rows]
        self.score("old_logps", self.policy, self._packs([*rows, *noise_rows]))
        for row, known in zip(noise_rows, routes, strict=True):
            row.repeated_logps, row.old_logps, row.routes = row.old_logps, None, known

    @torch.no_grad()
    def engine_gap(self, rollout: Rollout) -> float | None:
        """Mean |log p of the policy - log p of the rollout engine| before any update; None where the engine gave none.

        Rows that `record` has just scored are compared for nothing. Where no process has any, each scores the first
        `CHECK_TOKENS` tokens of its shortest completion. Every process must call it, and all get the same number.
        """
        rows = [row for part in rollout.mini_batches for row in part.rows]
        known = [row for row in rows if row.sampler_logps is not None and row.num_trained]
        scored = []
        if self.config.old_logprobs == "trainer":
            packed = [row for part in rollout.mini_batches for pack in part.packs for row in pack]
            scored = [row for row in packed if row.old_logps is not None and row.sampler_logps is not None]
        off, num, engines = self._summed_gap(scored, known)
        if num == 0.0 and engines > 0.0:
            starts = [_start(min(known, key=len))] if known else []
            self.score("old_logps", self.policy, [starts])
            off, num, _ = self._summed_gap(starts, known)
        return off / num if num else None

    def _summed_gap(self, scored: Sequence[Row], known: Sequence[Row]) -> list[float]:
        """[sum of the gaps, tokens, rows with log-probs of the engine], over all processes; NaN (unknown) left out."""
        policy, engine, gap = gathered(scored, "old_logps"), gathered(scored, "sampler_logps"), torch.empty(0)
        if policy is not None and engine is not None:
            gap = (policy - engine).abs()
            gap = gap[~gap.isnan()]
        sums = [gap.sum().item(), float(len(gap)), float(len(known))]
        accelerator = self.forward.accelerator
        return accelerator.reduce(torch.tensor(sums, device=accelerator.device), "sum").tolist()

    def _shared_packs(self, parts: Sequence[list[Row]], later: list[Row]) -> list[list[Row]]:
        """Rows that may share packs: all, but for a ratio of sequences those of one mini-batch, as in the update.

        In half precision two passes in different packs differ by 1e-3, which is more than GSPO's clip range.
        """
        if self.config.level != "sequence":
            return [later]
        wanted = {id(row) for row in later}
        return [[row for row in rows if id(row) in wanted] for rows in parts]

    def _packs(self, rows: list[Row]) -> list[list[Row]]:
        self.forward.share(rows)
        (packs,), _ = self.forward.plan_equal([rows], [])
        return packs

    @torch.no_grad()
    def score(self, name: str, model: nn.Module, packs: Sequence[list[Row]]) -> None:
        """Log-probs of packs under `model` into their rows, as `old_logps` or `ref_logps`."""
        waiting = deque(packs)
        while waiting:
            pack = waiting.popleft()
            inputs = self.forward.build_inputs(pack)
            # the routers of the reference choose freely
            routes = self.routing.context(model, pack, inputs) if name == "old_logps" else nullcontext()
            try:
                with routes:
                    set_logps(pack, name, self.forward(model, inputs).logps)
                continue
            except torch.OutOfMemoryError as error:
                message = str(error)
            # outside `except`: there the error's frames would still hold the activations
            self.budget.lower(pack, message, can_retry=not self.engine.packs_are_collective)
            waiting.extendleft(reversed(self.forward.plan(pack)))


def _start(row: Row) -> Row:
    """A copy of a row up to the first `CHECK_TOKENS` tokens of its completion, without old and reference log-probs."""
    length, trained = row.num_prompt + CHECK_TOKENS, row.trained[:CHECK_TOKENS]
    assert row.sampler_logps is not None
    return replace(
        row, input_ids=row.input_ids[:length], trained=trained, prompt_key=None, old_logps=None, ref_logps=None,
        sampler_logps=row.sampler_logps[: int(trained.sum())],
        routes=None if row.routes is None else row.routes[:length],
    )  # fmt: skip
