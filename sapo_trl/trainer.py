"""`SAPOTrainer`: TRL's `GRPOTrainer` with another update. Everything before the update is TRL's.

Stage map, the way of the data:

stage       where (sapo_trl/)             what
config      config.py, validation.py      one flag, what follows from it, what is refused; the batch plan
algorithm   algorithms.py, objective.py   name -> objective, ratio level, averaging; J and weight per token
data        data/                         any dataset to `prompt`, `answer`
rollout     rollout/; TRL `_generate`     completions, on a CPU without the finished rows; held as rows without padding
reward      rewards/                      reward functions, each held to the contract; grading in worker processes
advantage   TRL grpo_trainer.py 2761-2818 A = (r - mean_G r)/(std_G r + 1e-4); exactly 0 for equal rewards
passes      update/passes.py              old and reference log-probs
packs       update/packing.py, balance.py rows to packs; rows move between processes so that all have equal work
forward     update/attention.py, head.py  packs to log-probs and entropies
update      update/update.py, loss.py     one mini-batch is one optimizer step, an inner loop over packs
memory      update/memory.py, budget.py   the pack that fits, and what happens when one does not
experts     moe/                          routing replay, frozen routers, names for vLLM
metrics     metrics/                      sums on the device, reduced once per optimizer step; the table of metrics
monitor     monitor/                      files, live view, collapse guard
checkpoints checkpoints.py                strict load through the converting loader, parameter hash
evaluation  evaluation/, stats.py         Pass@1 and pass@k with intervals
report      report/                       figures with their numbers, the run's page
model       model.py, trl_seams.py        what every stage asks of a model; what is used of others' private code

One optimizer step: rows whose advantage is exactly 0 leave the model passes when nothing else needs them and stay in
every denominator; old log-probs are computed only for the mini-batches after the first, whose current log-probs are
its old ones; passes that don't depend on the rewards run while those are computed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from sapo_trl import faults
from sapo_trl.checkpoints import weights
from sapo_trl.checkpoints.capture import capture, moving_reference, restore
from sapo_trl.checkpoints.disk import OutputFolder, explained, require_output
from sapo_trl.checkpoints.resume import agreed_checkpoint, finished_step, identity, stream_place
from sapo_trl.checkpoints.saving import write_checkpoint
from sapo_trl.config import SAPOConfig, batch_plan
from sapo_trl.data.preflight import check_before_loading
from sapo_trl.evaluation.sampling import render
from sapo_trl.metrics.collect import step_values
from sapo_trl.metrics.dump import RatioDump
from sapo_trl.metrics.tokens import tracker_histograms
from sapo_trl.model import text_config
from sapo_trl.moe.experts import prepare_experts
from sapo_trl.moe.routing_replay import recording_generation
from sapo_trl.monitor import attach
from sapo_trl.monitor.announcement import announcement
from sapo_trl.monitor.guard import CollapseGuard
from sapo_trl.monitor.preemption import Preemption
from sapo_trl.monitor.progress import print_completions
from sapo_trl.monitor.watchdog import Watchdog
from sapo_trl.objective import CustomObjective, LossInputs, Objective
from sapo_trl.rewards import accuracy_reward
from sapo_trl.rewards.contract import checked, reward_arguments, reward_name, start_rewards, unique_names
from sapo_trl.rollout.generation import plain_generation_reason, unfinished_only
from sapo_trl.rollout.rollout import Rollout
from sapo_trl.rollout.rows import MiniBatch, Row, reward_interval, rows_from_padded
from sapo_trl.rollout.sampler import EpochSampler
from sapo_trl.stats import mean_with_interval
from sapo_trl.trl_seams import check_installed, loaded_from, texts_stay_local
from sapo_trl.update.finite import (
    BeforeOptimizerStep,
    FiniteGuard,
    NonFiniteError,
    check_replicas,
    nonfinite_parameters,
    replica_checksum,
)
from sapo_trl.update.loss import RouterLoss
from sapo_trl.update.parts import assemble
from sapo_trl.update.update import UpdateResult
from sapo_trl.validation import PHASE_LIMITS

check_installed()

# Under this name `accuracy_reward` is logged: its mean over an evaluation set is Pass@1
ACCURACY = reward_name(accuracy_reward)


class SAPOTrainer(GRPOTrainer):
    """Trains a policy with SAPO, or with any other row of `sapo_trl.algorithms.ALGORITHMS`.

    Args:
        model, reward_funcs, args, train_dataset and all of TRL's other arguments: as for `GRPOTrainer`; `args` is a
            `SAPOConfig`.
        objective: what is maximised in place of the algorithm's surrogate: an `Objective` (a class is filled from
            `args`), or a function `f(tokens: LossInputs, config: SAPOConfig) -> (T,)`. Averaging, KL and masks stay the
            algorithm's. A subclass may override `token_objective` instead.

    Raises:
        TypeError: `args` is not a `SAPOConfig`.
        ValueError: fewer prompts than one rollout needs, a model path that does not exist, an inert gate with
            `require_off_policy`. All before the model loads.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "sapo-trl"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs=None,
        args: SAPOConfig | None = None,
        train_dataset=None,
        *trl_positional,
        objective: Objective | type[Objective] | Callable[[LossInputs, SAPOConfig], Tensor] | None = None,
        **trl_arguments,
    ):
        name = (model if isinstance(model, str) else loaded_from(model.config)).rstrip("/").split("/")[-1]
        args = SAPOConfig(f"{name}-SAPO") if args is None else args
        if not isinstance(args, SAPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; SAPOTrainer needs a SAPOConfig.")
        self.plan = batch_plan(args)
        self.carries_images = check_before_loading(
            model, args, self.plan, train_dataset, has_rollout_func=trl_arguments.get("rollout_func") is not None
        )
        faults.wanted()
        require_output(args, model, saves_adapter=trl_arguments.get("peft_config") is not None)
        self._name = args.algorithm.upper()
        self._paper = {"title": args.row.title, "id": args.row.paper}
        self._tag_names = [*type(self)._tag_names, args.algorithm]
        self._given_objective = args.build_objective(objective)
        self._rollout: Rollout | None = None  # the one that is trained on
        self._filling: Rollout | None = None  # the one that TRL's hooks fill now
        self._rollout_is_new = False
        self.has_trained = False  # a resumed run may have had nothing left to do
        super().__init__(model, reward_funcs, args.for_trl(), train_dataset, *trl_positional, **trl_arguments)
        if self.carries_images and not self._is_vlm:
            raise ValueError(f"the training set has images, but {type(self.model).__name__} got a tokenizer only.")
        if any(isinstance(func, nn.Module) for func in self.reward_funcs):
            self.reward_funcs = [f if isinstance(f, nn.Module) else checked(f) for f in self.reward_funcs]
        self.reward_func_names = unique_names(self.reward_func_names)
        self._prepare_update(args.checkpointing_is_auto)
        self._preemption, self._output = Preemption(), OutputFolder()
        self._before_step = BeforeOptimizerStep(self._agree)
        for callback in (self._preemption, self._output, self._before_step):
            self.add_callback(callback)
        self._watchdog = Watchdog(
            PHASE_LIMITS | (args.phase_limits or {}),
            args.on_hang == "stop",
            Path(self.args.output_dir),
            self.accelerator.process_index,
        )
        if args.on_collapse != "none":
            self.add_callback(CollapseGuard())
        attach(self, report=args.write_report)
        facts = self._name, args, self.plan, self._update, self.model, self._generation, self._experts
        self.accelerator.print(announcement(*facts), flush=True)

    def token_objective(self, tokens: LossInputs) -> Tensor:
        """J per trained token, (T,), to be maximised. The one method to override for another objective.

        Called at the current policy, at the old policy for the reported loss, and once more for its derivative.
        """
        return self._given_objective.surrogate(tokens)

    # ---- set-up ------------------------------------------------------------------------------------------------------

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
        by_user = None if self.rollout_func is None else "rollout_func"
        reason = by_user or plain_generation_reason(self.model, args, self.accelerator, self._routing)
        self._drops_finished_rows = reason is None
        self._generation = reason or "finished rows leave the batch"
        vllm = self.vllm_generation if self.use_vllm else None
        self._experts = prepare_experts(self.model, args.freeze_router, self.accelerator, vllm)

    # ---- the run -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """transformers' `train`; every call starts with a rollout of its own.

        Args:
            resume_from_checkpoint: a folder, or True, `true` or `latest` for the newest valid checkpoint of
                `output_dir`; default: the field of the same name.

        Raises:
            ValueError: a damaged checkpoint, or one of a run with other settings. Before anything is changed.
        """
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        run_folder = Path(self.args.output_dir)
        folder, notes = agreed_checkpoint(wanted, run_folder, self._identity, self.accelerator)
        self.accelerator.print(*notes, sep="\n", flush=True) if notes else None
        if folder is not None and (step := finished_step(folder, self._planned_steps())) is not None:
            self.accelerator.print(
                f"resume: {folder} is at step {step}, the last one: nothing is left to do; it holds the model"
            )
            self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
            return TrainOutput(step, 0.0, {})
        self._rollout, self._step, self.has_trained = None, 0, True
        self._finite.reset()
        callbacks = self.callback_handler.callbacks  # whoever was added since sees the gradients before
        callbacks.append(callbacks.pop(callbacks.index(self._before_step)))
        with self._preemption.installed(), explained(run_folder, "The checkpoints there are whole."):
            output = super().train(str(folder) if folder else None, *args, **kwargs)
        if self._finite.failure:
            raise NonFiniteError(self._finite.failure)
        check_replicas(self.accelerator.gather(self._checksum()).tolist(), self.state.global_step + 1)
        return output

    def _finalize_training(self, trial, num_train_samples, start_time) -> TrainOutput:
        """transformers' own, which with `save_total_limit: 1` would delete the last checkpoint beside the best one."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    def _planned_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _checksum(self) -> Tensor:
        """`replica_checksum` of the policy, (1,)."""
        checksum = replica_checksum(self.model, self.accelerator)
        return torch.as_tensor(checksum, device=self.accelerator.device).view(1)

    @property
    def preempted_at(self) -> int | None:
        """The step after which a signal ended the last `train`, or None."""
        return self._preemption.stopped_at

    # ---- rollout -----------------------------------------------------------------------------------------------------

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @contextmanager
    def _fills(self, rollout: Rollout) -> Iterator[None]:
        """TRL's rollout into `rollout`, without TRL's own old- and reference-log-prob passes: the update does them, on
        the rows that need them.

        Nor are texts gathered from all processes unless they are logged.
        """
        beta, correction = self.beta, self.vllm_importance_sampling_correction
        self.beta, self.vllm_importance_sampling_correction, self._filling = 0.0, False, rollout
        try:
            with nullcontext() if self.log_completions else texts_stay_local(rollout.texts):
                yield
        finally:
            self.beta, self.vllm_importance_sampling_correction, self._filling = beta, correction, None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self._filling is not None:
            return None, None, None
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _generate(self, prompts: list):
        output = super()._generate(prompts)
        self._filling.generated = output[:3]
        return output

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        """TRL's generation; under R3 the experts chosen while generating are kept for the update."""
        if not self._routing.follows_generation or not self.model.training:
            with unfinished_only(self.model) if self._drops_finished_rows else nullcontext():
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with recording_generation(self.model) as record:
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self._filling.routes = record.rows([len(ids) for ids in prompt_ids], [len(ids) for ids in completion_ids])
        return completion_ids, logprobs

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> Tensor:
        """Reward functions side by side, each held to the contract; (B over all processes, functions), NaN for None."""
        self._filling.texts[:] = [prompts, completions]
        if any(isinstance(func, nn.Module) for func in self.reward_funcs):  # reward models: TRL's way, one by one
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        else:
            kwargs = reward_arguments(inputs, prompts, completions, completion_ids_list) | {
                "trainer_state": self.state, "log_extra": self._log_completion_extra, "log_metric": self._log_metric,
            }  # fmt: skip
            if self.environments is not None:
                kwargs["environments"] = self.environments
            loop = self.async_loop if self._has_async_funcs else None
            with self._timed("reward"):
                pending = start_rewards(self.reward_funcs, self.reward_func_names, kwargs, loop)
                with pending.threads:
                    if self.model.training:
                        self._plan.before_rewards(self._filling, self.model_wrapped)
                    values = pending.result()
            local = torch.tensor([[torch.nan if v is None else v for v in column] for column in values])
            rewards = self.accelerator.gather(local.T.contiguous().to(self.accelerator.device))
        self._filling.rewards = rewards
        unscorable = rewards.isnan().all(dim=1)
        self._log_all({"rewards/unscorable_frac": unscorable.float().mean().item()})
        if unscorable.all():
            warnings.warn(
                f"step {self.state.global_step + 1}: every reward of the {self._mode} batch is None, so nothing is "
                f"learned from it ({', '.join(self.reward_func_names)}).",
                stacklevel=2,
            )
        if self._mode == "eval" and ACCURACY in self.reward_func_names:
            column = rewards[:, self.reward_func_names.index(ACCURACY)].view(-1, self.num_generations_eval)
            self._eval_accuracy.append(column.nanmean(dim=1).cpu())
        return rewards

    def evaluation_loop(self, *args, **kwargs):
        """TRL's, with Pass@1 over problems and its 95 % interval where `accuracy_reward` is among the rewards."""
        self._eval_accuracy: list[Tensor] = []
        with self._watchdog.phase("evaluation", self.state.global_step):
            output = super().evaluation_loop(*args, **kwargs)
        scored = [accuracy for batch in self._eval_accuracy for accuracy in batch.tolist() if accuracy == accuracy]
        if scored:
            interval = mean_with_interval(scored)
            name = f"{kwargs.get('metric_key_prefix', 'eval')}_pass_at_1"
            output.metrics.update({name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high})
        return output

    def _generated_rows(self, rollout: Rollout, generation_batch) -> tuple[list[Row], float]:
        """(rows of this process, trained tokens of the rollout as mean over processes)."""
        with self._fills(rollout), self._timed("rollout"):
            output = self._generate_and_score_completions(generation_batch)
        if self.multi_objective_aggregation == "sum_then_normalize":
            num_generations = self.num_generations if self.model.training else self.num_generations_eval
            process, num_local = self.accelerator.process_index, len(output["advantages"])
            equal = rollout.equal_rewards(self.reward_weights, num_generations, process, num_local)
            output["advantages"] = output["advantages"].masked_fill(equal, 0.0)
        self._rollout_is_new = True
        rows = rows_from_padded(output)
        if not self.carries_images and any(row.images is not None for row in rows):
            raise ValueError("prompts hold images inside their messages; put them into a column `images`.")
        rollout.give_recorded(rows)
        return rows, float(output["num_items_in_batch"]) / self.accelerator.num_processes

    def _roll_out(self, generation_batch, first: int) -> Rollout:
        """Generate, score and plan one rollout; mini-batch `first` is trained first."""
        rollout = Rollout(order=self._shuffled(len(generation_batch)), first=first)
        rows, num_tokens = self._generated_rows(rollout, generation_batch)
        self._use_engine_logps(rows)
        low, high = reward_interval(rollout.total_rewards(self.reward_weights), self.num_generations)
        self._log_all({"reward_low": low, "reward_high": high})
        self._log_all(self._plan.after_rewards(rollout, rows, num_tokens, self.model_wrapped, self._timed))
        return rollout

    def _short_row(self, prompt) -> Tensor:
        """Tokens of a prompt, at least 16 of them, (T,)."""
        is_text = isinstance(prompt, str) or all(isinstance(message.get("content"), str) for message in prompt)
        text = render(self._tokenizer, prompt) if is_text else "a picture"
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"] or [0]
        return torch.tensor(ids * (1 + 16 // len(ids)))

    def _shuffled(self, num_rows: int) -> list[int]:
        return torch.randperm(num_rows).tolist()

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

    def _prepare_inputs(self, generation_batch) -> MiniBatch:
        """The mini-batch of this optimizer step; at the first one of a rollout, generate and plan all of them."""
        self._plan.check(self.model_wrapped, self._short_row(generation_batch[0]["prompt"]))
        if not self.model.training:
            return self._plan.evaluation(*self._generated_rows(Rollout(), generation_batch))
        accumulation, num = self.args.gradient_accumulation_steps, self.args.num_mini_batches
        if self._rollout is None:  # a resumed run goes on in the middle of a rollout
            self._step = (self.state.global_step + 1) * accumulation - 1
        step = self._step // accumulation
        position = step % (num * self.num_iterations)
        if position == 0 or self._rollout is None:
            self._rollout = self._roll_out(generation_batch, first=step % num)
        mini_batch = self._rollout.mini_batches[step % num]
        mini_batch.index = position
        return mini_batch

    def _log_all(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._metrics[self._mode][name].append(value)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Seconds of a phase on the host's clock, as `time/<phase>_s`."""
        started = time.perf_counter()
        with self._watchdog.phase(phase, self.state.global_step + 1):
            faults.inject(phase, self.state.global_step + 1)
            yield
        self._log_all({f"time/{phase}_s": time.perf_counter() - started})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, but the table of completions shows a rollout once and not once per mini-batch, and shows control
        characters of completions instead of sending them to the terminal."""
        wanted, num = self.log_completions, self.num_completions_to_print
        self.log_completions, self.num_completions_to_print = wanted and self._rollout_is_new, 0
        try:
            super().log(logs, start_time)
            if "loss" in logs:  # transformers resets the sum by subtracting it from itself, which would keep a NaN
                self._tr_loss.zero_()
            if self.log_completions and num != 0 and self.accelerator.is_main_process:
                print_completions(self._logs, self.state.global_step, num)
        finally:
            self.log_completions, self.num_completions_to_print, self._rollout_is_new = wanted, num, False

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
            if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
                self.optimizer.train()
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

    def compute_loss(self, model, inputs: MiniBatch, return_outputs=False, num_items_in_batch=None) -> Tensor:
        """The loss of a mini-batch without a backward pass (evaluation): 0 but for KL, entropy bonus and router loss."""
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
            dump.save(self.args.output_dir, step, mini_batch.index, self.accelerator.process_index)
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
        entropy = self._update.entropy
        if entropy is not None:
            values["entropy_coef"] = entropy.coef
            if "entropy_bonus" in values and not is_skipped:
                entropy.move(values["entropy_bonus"])

    def histograms(self) -> dict:
        """Of the last step: name -> (counts (b,), edges (b + 1,)), for trackers."""
        return tracker_histograms(self._distributions)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def _engine_loads(self) -> bool:
        """ZeRO and FSDP keep the weights in files of their own and load them strictly; PEFT loads adapters."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled or isinstance(self.model, PeftModel)

    @cached_property
    def _identity(self) -> dict:
        """What decides whether a resumed run is the same run."""
        return identity(self.args, self.train_dataset)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """TRL's model card, then a checkpoint that is either whole or not there."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_folder = Path(self._get_output_dir(trial=trial))
        self.create_model_card(model_name=run_folder.name)
        with self._watchdog.phase("save", self.state.global_step):
            # a run that a signal ends must be able to go on
            model_only = self.args.save_only_model and self.preempted_at is None
            facts, reference = {"identity": self._identity}, moving_reference(self)
            write_checkpoint(self, run_folder, capture(self), facts, model_only, reference)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' `save_model`, which refuses weights that are not finite.

        Raises:
            NonFiniteError: names the parameters; nothing is written.
        """
        if names := nonfinite_parameters(self.model):
            raise NonFiniteError(
                f"the weights of {', '.join(names[:3])} ({len(names)} in all) are not finite, so they are not saved to "
                f"{output_dir or self.args.output_dir}. The last checkpoint is whole: resume from it."
            )
        folder = Path(output_dir or self.args.output_dir)
        super().save_model(str(folder), _internal_call=True)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody reads, with the Hub's token
        if _internal_call:  # on every process: a checkpoint
            weights.save_hash(self.model, folder, self.accelerator)
        elif self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """transformers' own leaves a Mixture-of-Experts model with the experts of the base weights."""
        if self._engine_loads:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            weights.load_weights(self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The first call after whoever loaded the weights of a resumed run: they are compared with those saved."""
        if checkpoint is not None:
            self.accelerator.print(weights.compare_hash(self.model, checkpoint, self.accelerator))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self._engine_loads:
            super()._load_best_model()
        else:
            weights.load_weights(self.model, best)
        self.accelerator.print(f"best model: {weights.compare_hash(self.model, best, self.accelerator)}")

    def _get_train_sampler(self, dataset=None) -> EpochSampler:
        """TRL's order of prompts, also after a resume in a later epoch."""
        return EpochSampler(
            epoch=lambda: int(self.state.epoch or 0),
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _init_training_state(self, max_steps, steps_per_epoch, num_epochs, resume_from_checkpoint, trial):
        """(passes over the data, batches of the pass that has begun) where the run goes on."""
        place = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None or isinstance(self.train_dataset, Dataset) or self.args.ignore_data_skip:
            return place
        return stream_place(Path(resume_from_checkpoint), self.args.gradient_accumulation_steps)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last call before the first step of a resumed run: random states, and everything in the run state."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.accelerator.print(*restore(self, Path(checkpoint)), sep="\n")
