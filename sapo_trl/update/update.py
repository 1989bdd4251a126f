"""The update: a mini-batch's packs forward and backward, and what happens when one of them does not fit.

One mini-batch is one optimizer step. The loss weights are fixed before the first pack, gradients are synchronised at
the last pack only, every process runs the same number of packs, and nothing between two packs waits for the device.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from sapo_trl.metrics.step import (
    MAXIMA,
    RatioDump,
    StepMetrics,
    by_mini_batch,
    metric_names,
    quantile_metrics,
    token_metrics,
)
from sapo_trl.moe.routing_replay import Routing, routed, tape_of
from sapo_trl.objective import MiniBatchCounts, row_weights
from sapo_trl.rollout.rows import MiniBatch, Row, set_logps
from sapo_trl.trl_seams import disable_gradient_checkpointing, set_sync_gradients, use_adapter
from sapo_trl.update.balance import deal
from sapo_trl.update.loss import (
    WholeBatch,
    batch_share,
    entropy_bonus,
    pack_tokens,
    router_loss,
    token_loss,
    whole_batch,
)
from sapo_trl.update.packing import PackedForward, PackInputs, pack_tokens_forwarded

if TYPE_CHECKING:
    from sapo_trl.trainer import SAPOTrainer


class Update:
    """Runs mini-batches through the trainer's model.

    Args:
        routing: whether the experts' selection is recorded and replayed.
        router: (experts, experts per token) where the load-balancing loss is on, else None.
    """

    def __init__(
        self,
        trainer: SAPOTrainer,
        forward: PackedForward,
        routing: Routing,
        router: tuple[int, int] | None,
        stock: bool,
    ):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.forward, self.routing, self.router, self.stock = forward, routing, router, stock
        self.is_routed = routing.is_recorded
        self.oom_retries = 0
        self.distributions: Tensor | None = None  # of the last step, on the host
        # Under these every pack is a collective, or leaves sums in the engine that can't be taken back
        kinds = (DistributedType.DEEPSPEED, DistributedType.FSDP)
        self.is_engine = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.packs_are_collective = self.accelerator.distributed_type in kinds

    # ---- passes without gradient -------------------------------------------------------------------------------

    def deal(self, live: list[list[Row]]) -> list[list[Row]]:
        """Rows with a forward pass, evened out over processes; not where they hold routes, too large to send."""
        early = self.args.overlap_rewards or not self.trainer._skip_dead
        has_routes = self.routing.follows_generation or (self.is_routed and early)
        if self.accelerator.num_processes == 1 or not self.args.balance_rows or has_routes:
            return live
        for rows in live:
            self.forward.share(rows)
        dealt, before, after = deal(live, self.forward.cost, self.accelerator)
        log = self.trainer._metrics["train"]
        log["update/imbalance_before_dealing"].append(before)
        log["update/imbalance"].append(after)
        return dealt

    def record_logps(self, parts: Sequence[list[Row]], first: int) -> None:
        """Old log-probs for all mini-batches but the `first` to be trained, reference log-probs for all, before any
        update.

        Once per row; rows of all mini-batches share packs, and with them their prompts.
        """
        trainer = self.trainer
        later = [row for k, rows in enumerate(parts) for row in rows if k != first and row.old_logps is None]
        with torch.no_grad(), disable_gradient_checkpointing(trainer.model, self.args.gradient_checkpointing_kwargs):
            if trainer.model.training and self.args.old_logprobs == "trainer" and len(parts) > 1:
                self.record("old_logps", trainer.model, self._packs(later))
            if self.args.beta == 0.0:  # the trainer's own is 0 while it holds TRL's passes back
                return
            packs = self._packs([row for rows in parts for row in rows if row.ref_logps is None])
            if trainer.ref_model is not None:
                self.record("ref_logps", trainer.ref_model, packs)
            else:
                policy = self.accelerator.unwrap_model(trainer.model)
                with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                    self.record("ref_logps", trainer.model, packs)

    def _packs(self, rows: list[Row]) -> list[list[Row]]:
        self.forward.share(rows)
        (packs,), _ = self.forward.plan_equal([rows], [])
        return packs

    @torch.no_grad()
    def record(self, name: str, model: nn.Module, packs: Sequence[list[Row]]) -> None:
        """Log-probs of packs under `model` into their rows, as `old_logps` or `ref_logps`."""
        waiting = deque(packs)
        while waiting:
            pack = waiting.popleft()
            inputs = self.forward.build_inputs(pack)
            # the reference routes freely
            routes = self._routed(model, pack, inputs) if name == "old_logps" else nullcontext()
            try:
                with routes:
                    set_logps(pack, name, self.forward(model, inputs).logps)
                continue
            except torch.OutOfMemoryError as error:
                message = str(error)
            # outside `except`: there the error's frames would still hold the activations
            self._lower_budget(pack, message, can_retry=not self.packs_are_collective)
            waiting.extendleft(reversed(self.forward.plan(pack)))

    def _routed(self, model: nn.Module, pack: list[Row], inputs: PackInputs):
        """Context of a pack's passes: routes recorded where its rows have none, replayed under r2 and r3."""
        if not self.is_routed or not self.trainer.model.training:
            return nullcontext()
        return routed(model, pack, inputs, replay=self.routing.replays)

    # ---- mini-batch --------------------------------------------------------------------------------------------

    def run(self, model: nn.Module, mini_batch: MiniBatch, backward: bool) -> tuple[Tensor, Tensor, dict[str, float]]:
        """(loss, the same at r = 1, metrics) of a mini-batch.

        A pack that does not fit starts it again with smaller packs. The loss at r = 1 is a constant of the step: what
        is reported leaves it out, so that an on-policy step reports 0 and the rest says how far the policy has moved.
        """
        while True:
            try:
                loss, at_old_policy, metrics = self._run_packs(model, mini_batch, backward)
                return loss, at_old_policy, self._values(metrics, mini_batch, backward)
            except torch.OutOfMemoryError as error:
                message = str(error)
            self._recover(model, mini_batch, message)

    def _run_packs(self, model: nn.Module, mini_batch: MiniBatch, backward: bool) -> tuple[Tensor, Tensor, StepMetrics]:
        self._synchronising = False
        whole = self._whole_batch(model, mini_batch)
        metrics, total = StepMetrics(), torch.zeros((), device=self.accelerator.device)
        at_old_policy = torch.zeros_like(total)
        self.ratios = RatioDump() if backward and self._dumps(mini_batch) else None
        fresh: list[tuple[list[Row], Tensor]] = []
        for i, self._pack in enumerate(mini_batch.packs):
            pack, last = self._pack, i == len(mini_batch.packs) - 1
            # DeepSpeed refuses no_sync; accelerate tells it the boundary through sync_gradients
            self._synchronising = last or self.is_engine or not backward
            sync = nullcontext() if self._synchronising else self.accelerator.no_sync(model)
            inputs = self.forward.build_inputs(pack)
            with sync, self._routed(model, pack, inputs) as live:
                loss, baseline, logps = self._pack_loss(model, pack, inputs, mini_batch, whole, metrics)
                if backward:
                    set_sync_gradients(self.accelerator, last)
                    self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_engine else {}))
            if live is not None and pack:
                now, entropies = live.routes(), live.router_entropies()
                if inputs.expand is not None:
                    now, entropies = (x.index_select(0, inputs.expand) for x in (now, entropies))
                recorded = torch.cat([row.routes for row in pack])
                metrics.routes(recorded, now, entropies, tape_of(self.trainer.model).num_experts)
            total += loss.detach()
            at_old_policy += baseline
            if backward and pack and pack[0].old_logps is None:
                fresh.append((pack, logps))
        if backward and self.trainer.carries_images:
            for p in model.parameters():  # a mini-batch without images: its vision tower steps with zeros, not None
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
        for pack, logps in fresh:  # on-policy now; a second iteration compares with it
            set_logps(pack, "old_logps", logps)
        return total, at_old_policy, metrics

    def _whole_batch(self, model: nn.Module, mini_batch: MiniBatch) -> WholeBatch | None:
        """What packs must know of each other; None where the only pack can find it out itself.

        The entropy threshold and the experts' loads need every pack's forward pass before the first backward: with
        several packs that is one more pass without gradient.
        """
        if self.router is None and self.args.top_entropy_quantile == 1.0:
            return WholeBatch(mini_batch.num_tokens)
        if len(mini_batch.packs) == 1:
            return None
        shares = []
        with torch.no_grad():
            for self._pack in mini_batch.packs:
                inputs = self.forward.build_inputs(self._pack)
                with self._routed(model, self._pack, inputs):
                    outputs = self.forward(model, inputs, self.router is not None)
                if self._pack:
                    shares.append(batch_share(outputs, self.router))
        return whole_batch(shares, mini_batch, self.args, self.router, self.accelerator)

    def _pack_loss(
        self,
        model: nn.Module,
        pack: list[Row],
        inputs: PackInputs,
        mini_batch: MiniBatch,
        whole: WholeBatch | None,
        metrics: StepMetrics,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss of the pack, its policy part at r = 1, its log-probs); the last two without gradient."""
        outputs = self.forward(model, inputs, self.router is not None)
        if whole is None:
            shares = [batch_share(outputs, self.router)] if pack else []
            whole = whole_batch(shares, mini_batch, self.args, self.router, self.accelerator)
        if not pack:  # gradients of zero, so that the optimizer steps as for any other mini-batch
            nothing = 0.0 * (outputs.logps.sum() + outputs.entropies.sum())
            return nothing, nothing.detach(), outputs.logps.detach()
        tokens = pack_tokens(outputs, pack, inputs.rows, self.args)
        per_token, kl = token_loss(self.trainer.token_objective(tokens.inputs), tokens, whole, self.args)
        lengths = torch.tensor([row.num_trained for row in pack])
        weights = row_weights(self.args.aggregation, lengths, self._counts(mini_batch))
        weights = weights.to(per_token.device, non_blocking=True)[inputs.rows]
        loss = (weights * per_token).sum()
        with torch.no_grad():
            inputs_now, old_logps = tokens.inputs, tokens.inputs.old_logps
            known = torch.where(old_logps.isfinite(), old_logps, inputs_now.policy_logps.detach())
            old = replace(inputs_now, policy_logps=known)
            baseline, _ = token_loss(self.trainer.token_objective(old), tokens, whole, self.args)
            baseline = (weights * (baseline if kl is None else baseline - self.args.beta * kl)).sum()
        if self.trainer._entropy_bonus_enabled:
            bonus, count = entropy_bonus(tokens, whole)
            metrics.mean("entropy_bonus", bonus.detach(), count)
            loss = loss - self._applied_entropy_coef() * bonus / max(whole.entropy_tokens, 1.0)
        if self.router is not None:
            aux = router_loss(tokens.router_logits, whole)
            metrics.mean("aux_loss", aux.detach(), 0.0)
            loss = loss + self.trainer.router_aux_loss_coef * aux
        token_metrics(metrics, tokens, kl, self.args, self.stock)
        if self.ratios is not None:
            self.ratios.add(tokens.inputs)
        return loss, baseline, outputs.logps.detach()

    def _dumps(self, mini_batch: MiniBatch) -> bool:
        every, step = self.args.dump_ratios_every, self.trainer.state.global_step + 1
        return every > 0 and step % every == 0 and mini_batch.index > 0

    def _counts(self, mini_batch: MiniBatch) -> MiniBatchCounts:
        return MiniBatchCounts(
            num_rows=len(mini_batch.rows),
            num_tokens=mini_batch.num_tokens,
            num_rollout_tokens=mini_batch.num_rollout_tokens,
            num_mini_batches=self.args.num_mini_batches if self.trainer.model.training else 1,
            max_completion_length=self.args.max_completion_length,
        )

    # ---- memory ------------------------------------------------------------------------------------------------

    def _recover(self, model: nn.Module, mini_batch: MiniBatch, message: str) -> None:
        """Take back what the failed mini-batch has summed so far, and cut it into smaller packs.

        With several processes only before the gradients meet, and only where no other pass of the mini-batch is a
        collective: the others would wait for what is started again here.
        """
        alone = self.accelerator.num_processes == 1
        meets = self._synchronising or self.router is not None or self.args.top_entropy_quantile < 1.0
        self._lower_budget(self._pack, message, can_retry=not self.packs_are_collective and (alone or not meets))
        model.zero_grad()
        if not self.routing.follows_generation:  # of packs that had succeeded; those of an old-log-prob pass stay too
            for row in (row for pack in mini_batch.packs for row in pack if row.old_logps is None):
                row.routes = None
        mini_batch.packs = self.forward.plan([row for pack in mini_batch.packs for row in pack]) or [[]]

    def _lower_budget(self, pack: list[Row], message: str, can_retry: bool) -> None:
        tokens = pack_tokens_forwarded(pack)
        if not can_retry or len(pack) < 2:
            reason = (
                "it is a single row: set activation_checkpointing: true or a smaller max_completion_length"
                if len(pack) < 2
                else f"other processes are in the middle of it: set max_tokens_per_pack: {tokens // 2}"
            )
            raise torch.OutOfMemoryError(
                f"a pack of {tokens} tokens ({len(pack)} rows) does not fit into memory and can't be cut, because "
                f"{reason}. {message}"
            )
        self.forward.max_tokens, self.oom_retries = max(1, tokens // 2), self.oom_retries + 1
        warnings.warn(
            f"a pack of {tokens} tokens did not fit into memory; from now on packs hold {self.forward.max_tokens}. "
            f"Set max_tokens_per_pack: {self.forward.max_tokens} to plan so from the start.",
            stacklevel=2,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ---- entropy control and metrics ---------------------------------------------------------------------------

    def _applied_entropy_coef(self) -> float:
        """TRL's adaptive control: the bonus acts only while last step's entropy was at or below the target."""
        trainer = self.trainer
        if trainer.use_adaptive_entropy and trainer._last_world_entropy > self.args.entropy_target:
            return 0.0
        return trainer.entropy_coef

    def _values(self, metrics: StepMetrics, mini_batch: MiniBatch, is_update: bool) -> dict[str, float]:
        """Reduce the step's metrics, add what the update did, and move the entropy controller."""
        trainer = self.trainer
        forwarded = [row for pack in mini_batch.packs for row in pack]
        per_process = 1.0 / self.accelerator.num_processes  # makes the reduced mean a total over processes
        tokens = float(sum(pack_tokens_forwarded(pack) for pack in mini_batch.packs))
        metrics.mean("aux_loss", 0.0, 1.0)  # summed over packs, each its share
        metrics.mean("update/skipped_rows_frac", len(mini_batch.rows) - len(forwarded), len(mini_batch.rows))
        trained = float(sum(row.num_trained for row in forwarded))
        metrics.mean("update/skipped_tokens", sum(r.num_trained for r in mini_batch.rows) - trained, per_process)
        metrics.mean("update/forwarded_tokens", tokens, per_process)
        metrics.mean("update/shared_tokens", sum(len(row) for row in forwarded) - tokens, per_process)
        metrics.mean("update/trained_tokens", trained, per_process)
        metrics.mean("update/packs", len(mini_batch.packs), 1.0)
        metrics.mean("update/oom_retries", self.oom_retries, per_process)
        names = metric_names(self.args, self.stock, self.router is not None)
        if self.ratios is not None:
            step = trainer.state.global_step + 1
            self.ratios.save(self.args.output_dir, step, mini_batch.index, self.accelerator.process_index)
        routers = (0, 0)
        if self.is_routed and is_update:
            tape = tape_of(trainer.model)
            routers = tape.num_layers, tape.num_experts
        values, self.distributions = metrics.reduce(self.accelerator, names, MAXIMA, routers)
        values |= quantile_metrics(self.distributions)
        values |= by_mini_batch(values, mini_batch.index) if is_update else {}
        if is_update and trainer._entropy_bonus_enabled:
            values["entropy_coef"] = trainer.entropy_coef
            if trainer.use_adaptive_entropy and "entropy_bonus" in values:
                self._move_entropy_coef(values["entropy_bonus"])
        return values

    def _move_entropy_coef(self, entropy: float) -> None:
        trainer, args = self.trainer, self.args
        step = args.entropy_coef_delta if entropy <= args.entropy_target else -args.entropy_coef_delta
        trainer.entropy_coef = min(max(trainer.entropy_coef + step, args.entropy_coef_min), args.entropy_coef_max)
        trainer._last_world_entropy = entropy
