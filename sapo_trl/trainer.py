"""`SAPOTrainer`: TRL's `GRPOTrainer` with another update. Everything before the update is TRL's.

Stage map, the way of the data:

stage       where (sapo_trl/)             what
config      config.py, validation.py      one flag, what follows from it, what is refused; batch_plan.py
algorithm   algorithms.py, objective.py   name -> objective, ratio level, averaging; J and weight per token
data        data/                         any dataset to `prompt`, `answer`
prompts     mixture.py, trainer_prompts.py  TRL's order; or mixtures, dynamic sampling, solved prompts that leave
rollout     rollout/, trainer_rollout.py  completions, on a CPU without the finished rows, or one rollout ahead; as rows
reward      rewards/                      reward functions, each held to the contract; grading in worker processes
advantage   TRL grpo_trainer.py 2761-2818 A = (r - mean_G r)/(std_G r + 1e-4); exactly 0 for equal rewards
passes      update/passes.py              old and reference log-probs
packs       update/packing.py, balance.py rows to packs; rows move between processes so that all have equal work
forward     update/attention.py, head.py  packs to log-probs and entropies
update      update/update.py, loss.py     one mini-batch is one optimizer step, an inner loop over packs
memory      update/memory.py, budget.py   the pack that fits, and what happens when one does not
experts     moe/                          routing replay, frozen routers, names for vLLM
metrics     metrics/                      sums on the device, reduced once per optimizer step; the table of metrics
monitor     monitor/                      files, live view, collapse guard, watchdog, signals
checkpoints checkpoints/, trainer_checkpoints.py  whole checkpoints, exact resume, strict load, parameter hash
evaluation  evaluation/, trainer_evaluation.py  named sets (eval_sets.py); Pass@1, pass@k, maj@k, intervals (stats.py)
report      report/                       figures with their numbers, the run's page
model       model.py, trl_seams.py        what every stage asks of a model; what is used of others' private code

One optimizer step: rows whose advantage is exactly 0 leave the model passes when nothing else needs them and stay in
every denominator; old log-probs are computed only for the mini-batches after the first, whose current log-probs are
its old ones; passes that don't depend on the rewards run while those are computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from inspect import signature

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer

from sapo_trl import faults, validation
from sapo_trl.batch_plan import batch_plan
from sapo_trl.checkpoints.disk import OutputFolder, require_output
from sapo_trl.config import SAPOConfig
from sapo_trl.data.preflight import check_before_loading
from sapo_trl.metrics.collect import step_values
from sapo_trl.metrics.dump import RatioDump
from sapo_trl.metrics.tokens import tracker_histograms
from sapo_trl.model import inner_model, text_config
from sapo_trl.moe.experts import prepare_experts
from sapo_trl.monitor import attach
from sapo_trl.monitor.announcement import announcement
from sapo_trl.monitor.guard import CollapseGuard
from sapo_trl.monitor.preemption import Preemption
from sapo_trl.monitor.silence import EqualRewards
from sapo_trl.monitor.watchdog import Watchdog
from sapo_trl.objective import CustomObjective, LossInputs, Objective
from sapo_trl.processes import check_processes
from sapo_trl.rewards.contract import checked, unique_names
from sapo_trl.rollout.generation import plain_generation_reason
from sapo_trl.rollout.outside import check_sampling, checked_rollout, short_row
from sapo_trl.rollout.rollout import Rollout
from sapo_trl.rollout.rows import MiniBatch, Row, reward_interval
from sapo_trl.rollout.server import server_client
from sapo_trl.rollout.vllm import engine_arguments, prepare_engine
from sapo_trl.setup_checks import (
    check_adapter_names,
    check_eval_sets,
    check_evaluation_batch,
    check_given_optimizer,
    check_lengths,
    check_policy,
    choose_best_metric,
    name_or_model,
    prepare_pictures,
    refuse_bypassed_seams,
    refuse_late_changes,
    same_reference,
    values_read_once,
    without_dropout,
)
from sapo_trl.trainer_checkpoints import CheckpointTrainer
from sapo_trl.trainer_evaluation import ACCURACY
from sapo_trl.trainer_prompts import EndWithoutPrompts
from sapo_trl.trl_seams import check_installed, engine_made_with, loaded_from
from sapo_trl.update.finite import (
    BeforeOptimizerStep,
    FiniteGuard,
    check_replicas,
    replica_checksum,
)
from sapo_trl.update.loss import RouterLoss
from sapo_trl.update.parts import assemble
from sapo_trl.update.update import UpdateResult

check_installed()


class SAPOTrainer(CheckpointTrainer):
    """Trains a policy with SAPO, or with any other row of `sapo_trl.algorithms.ALGORITHMS`.

    The arguments are those of `GRPOTrainer`, with a `SAPOConfig` as `args`, and one more.

    Args:
        objective: what is maximised in place of the algorithm's surrogate: an `Objective` (a class is filled from
            `args`), or a function `f(tokens: LossInputs, config: SAPOConfig) -> (T,)`. Averaging, KL and masks stay the
            algorithm's. A subclass may override `token_objective` instead.

    Raises:
        TypeError: `args` is not a `SAPOConfig`; model, tokenizer or training set is none.
        ValueError: fewer prompts than one rollout needs, a model path that does not exist, an inert gate with
            `require_off_policy`. All before the model loads.
    """

    _tag_names = ["trl", "sapo-trl"]  # noqa: RUF012, TRL's own form

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs=None,
        args: SAPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        *trl_positional,
        objective: Objective | type[Objective] | Callable[[LossInputs, SAPOConfig], Tensor] | None = None,
        **trl_arguments,
    ):
        refuse_bypassed_seams(type(self), SAPOTrainer)
        behind = [*signature(GRPOTrainer.__init__).parameters][6:]  # self, and those that are named here
        trl_arguments |= dict(zip(behind, trl_positional))
        model = name_or_model(model)
        name = (model if isinstance(model, str) else loaded_from(model.config)).rstrip("/").split("/")[-1]
        args = SAPOConfig(f"{name}-SAPO") if args is None else args
        if not isinstance(args, SAPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; SAPOTrainer needs a SAPOConfig.")
        validation.check(args.given, args.row)  # again: a field may have been set since it was made
        self.plan = batch_plan(args)
        data = train_dataset, eval_dataset
        self.carries_images = check_before_loading(model, reward_funcs, args, self.plan, data, trl_arguments)
        faults.wanted()
        require_output(args, model, saves_adapter=trl_arguments.get("peft_config") is not None)
        check_processes(args, train_dataset)
        self._tag_names = [*type(self)._tag_names, args.algorithm]
        self._given_objective = args.build_objective(objective)
        self._rollout: Rollout | None = None  # the one that is trained on
        self._is_filling = False  # TRL's hooks fill `_filling` now
        self._rollout_is_new = self._engine_is_checked = False
        self._equal_rewards = EqualRewards()
        self.has_trained = False  # a resumed run may have had nothing left to do
        if trl_arguments.get("rollout_func") is not None:
            trl_arguments["rollout_func"] = checked_rollout(trl_arguments["rollout_func"])
        with engine_made_with(lambda: engine_arguments(self.args, self.accelerator, self.model), server_client(args)):
            super().__init__(model, reward_funcs, args.for_trl(), *data, **trl_arguments)
        brings_prompts = self.rollout_func is not None or self.environment_factories is not None
        evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {"evaluation": eval_dataset}
        check_policy(self.model, self._tokenizer, {} if brings_prompts else {"": train_dataset, **evaluated}, args)
        check_adapter_names(self.model)
        check_given_optimizer(self.optimizer, self.model)
        if any(isinstance(func, nn.Module) for func in self.reward_funcs):
            self.reward_funcs = [f if isinstance(f, nn.Module) else checked(f) for f in self.reward_funcs]
        self.reward_func_names = unique_names(self.reward_func_names)
        self._built_with = values_read_once(self, self.args)
        choose_best_metric(self.args, self.reward_func_names, self.eval_dataset, ACCURACY)
        if self.eval_dataset is not None:
            check_evaluation_batch(self.args, self.num_generations_eval)
            check_eval_sets(self.args, self.eval_dataset, self.rollout_func is not None)
        self.args.disable_dropout = args.disable_dropout
        notes = prepare_pictures(self, self.carries_images)
        notes += without_dropout(self.model, self.ref_model, args.disable_dropout)
        notes += same_reference(self.model, self.ref_model)
        notes += prepare_engine(self.vllm_generation, self.args) if self.use_vllm else []
        self._prepare_update(args.checkpointing_is_auto)
        self._watch(args)
        facts = self.plan, self._update, self.model, self._generation, [*self._experts, *notes]
        self.accelerator.print(announcement(args.algorithm.upper(), args, *facts), flush=True)

    def token_objective(self, tokens: LossInputs) -> Tensor:
        """J per trained token, (T,), to be maximised. The one method to override for another objective.

        Called at the current policy, at the old policy for the reported loss, and once more for its derivative.
        """
        return self._given_objective.surrogate(tokens)

    # ---- set-up ------------------------------------------------------------------------------------------------------

    def _watch(self, args: SAPOConfig) -> None:
        """What looks at a run from outside: watchdog, signals, output folder, finite numbers, guard, files."""
        stops = args.on_hang == "stop"
        self._watchdog = Watchdog(args.seconds_of_phases, stops, args.folder, self.accelerator.process_index)
        self._preemption, self._output = Preemption(), OutputFolder()
        self._before_step = BeforeOptimizerStep(self._agree)
        for callback in (self._preemption, self._output, self._before_step):
            self.add_callback(callback)
        if args.drop_solved_above is not None:
            self.add_callback(EndWithoutPrompts(self))
        if args.on_collapse != "none":
            self.add_callback(CollapseGuard())
        attach(self, report=args.write_report)

    def _prepare_update(self, auto_checkpointing: bool) -> None:
        args, text = self.args, text_config(self.model)
        router = None
        if self.aux_loss_enabled:
            router = RouterLoss(text.num_experts, text.num_experts_per_tok, self.router_aux_loss_coef)
        is_overridden = type(self).token_objective is not SAPOTrainer.token_objective
        parts = assemble(
            self.model,
            self.ref_model,
            self.accelerator,
            args,
            CustomObjective(self.token_objective) if is_overridden else self._given_objective,
            router,
            pad_token_id=self._tokenizer.pad_token_id,
            follows_generation=not self.tools and self.rollout_func is None,
            auto_checkpointing=auto_checkpointing,
            has_images=self.carries_images,
        )
        self._forward, self._routing, self._update, self._plan = parts.forward, parts.routing, parts.update, parts.plan
        self._finite = FiniteGuard(self._update, self.accelerator, args.max_skipped_steps)
        records_routes, reason = self._routing.follows_generation, "rollout_func" if self.rollout_func else None
        reason = reason or plain_generation_reason(self.model, args, self.accelerator, records_routes=records_routes)
        self._drops_finished_rows = reason is None
        self._generation = (reason or "finished rows leave the batch") + self._prepare_ahead(reason)
        vllm = self.vllm_generation if self.use_vllm else None
        self._experts = prepare_experts(self.model, args.freeze_router, self.accelerator, vllm)

    # ---- the mini-batches of a rollout -------------------------------------------------------------------------------

    def _roll_out(self, generation_batch) -> Rollout:
        """Generate, score and plan one rollout."""
        rollout, rows, num_tokens = self._next_rollout(generation_batch)
        num_tokens = self._count_prompts(rows, num_tokens, self.num_generations)
        check_lengths(rows, self.model)
        equal_fracs = self._metrics["train"].get("frac_reward_zero_std")  # not there where a subclass brings its rows
        if self.accelerator.is_main_process and equal_fracs:
            self._equal_rewards.note(equal_fracs[-1], num_tokens, rollout, self.reward_func_names)
        self._use_engine_logps(rows)
        low, high = reward_interval(rollout.total_rewards(self.reward_weights), self.num_generations)
        self._log_all({"reward_low": low, "reward_high": high})
        self._log_all(self._plan.after_rewards(rollout, rows, num_tokens, self.model_wrapped, self._timed))
        has_engine = self.use_vllm or self.rollout_func is not None or self._ahead is not None
        is_fresh = self._ahead is None or rollout.weights_step == self.state.global_step  # others are older
        if has_engine and is_fresh and self._check_is_due:
            self._check_engine(rollout)
        return rollout

    def _check_at_start(self, ids: Tensor) -> None:
        """Measured once, before the first rollout: log-probs are the model's own, and tokens are drawn from them."""
        self._plan.check(self.model_wrapped, ids)
        is_plain = not (self.use_vllm or self.rollout_func or self.use_transformers_continuous_batching)
        if is_plain and not (self.is_deepspeed_enabled or self.is_fsdp_enabled or self._is_vlm):
            check_sampling(inner_model(self.model, self.accelerator), self.generation_config, ids, self.temperature)

    def _use_engine_logps(self, rows: list[Row]) -> None:
        """Under `old_logprobs: sampler` the rollout engine's log-probs are the old ones."""
        if self.args.old_logprobs != "sampler":
            return
        if any(row.sampler_logps is None for row in rows):
            raise ValueError(
                "old_logprobs='sampler', but the rollout gave no log-probs (rollout_func returned logprobs: None). "
                "Return one per completion token, or set old_logprobs: trainer."
            )
        for row in rows:
            row.old_logps = row.sampler_logps

    def _prepare_inputs(self, generation_batch) -> MiniBatch:  # ty: ignore[incompatible-method-override] (TRL's own)
        """The mini-batch of this optimizer step; at the first one of a rollout, generate and plan all of them."""
        refuse_late_changes(values_read_once(self, self.args), self._built_with)
        if not self._plan.is_checked:
            self._check_at_start(short_row(self._tokenizer, generation_batch[0]["prompt"]))
        if not self.model.training:
            rows, num_tokens = self._generated_rows(Rollout(), generation_batch)
            num = self.num_generations_eval
            return self._plan.evaluation(rows, self._count_prompts(rows, num_tokens, num), num)
        accumulation, num = self.args.gradient_accumulation_steps, self.args.num_mini_batches
        step = self._step // accumulation
        position = step % (num * self.num_iterations)
        if position == 0:
            self._rollout = self._roll_out(generation_batch)
        assert self._rollout is not None  # a run resumed in the middle of one has brought it along
        mini_batch = self._rollout.mini_batches[step % num]
        mini_batch.index = position if self._ahead is None else step - self._rollout.weights_step
        return mini_batch

    # ---- update ------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs, num_items_in_batch=None) -> Tensor:
        """One mini-batch: forward and backward over its packs. Returns the loss, detached.

        With gradient accumulation the calls before the last one only count: the mini-batch runs as a whole, so that
        no denominator depends on how it was split into device batches.
        """
        started = time.perf_counter()
        loss = torch.zeros((), device=self.accelerator.device)
        is_step = (self._step + 1) % self.args.gradient_accumulation_steps == 0
        if is_step:
            model.train()
            start = getattr(self.optimizer, "train", None)  # of schedule-free optimizers
            if callable(start):
                start()
            mini_batch, began = self._prepare_inputs(inputs), time.perf_counter()
            with self._watchdog.phase("update", self.state.global_step + 1), self._forward.packed(model):
                result = self._update_of(model, mini_batch, backward=True)
            self._unagreed = model, mini_batch, result, began
            loss = result.loss - result.at_old_policy
        self._step += 1
        self._step_ended = time.perf_counter()
        self._current_train_step_time += self._step_ended - started
        return loss

    def _agree(self) -> None:
        """Right before the optimizer step: the processes agree on whether it happens, and on the metrics, in one
        reduction. Whatever happened to the gradients since the backward pass is seen here."""
        model, mini_batch, result, began = self._unagreed
        with self._watchdog.phase("update", self.state.global_step + 1):
            values = self._conclude(model, mini_batch, result, is_update=True)
        now = time.perf_counter()
        times = {"time/update_s": now - began, "step_time": self._current_train_step_time + now - self._step_ended}
        self._log_all(values | times)
        self._current_train_step_time = 0.0

    def compute_loss(  # ty: ignore[incompatible-method-override] (a mini-batch in place of a dictionary)
        self, model, inputs: MiniBatch, return_outputs=False, num_items_in_batch=None
    ) -> Tensor:
        """The loss of a mini-batch without a backward pass (evaluation), as it is reported."""
        result, values = self.run_mini_batch(model, inputs, backward=False)
        self._log_all(values)
        return result.loss - result.at_old_policy

    def run_mini_batch(
        self, model: nn.Module, mini_batch: MiniBatch, backward: bool
    ) -> tuple[UpdateResult, dict[str, float]]:
        """(what the update gave, name -> metric over all processes) of one mini-batch.

        After a backward pass the entropy controller moves, and numbers that are not finite on any process make the
        optimizer step do nothing.
        """
        result = self._update_of(model, mini_batch, backward)
        return result, self._conclude(model, mini_batch, result, is_update=backward)

    def _update_of(self, model: nn.Module, mini_batch: MiniBatch, backward: bool) -> UpdateResult:
        every, step = self.args.dump_ratios_every, self.state.global_step + 1
        dump = RatioDump() if backward and every and step % every == 0 and mini_batch.index > 0 else None
        if backward:
            active = [row for pack in mini_batch.packs for row in pack]
            for place in ("update", *faults.OF_A_ROW):
                faults.inject(place, step, rows=active)
        result = self._update.run(model, mini_batch, backward, dump)
        if dump is not None:
            dump.save(str(self.args.folder), step, mini_batch.index, self.accelerator.process_index)
        return result

    def _conclude(
        self, model: nn.Module, mini_batch: MiniBatch, result: UpdateResult, is_update: bool
    ) -> dict[str, float]:
        """Reduce a mini-batch's metrics, and before an optimizer step what the processes tell each other."""
        if is_update:
            if not self._update.engine.is_deepspeed:  # whose gradients lie in buffers of its own
                faults.inject("gradient", self.state.global_step + 1, model=model)
            result.metrics.flags["nonfinite"] = self._finite.found(model, result.loss)
            result.metrics.flags["stop"] = float(self._preemption.is_requested)
            result.metrics.flags["folder"] = float(self._output.is_lost)
            result.metrics.flags["replica"] = replica_checksum(model, self.accelerator)
        routers = self._routing.shape if is_update else (0, 0)
        values, flags, self._distributions = step_values(
            result.metrics, mini_batch, self.accelerator, self._update.budget.oom_retries, routers, is_update
        )
        if is_update:
            self._act_on(flags, values, model, mini_batch)
        return values

    def _act_on(self, flags: dict[str, list[float]], values: dict[str, float], model: nn.Module, mini_batch) -> None:
        """What the processes agreed on before the optimizer step; adds to `values`."""
        step = self.state.global_step + 1
        check_replicas(flags["replica"], step)
        is_skipped = any(flags["nonfinite"])
        if is_skipped:
            self._finite.skip(model, mini_batch, step)
        else:
            self._finite.passed()
        self._preemption.is_agreed = any(flags["stop"]) or bool(self._finite.failure)
        self._output.is_agreed = any(flags["folder"])
        values["update/skipped_steps"] = self._finite.total
        if self._ahead is not None:
            values["sampling/weights_age"] = mini_batch.index
        entropy = self._update.entropy
        if entropy is not None:
            values["entropy_coef"] = entropy.coef
            if "entropy_bonus" in values and not is_skipped:
                entropy.move(values["entropy_bonus"])

    def histograms(self) -> dict:
        """Of the last step: name -> (counts (b,), edges (b + 1,)), for trackers."""
        return tracker_histograms(self._distributions)
