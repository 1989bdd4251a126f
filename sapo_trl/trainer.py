"""`SAPOTrainer`: TRL's `GRPOTrainer` with another update. Everything before the update is TRL's.

Stage map (config -> data -> rollout -> reward -> advantage -> objective -> update -> diagnostics -> evaluation)

stage       where (sapo_trl/)               what
config      config.py, arithmetic.py        one flag, derived batches, refusals, the batch plan, the memory of a GPU
data        data.py                         any dataset to `prompt`, `answer`
rollout     TRL `_generate`; generation.py, TRL generates, on a CPU without its finished rows; the result is held as
            rollout.py                      rows without padding
reward      TRL `_calculate_rewards`;       functions side by side, each held to the contract
            rewards/
advantage   TRL grpo_trainer.py 2761-2818   A = (r - mean_G r)/(std_G r + 1e-4); exactly 0 for equal rewards
objective   objective.py, algorithms.py     J per token; how tokens are averaged
forward     packing.py, attention.py,       rows to packs to log-probs and entropies
            head.py, balance.py
replay      routing_replay.py               experts' selection recorded and looked up (Mixture-of-Experts)
experts     experts.py                      frozen routers, ZeRO-3 leaf modules, names for vLLM
update      update.py, loss.py, memory.py   one mini-batch is one optimizer step, an inner loop over packs
diagnostics diagnostics.py, histograms.py,  sums on the device, reduced once per optimizer step; live view, guard
            callbacks.py, guard.py
checkpoints checkpoints.py                  strict load through the converting loader, parameter hash
evaluation  evaluation.py, stats.py         Pass@1 with intervals
pictures    plots.py, ratios.py, bound.py,  figures with their numbers, the run report
            report*.py

One optimizer step: rows whose advantage is exactly 0 leave the model passes when nothing else needs them and stay in
every denominator; old log-probs are computed only for the mini-batches after the first, whose current log-probs are
its old ones; passes that don't hang on the rewards run while those are computed.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer

from sapo_trl import checkpoints
from sapo_trl.algorithms import ALGORITHMS
from sapo_trl.config import SAPOConfig, batch_plan
from sapo_trl.data.preflight import check_model_path, check_train_dataset
from sapo_trl.metrics.step import tracker_histograms
from sapo_trl.moe.experts import prepare_experts
from sapo_trl.moe.routing_replay import prepare_routing, recording_generation, replay_plan, tape_of
from sapo_trl.monitor.guard import CollapseGuard
from sapo_trl.objective import LossInputs, Objective
from sapo_trl.rewards import accuracy_reward
from sapo_trl.rewards.contract import checked, reward_arguments, reward_name, start_rewards
from sapo_trl.rollout.generation import plain_generation_reason, unfinished_only
from sapo_trl.rollout.rows import MiniBatch, Row, equal_reward_rows, reward_interval, rows_from_lists, rows_from_padded
from sapo_trl.stats import mean_with_interval
from sapo_trl.trl_seams import check_installed, loaded_from, texts_stay_local
from sapo_trl.update.memory import settle_budget
from sapo_trl.update.packing import PackedForward
from sapo_trl.update.update import Update

check_installed()

# Under this name `accuracy_reward` is logged: its mean over an evaluation set is Pass@1
ACCURACY = reward_name(accuracy_reward)


class SAPOTrainer(GRPOTrainer):
    """Trains a policy with SAPO, or with any other row of `sapo_trl.algorithms.ALGORITHMS`.

    Args:
        model, reward_funcs, args, train_dataset and all of TRL's other arguments: as for `GRPOTrainer`; `args` is a
            `SAPOConfig`.
        objective: `f(tokens: LossInputs, config: SAPOConfig) -> (T,)`, the per-token surrogate to maximise in place
            of the algorithm's; averaging, KL and masks stay the algorithm's. A subclass may override
            `token_objective` instead.

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
        *,
        objective: Objective | None = None,
        **trl_arguments,
    ):
        name = (model if isinstance(model, str) else loaded_from(model.config)).rstrip("/").split("/")[-1]
        args = SAPOConfig(f"{name}-SAPO") if args is None else args
        if not isinstance(args, SAPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; SAPOTrainer needs a SAPOConfig.")
        algorithm = ALGORITHMS[args.algorithm]
        self.plan = batch_plan(args)
        if args.old_logprobs == "sampler" and not args.use_vllm and trl_arguments.get("rollout_func") is None:
            raise ValueError(
                "old_logprobs='sampler' needs log-probs from the sampler, and transformers' generate returns none. Set "
                "use_vllm: true, pass a rollout_func, or leave old_logprobs: trainer."
            )
        if isinstance(model, str):
            check_model_path(model)
        self.carries_images = check_train_dataset(train_dataset, self.plan, args.world_size)
        if self.carries_images and args.overlap_rewards:
            raise ValueError(
                "overlap_rewards=True, but the training set has images, and TRL hands those over after the rewards. "
                "Remove overlap_rewards."
            )
        self._name = args.algorithm.upper()
        self._paper = {"title": algorithm.title, "id": algorithm.paper}
        self._tag_names = [*type(self)._tag_names, args.algorithm]
        self.objective = objective or algorithm.objective
        self._stock_objective = objective is None and type(self).token_objective is SAPOTrainer.token_objective
        self._holding_back = self._rollout_is_new = self._budget_is_settled = False
        self._rollout_routes: list[Tensor] | None = None
        self._early_rows: list[Row] | None = None  # rows whose passes ran while the rewards were computed
        self._mini_batches: list[MiniBatch] | None = None
        super().__init__(model, reward_funcs, args, train_dataset, **trl_arguments)
        if self.carries_images and not self._is_vlm:
            raise ValueError(f"the training set has images, but {type(self.model).__name__} got a tokenizer only.")
        if any(isinstance(func, nn.Module) for func in self.reward_funcs):
            self.reward_funcs = [f if isinstance(f, nn.Module) else checked(f) for f in self.reward_funcs]
        self._prepare_update()
        if args.on_collapse != "none":
            self.add_callback(CollapseGuard())
        if self.accelerator.is_main_process:
            print(self._announcement(), flush=True)

    def token_objective(self, tokens: LossInputs) -> Tensor:
        """J per trained token, (T,), to be maximised. The one method to override for another objective.

        Called twice per pack: the second time at the old policy, for the reported loss.
        """
        return self.objective(tokens, self.args)

    # ---- set-up ------------------------------------------------------------------------------------------------

    def _prepare_update(self) -> None:
        args, text_config = self.args, self.model.config.get_text_config()
        self._forward = PackedForward(
            self.model,
            self.ref_model,
            self.accelerator,
            pad_token_id=self._tokenizer.pad_token_id,
            temperature=self.temperature,
            cast_lm_head_to_fp32=args.cast_lm_head_to_fp32,
            max_tokens=args.max_tokens_per_pack,
            share_prompts=args.share_prompts,
        )
        router = (text_config.num_experts, text_config.num_experts_per_tok) if self.aux_loss_enabled else None
        self._routing = prepare_routing(
            self.model, args.routing_replay, follows_generation=not self.tools and self.rollout_func is None
        )
        self._update = Update(self, self._forward, self._routing, router, self._stock_objective)
        by_user = None if self.rollout_func is None else "rollout_func"
        self._plain_generation = by_user or plain_generation_reason(self.model, args, self.accelerator, self._routing)
        vllm = self.vllm_generation if self.use_vllm else None
        self._experts = prepare_experts(self.model, args.freeze_router, self.accelerator, vllm)
        # Anything but the advantage that could move the weights keeps dead rows alive
        self._skip_dead = (
            args.skip_zero_advantage
            and self._stock_objective
            and args.beta == 0.0
            and not self._entropy_bonus_enabled
            and not self.aux_loss_enabled
            and args.top_entropy_quantile == 1.0
        )

    def _announcement(self) -> str:
        title = f"{self._name}: {self.args.algorithm}{'' if self._stock_objective else ' with a custom objective'}"
        lines = [
            title,
            str(self.plan),
            f"  {'generation':24} {self._plain_generation or 'finished rows leave the batch'}",
            f"  {'update':24} {self._forward}",
            *(f"  {name:24} {text}" for name, text in self._experts),
        ]
        if self.args.routing_replay != "none":
            rows = self.plan.rows_per_process * self.args.num_mini_batches
            size = replay_plan(tape_of(self.model), rows, 2 * self.max_completion_length)
            lines.append(f"  {'routing replay':24} {self.args.routing_replay}: {size}")
        return "\n".join(lines if self.plan.gate_can_act else ["!" * 100, *lines, "!" * 100])

    # ---- rollout -----------------------------------------------------------------------------------------------

    @contextmanager
    def _model_passes_held_back(self):
        """TRL's rollout without its own old- and reference-log-prob passes: the update does them, on live rows only.

        Nor are texts gathered from all processes unless they are logged.
        """
        beta, correction = self.beta, self.vllm_importance_sampling_correction
        self.beta, self.vllm_importance_sampling_correction, self._holding_back = 0.0, False, True
        self._texts: list[list] = []
        try:
            with nullcontext() if self.log_completions else texts_stay_local(self._texts):
                yield
        finally:
            self.beta, self.vllm_importance_sampling_correction, self._holding_back = beta, correction, False

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self._holding_back:
            return None, None, None
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _generate(self, prompts: list):
        output = super()._generate(prompts)
        self._generated = output[:3]  # prompt ids, completion ids, tool masks or None: for passes without rewards
        return output

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        """TRL's generation; under R3 the experts chosen while generating are kept for the update."""
        if not self._routing.follows_generation or not self.model.training:
            with nullcontext() if self._plain_generation else unfinished_only(self.model):
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with recording_generation(self.model) as record:
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self._rollout_routes = record.rows([len(ids) for ids in prompt_ids], [len(ids) for ids in completion_ids])
        return completion_ids, logprobs

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> Tensor:
        """Reward functions side by side, each held to the contract; (B over all processes, functions), NaN for None."""
        self._texts[:] = [prompts, completions]
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
                    self._passes_during_rewards()
                    values = pending.result()
            local = torch.tensor([[torch.nan if v is None else v for v in column] for column in values])
            rewards = self.accelerator.gather(local.T.contiguous().to(self.accelerator.device))
        self._rewards_per_func = rewards  # for `_equal_rewards`
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["rewards/unscorable_frac"].append(rewards.isnan().all(dim=1).float().mean().item())
        if mode == "eval" and ACCURACY in self.reward_func_names:
            column = rewards[:, self.reward_func_names.index(ACCURACY)].view(-1, self.num_generations_eval)
            self._eval_accuracy.append(column.nanmean(dim=1).cpu())
        return rewards

    def evaluation_loop(self, *args, **kwargs):
        """TRL's, with Pass@1 over problems and its 95 % interval where `accuracy_reward` is among the rewards."""
        self._eval_accuracy: list[Tensor] = []
        output = super().evaluation_loop(*args, **kwargs)
        scored = [accuracy for batch in self._eval_accuracy for accuracy in batch.tolist() if accuracy == accuracy]
        if scored:
            interval = mean_with_interval(scored)
            name = f"{kwargs.get('metric_key_prefix', 'eval')}_pass_at_1"
            output.metrics.update({name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high})
        return output

    @property
    def _total_rewards(self) -> Tensor:
        """(B over all processes,); NaN for a completion without any reward."""
        rewards = self._rewards_per_func
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)

    def _equal_rewards(self, num_local: int) -> Tensor:
        """True for this process's rows whose group got equal rewards, (num_local,)."""
        mode = "train" if self.model.training else "eval"
        rewards = self._total_rewards
        equal = equal_reward_rows(rewards, self.num_generations if mode == "train" else self.num_generations_eval)
        start = self.accelerator.process_index * num_local
        return equal[start : start + num_local]

    def _rollout_rows(self, generation_batch) -> tuple[list[Row], float]:
        """(rows of this process, trained tokens of the rollout as mean over processes)."""
        with self._model_passes_held_back(), self._timed("rollout"):
            output = self._generate_and_score_completions(generation_batch)
        if self.multi_objective_aggregation == "sum_then_normalize":
            equal = self._equal_rewards(len(output["advantages"]))
            output["advantages"] = output["advantages"].masked_fill(equal, 0.0)
        self._rollout_is_new = True
        rows = rows_from_padded(output)
        if not self.carries_images and any(row.images is not None for row in rows):
            raise ValueError("prompts hold images inside their messages; put them into a column `images`.")
        self._take_early(rows)
        if self.model.training:
            low, high = reward_interval(self._total_rewards, self.num_generations)
            self._metrics["train"]["reward_low"].append(low)
            self._metrics["train"]["reward_high"].append(high)
        if self.args.old_logprobs == "sampler" and self.model.training:
            if any(row.sampler_logps is None for row in rows):
                raise ValueError(
                    "old_logprobs='sampler', but the rollout gave no log-probs (rollout_func returned logprobs: None). "
                    "Return one per completion token, or set old_logprobs: trainer."
                )
            for row in rows:
                row.old_logps = row.sampler_logps
        return rows, float(output["num_items_in_batch"]) / self.accelerator.num_processes

    def _passes_during_rewards(self) -> None:
        """Old- and reference-log-prob passes while the rewards are computed, where they don't hang on them.

        They do where dead rows are skipped: then the rewards come first, unless `overlap_rewards` says that rewards
        are slower than passes over dead rows. What runs never depends on the clock, so a seed gives the same numbers.
        """
        waits = self._skip_dead and not self.args.overlap_rewards
        if waits or not self.model.training or self.carries_images:  # TRL adds images at the end
            return
        rows = rows_from_lists(*self._generated)
        for row, routes in zip(rows, self._rollout_routes or [None] * len(rows), strict=True):
            row.routes = None if routes is None else routes[: len(row)]
        self._early_rows = rows
        self._settle_budget(rows)
        self._update.record_logps(self._live(self._parted(rows)), first=self._mini_batch_index)

    def _take_early(self, rows: list[Row]) -> None:
        """Give the rollout's rows what was recorded while generating or while the rewards were computed."""
        routes, self._rollout_routes = self._rollout_routes, None
        early, self._early_rows = self._early_rows, None
        for i, row in enumerate(rows):
            if routes is not None:
                row.routes = routes[i][: len(row)]  # shorter where TRL masked a truncated completion
            if early is not None and row.num_trained:
                row.old_logps, row.ref_logps, row.routes = early[i].old_logps, early[i].ref_logps, early[i].routes

    def _settle_budget(self, rows: list[Row]) -> None:
        if not self._budget_is_settled:
            settle_budget(self._update, self.model_wrapped, max(row.num_prompt for row in rows))
            self._budget_is_settled = True

    def _parted(self, rows: list[Row]) -> list[list[Row]]:
        """The mini-batches' rows: a group's completions go to different ones, as in TRL."""
        shuffled, size = [rows[i] for i in self._order], len(rows) // self.args.num_mini_batches
        return [shuffled[start : start + size] for start in range(0, len(rows), size)]

    def _shuffled(self, num_rows: int) -> list[int]:
        return torch.randperm(num_rows).tolist()

    def _prepare_inputs(self, generation_batch) -> MiniBatch:
        """The mini-batch of this optimizer step; at the first one of a rollout, generate and plan all of them."""
        if not self.model.training:
            rows, tokens = self._rollout_rows(generation_batch)
            live = self._live([rows])
            self._update.record_logps(live, first=0)
            return self._forward.plan_mini_batches([rows], live, tokens)[0]
        accumulation, num = self.args.gradient_accumulation_steps, self.args.num_mini_batches
        if self._mini_batches is None:  # a resumed run goes on in the middle of a rollout
            self._step = (self.state.global_step + 1) * accumulation - 1
        step = self._step // accumulation
        self._mini_batch_index = step % num  # of the one trained next; after a resume not always the first
        if step % (num * self.num_iterations) == 0 or self._mini_batches is None:
            self._order = self._shuffled(len(generation_batch))
            rows, tokens = self._rollout_rows(generation_batch)
            self._settle_budget(rows)
            parts = self._parted(rows)
            live = self._update.deal(self._live(parts))
            with self._timed("old_and_reference_logps"):
                self._update.record_logps(live, first=self._mini_batch_index)
            self._mini_batches = self._forward.plan_mini_batches(parts, live, tokens)
        mini_batch = self._mini_batches[step % num]
        mini_batch.index = step % (num * self.num_iterations)
        return mini_batch

    @contextmanager
    def _timed(self, phase: str):
        """Seconds of a phase on the host's clock, as `time/<phase>_s`."""
        started = time.perf_counter()
        yield
        self._metrics["train" if self.model.training else "eval"][f"time/{phase}_s"].append(
            time.perf_counter() - started
        )

    def _live(self, parts: list[list[Row]]) -> list[list[Row]]:
        """The rows that are forwarded: there is something to train, and they can move the weights."""
        return [[row for row in rows if row.num_trained and not (row.is_dead and self._skip_dead)] for rows in parts]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, but the table of completions shows a rollout once and not once per mini-batch."""
        wanted = self.log_completions
        self.log_completions = wanted and self._rollout_is_new
        try:
            super().log(logs, start_time)
        finally:
            self.log_completions, self._rollout_is_new = wanted, False

    # ---- update ------------------------------------------------------------------------------------------------

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
            mini_batch = self._prepare_inputs(inputs)
            with self._timed("update"), self._forward.packed(model):  # checkpointing forwards again during backward
                loss = self._reported(model, mini_batch, backward=True)
        self._step += 1
        self._current_train_step_time += time.perf_counter() - started
        if is_step:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        return loss

    def compute_loss(self, model, inputs: MiniBatch, return_outputs=False, num_items_in_batch=None) -> Tensor:
        """The loss of a mini-batch without a backward pass (evaluation)."""
        return self._reported(model, inputs, backward=False)

    def _reported(self, model: nn.Module, mini_batch: MiniBatch, backward: bool) -> Tensor:
        """The loss to report, 0 on-policy but for KL, entropy bonus and router loss; logs the update's metrics."""
        loss, at_old_policy, values = self._update.run(model, mini_batch, backward)
        log = self._metrics["train" if backward else "eval"]
        for name, value in values.items():
            log[name].append(value)
        return loss - at_old_policy

    def histograms(self) -> dict:
        """Of the last step: name -> (counts (b,), edges (b + 1,)), for trackers."""
        return tracker_histograms(self._update.distributions)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    @property
    def _engine_loads(self) -> bool:
        """ZeRO and FSDP keep the weights in files of their own and load them strictly; PEFT loads adapters."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled or isinstance(self.model, PeftModel)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if _internal_call:  # on every process: a checkpoint
            checkpoints.save_hash(self.model, output_dir or self.args.output_dir, self.accelerator)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """transformers' own leaves a Mixture-of-Experts model with the experts of the base weights."""
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            checkpoints.check_files(resume_from_checkpoint)
        if self._engine_loads:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            checkpoints.load_weights(self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The first call after whoever loaded the weights of a resumed run: they are compared with those saved."""
        if checkpoint is not None:
            self.accelerator.print(checkpoints.compare_hash(self.model, checkpoint, self.accelerator))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self._engine_loads:
            super()._load_best_model()
        else:
            checkpoints.load_weights(self.model, best)
        self.accelerator.print(f"best model: {checkpoints.compare_hash(self.model, best, self.accelerator)}")
