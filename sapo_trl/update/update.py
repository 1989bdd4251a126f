"""The update: a mini-batch's packs forward and backward.

One mini-batch is one optimizer step. The loss weights are fixed before the first pack, every process runs the same
number of packs, and nothing between two packs waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sapo_trl.config import SAPOConfig
from sapo_trl.metrics.dump import RatioDump
from sapo_trl.metrics.step import StepMetrics
from sapo_trl.metrics.tokens import token_metrics
from sapo_trl.moe.routing_replay import RouteRecord, Routing
from sapo_trl.objective import LossInputs, Objective, SoftGate, per_token
from sapo_trl.rollout.rows import MiniBatch, Row, gathered, set_logps
from sapo_trl.update.aggregation import MiniBatchCounts, row_weights
from sapo_trl.update.budget import PackBudget, PackTooLarge
from sapo_trl.update.engine import Engine
from sapo_trl.update.entropy import EntropyController
from sapo_trl.update.loss import (
    PackTokens,
    RouterLoss,
    WholeBatch,
    batch_share,
    entropy_bonus,
    pack_tokens,
    policy_loss,
    reference_kl,
    router_loss,
    whole_batch,
    without_kl,
)
from sapo_trl.update.packing import PackedForward, PackInputs


@dataclass
class UpdateResult:
    """The result of a mini-batch.

    Attributes:
        loss: (), without gradient.
        at_old_policy: the same at r = 1, a constant of the step, (). It is left out of the reported loss, so that an
            on-policy step reports 0 and the rest says how far the policy has moved.
        metrics: sums, not reduced yet.
        fresh: log-probs of packs whose rows had no old ones, because they were on-policy.
    """

    loss: Tensor
    at_old_policy: Tensor
    metrics: StepMetrics
    fresh: list[tuple[list[Row], Tensor]]


class _Run(NamedTuple):
    """One try at a mini-batch. `whole` is None where the only pack finds it out itself."""

    model: nn.Module
    mini_batch: MiniBatch
    backward: bool
    dump: RatioDump | None
    whole: WholeBatch | None
    result: UpdateResult


@dataclass
class Update:
    """Runs mini-batches through a model.

    Attributes:
        router: the load-balancing loss, or None where it is off.
        entropy: the entropy bonus, or None.
    """

    forward: PackedForward
    objective: Objective
    config: SAPOConfig
    engine: Engine
    budget: PackBudget
    routing: Routing
    router: RouterLoss | None = None
    entropy: EntropyController | None = None

    def run(
        self, model: nn.Module, mini_batch: MiniBatch, backward: bool, dump: RatioDump | None = None
    ) -> UpdateResult:
        """The forward passes over the packs of a mini-batch, and with `backward` the backward passes too.

        A pack that does not fit into memory starts the mini-batch again with smaller packs.

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
            self._finish(result)
        return result

    def _run_packs(
        self, model: nn.Module, mini_batch: MiniBatch, backward: bool, dump: RatioDump | None
    ) -> UpdateResult:
        if dump is not None:
            dump.clear()
        zero = torch.zeros((), device=self.forward.accelerator.device)
        result = UpdateResult(zero, zero, StepMetrics(), [])
        run = _Run(model, mini_batch, backward, dump, self._whole_batch(model, mini_batch), result)
        for i, pack in enumerate(mini_batch.packs):
            is_last = i == len(mini_batch.packs) - 1
            try:
                self._run_pack(run, pack, is_last)
            except torch.OutOfMemoryError as error:
                synchronised = not backward or self.engine.synchronises(is_last)
                raise PackTooLarge(pack, synchronised, str(error)) from None
        return result

    def _run_pack(self, run: _Run, pack: list[Row], is_last: bool) -> None:
        model, result, inputs = run.model, run.result, self.forward.build_inputs(pack)
        synchronises = is_last or not run.backward
        with self.engine.pack(model, synchronises), self.routing.context(model, pack, inputs) as record:
            loss, at_old_policy, logps = self._pack_loss(run, pack, inputs)
            if run.backward:
                self.engine.backward(loss, is_last)
        if record is not None:
            self._count_routes(record, pack, inputs, result.metrics)
        result.loss, result.at_old_policy = result.loss + loss.detach(), result.at_old_policy + at_old_policy
        if run.backward and pack and pack[0].old_logps is None:
            result.fresh.append((pack, logps))
            for row, now in zip(pack, logps.split([row.num_trained for row in pack]), strict=True):
                if row.repeated_logps is not None:
                    noise = (now - row.repeated_logps).abs().sum()
                    result.metrics.mean("log_ratio/noise_abs_mean", noise, float(row.num_trained))

    def _finish(self, result: UpdateResult) -> None:
        for pack, logps in result.fresh:  # on-policy now; a second iteration compares with it
            set_logps(pack, "old_logps", logps)

    def _count_routes(self, record: RouteRecord, pack: list[Row], inputs: PackInputs, metrics: StepMetrics) -> None:
        now, entropies, recorded = record.routes(), record.router_entropies(), gathered(pack, "routes")
        if recorded is None:  # an empty pack
            return
        if inputs.expand is not None:
            now, entropies = (x.index_select(0, inputs.expand) for x in (now, entropies))
        metrics.routes(recorded, now, entropies, self.routing.num_experts)

    def _whole_batch(self, model: nn.Module, mini_batch: MiniBatch) -> WholeBatch | None:
        """What packs must know of each other; None where there is one pack, which finds it out itself.

        The entropy threshold and the experts' loads need every pack's forward pass before the first backward pass. With
        several packs that takes one more pass without gradient.
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

    def _pack_loss(self, run: _Run, pack: list[Row], inputs: PackInputs) -> tuple[Tensor, Tensor, Tensor]:
        """(loss of the pack, its policy part at r = 1, its log-probs); the last two without gradient."""
        config, whole, metrics = self.config, run.whole, run.result.metrics
        outputs = self.forward(run.model, inputs, self.router is not None)
        if whole is None:
            shares = [batch_share(outputs, self.router)] if pack else []
            whole = whole_batch(shares, run.mini_batch, config, self.router, self.forward.accelerator)
        if not pack:  # gradients of zero, so that the optimizer steps as for any other mini-batch
            nothing = 0.0 * (outputs.logps.sum() + outputs.entropies.sum())
            return nothing, nothing.detach(), outputs.logps.detach()
        tokens = pack_tokens(outputs, pack, inputs.rows, config)
        per_token, kl = self._policy_loss(tokens, tokens.inputs, whole), reference_kl(tokens, config)
        lengths = torch.tensor([row.num_trained for row in pack])
        groups = torch.tensor([1 if row.group_tokens is None else row.group_tokens for row in pack])
        weights = row_weights(config.aggregation, lengths, self._counts(run.mini_batch, run.model.training), groups)
        weights = weights.to(per_token.device, non_blocking=True)[inputs.rows]
        loss = (weights * (per_token if kl is None else per_token + config.beta * kl)).sum()
        with torch.no_grad():
            old_logps = tokens.inputs.old_logps
            known = torch.where(old_logps.isfinite(), old_logps, tokens.inputs.policy_logps.detach())
            at_old = (weights * self._policy_loss(tokens, replace(tokens.inputs, policy_logps=known), whole)).sum()
        loss = loss + self._extra_loss(tokens, whole, metrics)
        gate = SoftGate(config.sapo_temperature_pos, config.sapo_temperature_neg)
        engine = (tokens.sampler_logps, tokens.cut)
        if kl is not None:
            metrics.mean("kl_clamped_frac", without_kl(tokens).sum(), float(len(kl)))
        token_metrics(metrics, tokens.inputs, tokens.entropies, engine, kl, self.objective, gate)
        if run.dump is not None:
            run.dump.add(tokens.inputs)
        return loss, at_old, outputs.logps.detach()

    def _policy_loss(self, tokens: PackTokens, inputs: LossInputs, whole: WholeBatch) -> Tensor:
        """`policy_loss` of the objective at `inputs`, those of the pack or the same at another policy, (T,)."""
        surrogate = per_token(self.objective.surrogate(inputs), inputs, self.objective, "surrogate")
        return policy_loss(surrogate, tokens, whole, self.config, self.objective.corrects_engine)

    def numbers_of(self, model: nn.Module, pack: list[Row]) -> dict[str, tuple[Tensor, Tensor]]:
        """What the loss of a pack is made of, in the order of computation: name -> (values, their rows)."""
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

    def _extra_loss(self, tokens: PackTokens, whole: WholeBatch, metrics: StepMetrics) -> Tensor | float:
        """Entropy bonus and load-balancing loss of a pack."""
        extra: Tensor | float = 0.0
        if self.entropy is not None:
            bonus, count = entropy_bonus(tokens, whole)
            metrics.mean("entropy_bonus", bonus.detach(), count)
            extra = extra - self.entropy.applied * bonus / max(whole.entropy_tokens, 1.0)
        if self.router is not None and whole.experts is not None:
            aux = router_loss(tokens.router_logits, whole.experts)
            metrics.mean("aux_loss", aux.detach(), 0.0)
            extra = extra + self.router.coef * aux
        return extra

    def _counts(self, mini_batch: MiniBatch, training: bool) -> MiniBatchCounts:
        assert self.config.max_completion_length is not None  # a configuration without it is refused
        num = mini_batch.num_generations or self.config.num_generations or 1
        return MiniBatchCounts(
            num_rows=mini_batch.num_rows,
            num_tokens=mini_batch.num_tokens,
            num_rollout_tokens=mini_batch.num_rollout_tokens,
            num_mini_batches=self.config.num_mini_batches if training else 1,
            max_completion_length=self.config.max_completion_length,
            num_rollout_prompts=mini_batch.num_rollout_rows / num,
        )

    def _recover(
        self, model: nn.Module, mini_batch: MiniBatch, pack: Sequence[Row], synchronised: bool, message: str
    ) -> None:
        """Drop what the failed mini-batch has summed so far, and cut it into smaller packs.

        With several processes that is possible only before the gradients are synchronised, and only where no other pass
        of the mini-batch is a collective, because the other processes would wait for what is started again here.
        """
        is_shared = synchronised or self.router is not None or self.config.top_entropy_quantile < 1.0
        can_retry = not self.engine.packs_are_collective and (self.engine.is_alone or not is_shared)
        self.budget.lower(pack, message, can_retry)
        model.zero_grad()
        if not self.routing.follows_generation:  # routes of packs that had succeeded; those of earlier passes stay
            for row in (row for pack in mini_batch.packs for row in pack if row.old_logps is None):
                row.routes = None
        mini_batch.packs = self.forward.plan([row for pack in mini_batch.packs for row in pack]) or [[]]
