"""The update: a mini-batch's packs forward and backward.

One mini-batch is one optimizer step. The loss weights are fixed before the first pack, every process runs the same
number of packs, and nothing between two packs waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sapo_trl.config import SAPOConfig
from sapo_trl.metrics.dump import RatioDump
from sapo_trl.metrics.step import StepMetrics
from sapo_trl.metrics.tokens import token_metrics
from sapo_trl.moe.routing_replay import RouteRecord, Routing
from sapo_trl.objective import Objective, SoftGate
from sapo_trl.rollout.rows import MiniBatch, Row, set_logps
from sapo_trl.update.aggregation import MiniBatchCounts, row_weights
from sapo_trl.update.budget import PackBudget, PackTooLarge
from sapo_trl.update.engine import Engine
from sapo_trl.update.entropy import EntropyController
from sapo_trl.update.loss import (
    RouterLoss,
    WholeBatch,
    batch_share,
    entropy_bonus,
    pack_tokens,
    router_loss,
    token_loss,
    whole_batch,
)
from sapo_trl.update.packing import PackedForward, PackInputs


@dataclass
class UpdateResult:
    """What a mini-batch gave.

    Attributes:
        loss: scalar, without gradient.
        at_old_policy: the same at r = 1, a constant of the step: what is reported leaves it out, so that an on-policy
            step reports 0 and the rest says how far the policy has moved.
        metrics: sums, not reduced yet.
        fresh: log-probs of packs whose rows had no old ones: they were on-policy.
    """

    loss: Tensor
    at_old_policy: Tensor
    metrics: StepMetrics
    fresh: list[tuple[list[Row], Tensor]]

    def add(self, loss: Tensor, at_old_policy: Tensor) -> None:
        self.loss = self.loss + loss
        self.at_old_policy = self.at_old_policy + at_old_policy


class Update:
    """Runs mini-batches through a model.

    Args:
        router: the load-balancing loss, or None where it is off.
        entropy: the entropy bonus, or None.
        fills_gradients: parameters without a gradient get zeros (a mini-batch without images leaves the vision tower
            out, and the optimizer must step all the same).
    """

    def __init__(
        self,
        forward: PackedForward,
        objective: Objective,
        config: SAPOConfig,
        engine: Engine,
        budget: PackBudget,
        routing: Routing,
        router: RouterLoss | None = None,
        entropy: EntropyController | None = None,
        fills_gradients: bool = False,
    ):
        self.forward, self.objective, self.config, self.engine, self.budget = forward, objective, config, engine, budget
        self.routing, self.router, self.entropy, self.fills_gradients = routing, router, entropy, fills_gradients
        self.reference_gate = SoftGate(config.sapo_temperature_pos, config.sapo_temperature_neg)

    def run(
        self, model: nn.Module, mini_batch: MiniBatch, backward: bool, dump: RatioDump | None = None
    ) -> UpdateResult:
        """Forward, and with `backward` also backward, over the packs of a mini-batch.

        A pack that does not fit starts it again with smaller packs.

        Raises:
            torch.OutOfMemoryError: a pack does not fit and can't be cut.
        """
        while True:
            try:
                result = self._run_packs(model, mini_batch, backward, dump)
                break
            except PackTooLarge as error:
                pack, synchronised, message = error.pack, error.synchronised, str(error)
            # outside `except`: there the error's frames would still hold the activations
            self._recover(model, mini_batch, pack, synchronised, message)
        if backward:
            self._finish(model, result)
        return result

    def _run_packs(
        self, model: nn.Module, mini_batch: MiniBatch, backward: bool, dump: RatioDump | None
    ) -> UpdateResult:
        if dump is not None:
            dump.clear()
        zero = torch.zeros((), device=self.forward.accelerator.device)
        result = UpdateResult(zero, zero, StepMetrics(), [])
        whole = self._whole_batch(model, mini_batch)
        for i, pack in enumerate(mini_batch.packs):
            is_last = i == len(mini_batch.packs) - 1
            try:
                self._run_pack(model, pack, mini_batch, whole, result, dump, backward, is_last)
            except torch.OutOfMemoryError as error:
                synchronised = not backward or self.engine.synchronises(is_last)
                raise PackTooLarge(pack, synchronised, str(error)) from None
        return result

    def _run_pack(
        self,
        model: nn.Module,
        pack: list[Row],
        mini_batch: MiniBatch,
        whole: WholeBatch | None,
        result: UpdateResult,
        dump: RatioDump | None,
        backward: bool,
        is_last: bool,
    ) -> None:
        inputs = self.forward.build_inputs(pack)
        with self.engine.pack(model, is_last or not backward), self.routing.context(model, pack, inputs) as live:
            loss, at_old_policy, logps = self._pack_loss(model, pack, inputs, mini_batch, whole, result.metrics, dump)
            if backward:
                self.engine.backward(loss, is_last)
        if live is not None and pack:
            self._count_routes(live, pack, inputs, result.metrics)
        result.add(loss.detach(), at_old_policy)
        if backward and pack and pack[0].old_logps is None:
            result.fresh.append((pack, logps))

    def _finish(self, model: nn.Module, result: UpdateResult) -> None:
        if self.fills_gradients:
            for p in model.parameters():
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
        for pack, logps in result.fresh:  # on-policy now; a second iteration compares with it
            set_logps(pack, "old_logps", logps)

    def _count_routes(
        self, live: RouteRecord, pack: list[Row], inputs: PackInputs, metrics: StepMetrics
    ) -> None:
        now, entropies = live.routes(), live.router_entropies()
        if inputs.expand is not None:
            now, entropies = (x.index_select(0, inputs.expand) for x in (now, entropies))
        recorded = torch.cat([row.routes for row in pack if row.routes is not None])
        metrics.routes(recorded, now, entropies, self.routing.num_experts)

    def _whole_batch(self, model: nn.Module, mini_batch: MiniBatch) -> WholeBatch | None:
        """What packs must know of each other; None where the only pack can find it out itself.

        The entropy threshold and the experts' loads need every pack's forward pass before the first backward: with
        several packs that is one more pass without gradient.
        """
        if self.router is None and self.config.top_entropy_quantile == 1.0:
            return WholeBatch(mini_batch.num_tokens)
        if len(mini_batch.packs) == 1:
            return None
        shares = []
        with torch.no_grad():
            for pack in mini_batch.packs:
                inputs = self.forward.build_inputs(pack)
                try:
                    with self.routing.context(model, pack, inputs):
                        outputs = self.forward(model, inputs, self.router is not None)
                except torch.OutOfMemoryError as error:
                    raise PackTooLarge(pack, synchronised=False, message=str(error)) from None
                if pack:
                    shares.append(batch_share(outputs, self.router))
        return whole_batch(shares, mini_batch, self.config, self.router, self.forward.accelerator)

    def _pack_loss(
        self,
        model: nn.Module,
        pack: list[Row],
        inputs: PackInputs,
        mini_batch: MiniBatch,
        whole: WholeBatch | None,
        metrics: StepMetrics,
        dump: RatioDump | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss of the pack, its policy part at r = 1, its log-probs); the last two without gradient."""
        outputs = self.forward(model, inputs, self.router is not None)
        if whole is None:
            shares = [batch_share(outputs, self.router)] if pack else []
            whole = whole_batch(shares, mini_batch, self.config, self.router, self.forward.accelerator)
        if not pack:  # gradients of zero, so that the optimizer steps as for any other mini-batch
            nothing = 0.0 * (outputs.logps.sum() + outputs.entropies.sum())
            return nothing, nothing.detach(), outputs.logps.detach()
        config, corrects = self.config, self.objective.corrects_engine
        tokens = pack_tokens(outputs, pack, inputs.rows, config)
        per_token, kl = token_loss(self.objective.surrogate(tokens.inputs), tokens, whole, config, corrects)
        lengths = torch.tensor([row.num_trained for row in pack])
        weights = row_weights(config.aggregation, lengths, self._counts(mini_batch, model.training))
        weights = weights.to(per_token.device, non_blocking=True)[inputs.rows]
        loss = (weights * per_token).sum()
        with torch.no_grad():
            old_logps = tokens.inputs.old_logps
            known = torch.where(old_logps.isfinite(), old_logps, tokens.inputs.policy_logps.detach())
            surrogate = self.objective.surrogate(replace(tokens.inputs, policy_logps=known))
            at_old, _ = token_loss(surrogate, tokens, whole, config, corrects)
            at_old = (weights * (at_old if kl is None else at_old - config.beta * kl)).sum()
        loss = loss + self._extra_loss(tokens, whole, metrics)
        token_metrics(metrics, tokens, kl, self.objective, self.reference_gate)
        if dump is not None:
            dump.add(tokens.inputs)
        return loss, at_old, outputs.logps.detach()

    def numbers_of(self, model: nn.Module, pack: list[Row]) -> dict[str, tuple[Tensor, Tensor]]:
        """What enters the loss of a pack, in the order of its making: name -> (values, their rows)."""
        inputs = self.forward.build_inputs(pack)
        with self.forward.packed(model), self.routing.context(model, pack, inputs):
            outputs = self.forward(model, inputs)
        tokens = pack_tokens(outputs, pack, inputs.rows, self.config)
        parts = {
            "advantage": tokens.inputs.advantages,
            "reference log-probs": tokens.ref_logps,
            "policy log-probs": tokens.inputs.policy_logps,
            "old log-probs": tokens.inputs.old_logps,
            "entropy": tokens.entropies,
            "objective": self.objective.surrogate(tokens.inputs),
        }
        return {name: (values, inputs.rows) for name, values in parts.items() if values is not None}

    def _extra_loss(self, tokens, whole: WholeBatch, metrics: StepMetrics) -> Tensor | float:
        """Entropy bonus and load-balancing loss of a pack."""
        extra: Tensor | float = 0.0
        if self.entropy is not None:
            bonus, count = entropy_bonus(tokens, whole)
            metrics.mean("entropy_bonus", bonus.detach(), count)
            extra = extra - self.entropy.applied * bonus / max(whole.entropy_tokens, 1.0)
        if self.router is not None:
            aux = router_loss(tokens.router_logits, whole)
            metrics.mean("aux_loss", aux.detach(), 0.0)
            extra = extra + self.router.coef * aux
        return extra

    def _counts(self, mini_batch: MiniBatch, training: bool) -> MiniBatchCounts:
        return MiniBatchCounts(
            num_rows=len(mini_batch.rows),
            num_tokens=mini_batch.num_tokens,
            num_rollout_tokens=mini_batch.num_rollout_tokens,
            num_mini_batches=self.config.num_mini_batches if training else 1,
            max_completion_length=self.config.max_completion_length,
        )

    def _recover(
        self, model: nn.Module, mini_batch: MiniBatch, pack: Sequence[Row], synchronised: bool, message: str
    ) -> None:
        """Take back what the failed mini-batch has summed so far, and cut it into smaller packs.

        With several processes only before the gradients meet, and only where no other pass of the mini-batch is a
        collective: the others would wait for what is started again here.
        """
        meets = synchronised or self.router is not None or self.config.top_entropy_quantile < 1.0
        can_retry = not self.engine.packs_are_collective and (self.engine.is_alone or not meets)
        self.budget.lower(pack, message, can_retry)
        model.zero_grad()
        if not self.routing.follows_generation:  # routes of packs that had succeeded; those of earlier passes stay
            for row in (row for pack in mini_batch.packs for row in pack if row.old_logps is None):
                row.routes = None
        mini_batch.packs = self.forward.plan([row for pack in mini_batch.packs for row in pack]) or [[]]
