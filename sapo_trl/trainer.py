"""`SAPOTrainer`: TRL's `GRPOTrainer` with another update. Everything before the update is TRL's.

Stage map (config -> data -> rollout -> reward -> advantage -> objective -> update -> diagnostics -> evaluation)

stage       where                                    what
config      sapo_trl/config.py                       one flag, derived batches, refusals, the batch plan
data        sapo_trl/data.py                         any dataset to `prompt`, `answer`
rollout     TRL `_generate`; sapo_trl/rollout.py     TRL generates; the result is held as rows without padding
reward      TRL `_calculate_rewards`; sapo_trl/rewards
advantage   TRL grpo_trainer.py 2761-2818            A = (r - mean_G r)/(std_G r + 1e-4); exactly 0 for equal rewards
objective   sapo_trl/objective.py, algorithms.py     J per token; how tokens are averaged
forward     sapo_trl/packing.py                      rows to packs to log-probs and entropies
replay      sapo_trl/routing_replay.py               experts' selection recorded and looked up (Mixture-of-Experts)
experts     sapo_trl/experts.py                      frozen routers, ZeRO-3 leaf modules, names for vLLM
update      here, `training_step`; sapo_trl/loss.py  one mini-batch is one optimizer step, an inner loop over packs
diagnostics sapo_trl/diagnostics.py                  sums on the device, reduced once per optimizer step
checkpoints sapo_trl/checkpoints.py                  strict load through the converting loader, parameter hash
evaluation  sapo_trl/evaluation.py, stats.py         Pass@1 with intervals
pictures    sapo_trl/plots.py, bound.py, report.py   figures with their numbers, the run report

One optimizer step: rows whose advantage is exactly 0 leave the model passes when nothing else needs them and stay in
every denominator; old log-probs are computed only for the mini-batches after the first, whose current log-probs are
its old ones; the loss weights are fixed before the first pack; gradients are synchronised at the last pack only, and
every process runs the same number of packs.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from sapo_trl import checkpoints
from sapo_trl.algorithms import ALGORITHMS
from sapo_trl.config import SAPOConfig, batch_plan
from sapo_trl.diagnostics import BY_MINI_BATCH, MAXIMA, StepMetrics, metric_names, token_metrics
from sapo_trl.experts import float32_experts, freeze_routers, hub_named, mark_leaf_modules, moe_blocks
from sapo_trl.loss import WholeBatch, entropy_bonus, pack_tokens, router_loss, token_loss, whole_batch
from sapo_trl.objective import LossInputs, MiniBatchCounts, Objective, row_weights
from sapo_trl.packing import PackedForward, inner_model, plan_mini_batches
from sapo_trl.preflight import check_model_path, check_train_dataset
from sapo_trl.rewards.contract import checked, run_rewards
from sapo_trl.rollout import MiniBatch, Row, equal_reward_rows, rows_from_padded, set_logps
from sapo_trl.routing_replay import attach, pack_routes, recording_generation, replay_bytes, routed, tape_of


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
        name = (model if isinstance(model, str) else model.config._name_or_path).rstrip("/").split("/")[-1]
        args = SAPOConfig(f"{name}-SAPO") if args is None else args
        if not isinstance(args, SAPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; SAPOTrainer needs a SAPOConfig.")
        algorithm = ALGORITHMS[args.algorithm]
        self.plan = batch_plan(args)
        if isinstance(model, str):
            check_model_path(model)
        check_train_dataset(train_dataset, self.plan)
        self._name = args.algorithm.upper()
        self._paper = {"title": algorithm.title, "id": algorithm.paper}
        self._tag_names = [*type(self)._tag_names, args.algorithm]
        self.objective = objective or algorithm.objective
        self._stock_objective = objective is None and type(self).token_objective is SAPOTrainer.token_objective
        self._holding_back = self._rollout_is_new = False
        self._rollout_routes: list[Tensor] | None = None
        self._mini_batches: list[MiniBatch] | None = None
        super().__init__(model, reward_funcs, args, train_dataset, **trl_arguments)
        if any(isinstance(func, nn.Module) for func in self.reward_funcs):
            self.reward_funcs = [f if isinstance(f, nn.Module) else checked(f) for f in self.reward_funcs]
        self._prepare_update()
        if self.accelerator.is_main_process:
            print(self._announcement(), flush=True)

    def token_objective(self, tokens: LossInputs) -> Tensor:
        """J per trained token, (T,), to be maximised. The one method to override for another objective."""
        return self.objective(tokens, self.args)

    # ---- set-up ------------------------------------------------------------------------------------------------

    def _prepare_update(self) -> None:
        args, text_config = self.args, self.model.config.get_text_config()
        self._forward = PackedForward(
            self.model,
            self.ref_model,
            self.accelerator,
            self._tokenizer.pad_token_id,
            self.temperature,
            args.cast_lm_head_to_fp32,
        )
        self._routing = self._attach_routing()
        self._experts = self._prepare_experts()
        self._router = (text_config.num_experts, text_config.num_experts_per_tok) if self.aux_loss_enabled else None
        # Anything but the advantage that could move the weights keeps dead rows alive
        self._skip_dead = (
            args.skip_zero_advantage
            and self._stock_objective
            and args.beta == 0.0
            and not self._entropy_bonus_enabled
            and not self.aux_loss_enabled
            and args.top_entropy_quantile == 1.0
        )

    def _attach_routing(self) -> str:
        """Watch the experts' selection of a Mixture-of-Experts model; `r2`, `r3`, `watched` or why not."""
        replay = self.args.routing_replay
        if replay == "r3" and self.tools:
            raise ValueError("routing_replay='r3' can't follow a conversation with tools; use routing_replay='r2'.")
        try:
            attach(self.model)
        except (ValueError, NotImplementedError) as error:
            if replay != "none":
                raise
            return f"not watched: {error}"
        return "watched" if replay == "none" else replay

    def _prepare_experts(self) -> list[tuple[str, str]]:
        """Before the optimizer and the engine exist; lines of the announcement."""
        state = self.accelerator.state
        lines = {
            "router": freeze_routers(self.model) if self.args.freeze_router else None,
            "ZeRO-3 leaf modules": mark_leaf_modules(self.model, state.deepspeed_plugin),
            "experts": float32_experts(
                self.model, self.accelerator.device.type, state.mixed_precision, state.distributed_type
            ),
        }
        if self.use_vllm and moe_blocks(self.model):
            model, named = inner_model(self.model, self.accelerator), self.vllm_generation._iter_named_params
            self.vllm_generation._iter_named_params = lambda: hub_named(model, named())
        return [(name, text) for name, text in lines.items() if text]

    @property
    def _is_routed(self) -> bool:
        return self._routing in ("r2", "r3", "watched")

    def _announcement(self) -> str:
        title = f"{self._name}: {self.args.algorithm}{'' if self._stock_objective else ' with a custom objective'}"
        forward = f"{self._forward.layout} layout ({self._forward.reason})"
        lines = [
            title,
            str(self.plan),
            f"  {'update':24} {forward}, at most {self.args.max_tokens_per_pack} tokens a pack",
            *(f"  {name:24} {text}" for name, text in self._experts),
        ]
        if self.args.routing_replay != "none":
            tape, length = tape_of(self.model), 2 * self.max_completion_length
            per_row = replay_bytes(length, tape.num_layers, tape.top_k, tape.num_experts)
            rows = self.plan.rows_per_process * self.args.num_mini_batches
            shape = f"{tape.num_layers} layers x {tape.top_k} of {tape.num_experts} experts"
            size = f"up to {rows * per_row / 2**20:.1f} MiB for {rows} rows of {length} tokens"
            lines.append(f"  {'routing replay':24} {self.args.routing_replay}: {shape}, {size}")
        return "\n".join(lines if self.plan.gate_can_act else ["!" * 100, *lines, "!" * 100])

    # ---- rollout -----------------------------------------------------------------------------------------------

    @contextmanager
    def _model_passes_held_back(self):
        """TRL's rollout without its own old- and reference-log-prob passes: the update does them, on live rows only."""
        beta, correction = self.beta, self.vllm_importance_sampling_correction
        self.beta, self.vllm_importance_sampling_correction, self._holding_back = 0.0, False, True
        try:
            yield
        finally:
            self.beta, self.vllm_importance_sampling_correction, self._holding_back = beta, correction, False

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self._holding_back:
            return None, None, None
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        """TRL's generation; under R3 the experts chosen while generating are kept for the update."""
        if self._routing != "r3" or not self.model.training:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with recording_generation(self.model) as record:
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self._rollout_routes = record.rows([len(ids) for ids in prompt_ids], [len(ids) for ids in completion_ids])
        return completion_ids, logprobs

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> Tensor:
        """Reward functions side by side, each held to the contract; (B over all processes, functions), NaN for None."""
        if any(isinstance(func, nn.Module) for func in self.reward_funcs):  # reward models: TRL's way, one by one
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        else:
            columns = [key for key in inputs[0] if key not in ("prompt", "completion", "completion_ids")]
            kwargs = {key: [row[key] for row in inputs] for key in columns}
            kwargs |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids_list}
            kwargs |= {
                "trainer_state": self.state,
                "log_extra": self._log_completion_extra,
                "log_metric": self._log_metric,
            }
            if self.environments is not None:
                kwargs["environments"] = self.environments
            loop = self.async_loop if self._has_async_funcs else None
            with self._timed("reward"):
                values = run_rewards(self.reward_funcs, self.reward_func_names, kwargs, loop)
            local = torch.tensor([[torch.nan if v is None else v for v in column] for column in values])
            rewards = self.accelerator.gather(local.T.contiguous().to(self.accelerator.device))
        self._rewards_per_func = rewards  # for `_equal_rewards`
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["rewards/unscorable_frac"].append(rewards.isnan().all(dim=1).float().mean().item())
        return rewards

    def _equal_rewards(self, num_local: int) -> Tensor:
        """True for this process's rows whose group got equal rewards, (num_local,)."""
        mode = "train" if self.model.training else "eval"
        rewards = (self._rewards_per_func * self.reward_weights.to(self._rewards_per_func.device)).nansum(dim=1)
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
        if self._rollout_routes is not None:
            for row, routes in zip(rows, self._rollout_routes, strict=True):
                row.routes = routes[: len(row)]  # shorter where TRL masked a truncated completion
            self._rollout_routes = None
        return rows, float(output["num_items_in_batch"]) / self.accelerator.num_processes

    def _prepare_inputs(self, generation_batch) -> MiniBatch:
        """The mini-batch of this optimizer step; at the first one of a rollout, generate and plan all of them."""
        if not self.model.training:
            rows, tokens = self._rollout_rows(generation_batch)
            mini_batch = self._plan([rows], tokens)[0]
            self._record_logps([mini_batch], with_old=False)
            return mini_batch
        accumulation, num = self.args.gradient_accumulation_steps, self.args.num_mini_batches
        if self._mini_batches is None:  # a resumed run goes on in the middle of a rollout
            self._step = (self.state.global_step + 1) * accumulation - 1
        step = self._step // accumulation
        if step % (num * self.num_iterations) == 0 or self._mini_batches is None:
            rows, tokens = self._rollout_rows(generation_batch)
            rows, size = self._shuffled(rows), len(rows) // num
            parts = [rows[k * size : (k + 1) * size] for k in range(num)]
            self._mini_batches = self._plan(parts, tokens)
            with self._timed("old_and_reference_logps"):
                self._record_logps(self._mini_batches, with_old=True)
        return self._mini_batches[step % num]

    @contextmanager
    def _timed(self, phase: str):
        """Seconds of a phase on the host's clock, as `time/<phase>_s`."""
        started = time.perf_counter()
        yield
        self._metrics["train" if self.model.training else "eval"][f"time/{phase}_s"].append(
            time.perf_counter() - started
        )

    def _shuffled(self, rows: list[Row]) -> list[Row]:
        """A group's completions go to different mini-batches, as in TRL."""
        return [rows[i] for i in torch.randperm(len(rows)).tolist()]

    def _is_forwarded(self, row: Row) -> bool:
        return row.num_trained > 0 and not (row.is_dead and self._skip_dead)

    def _plan(self, parts: list[list[Row]], rollout_tokens: float) -> list[MiniBatch]:
        return plan_mini_batches(
            parts, self._is_forwarded, self.args.max_tokens_per_pack, rollout_tokens, self.accelerator
        )

    def _record_logps(self, mini_batches: list[MiniBatch], with_old: bool) -> None:
        """Old log-probs for the mini-batches after the first, reference log-probs for all, before any update."""
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            for mini_batch in mini_batches[1:] if with_old else []:
                self._record("old_logps", self.model, mini_batch)
            if self.beta == 0.0:
                return
            for mini_batch in mini_batches:
                if self.ref_model is not None:
                    self._record("ref_logps", self.ref_model, mini_batch)
                else:
                    model = self.accelerator.unwrap_model(self.model)
                    with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                        self._record("ref_logps", self.model, mini_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, but the table of completions shows a rollout once and not once per mini-batch."""
        wanted = self.log_completions
        self.log_completions = wanted and self._rollout_is_new
        try:
            super().log(logs, start_time)
        finally:
            self.log_completions, self._rollout_is_new = wanted, False

    def _record(self, name: str, model: nn.Module, mini_batch: MiniBatch) -> None:
        for pack in mini_batch.packs:
            with self._routed(model, pack) if name == "old_logps" else nullcontext():  # the reference routes freely
                outputs, _ = self._forward(model, pack)
            set_logps(pack, name, outputs.logps)

    def _routed(self, model: nn.Module, pack: list[Row]):
        """Context of a pack's passes: routes recorded where its rows have none, replayed under r2 and r3."""
        if not self._is_routed or not self.model.training:
            return nullcontext()
        return routed(model, pack, self._forward.layout, replay=self._routing != "watched")

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
                loss = self._run_packs(model, mini_batch, backward=True)
        self._step += 1
        self._current_train_step_time += time.perf_counter() - started
        if is_step:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        return loss

    def compute_loss(self, model, inputs: MiniBatch, return_outputs=False, num_items_in_batch=None) -> Tensor:
        """The loss of a mini-batch without a backward pass (evaluation)."""
        return self._run_packs(model, inputs, backward=False)

    def _run_packs(self, model: nn.Module, mini_batch: MiniBatch, backward: bool) -> Tensor:
        whole = self._whole_batch(model, mini_batch)
        metrics, total = StepMetrics(), torch.zeros((), device=self.accelerator.device)
        engine = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        for i, pack in enumerate(mini_batch.packs):
            last = i == len(mini_batch.packs) - 1
            # DeepSpeed refuses no_sync; accelerate tells it the boundary through sync_gradients
            synchronise = last or engine or not backward
            sync = nullcontext() if synchronise else self.accelerator.no_sync(model)
            with sync, self._routed(model, pack) as live:
                loss = self._pack_loss(model, pack, mini_batch, whole, metrics)
                if backward:
                    self.accelerator.gradient_state._set_sync_gradients(last)
                    self.accelerator.backward(loss, **({"scale_wrt_gas": False} if engine else {}))
            if live is not None and pack:
                metrics.routes(pack_routes([row.routes for row in pack], self._forward.layout), live.routes())
            total += loss.detach()
        self._log_step(metrics, mini_batch, backward)
        return total

    def _whole_batch(self, model: nn.Module, mini_batch: MiniBatch) -> WholeBatch | None:
        """What packs must know of each other; None where the only pack can find it out itself.

        The entropy threshold and the experts' loads need every pack's forward pass before the first backward: with
        several packs that is one more pass without gradient.
        """
        if self._router is None and self.top_entropy_quantile == 1.0:
            return WholeBatch(mini_batch.num_tokens)
        if len(mini_batch.packs) == 1:
            return None
        with torch.no_grad():
            passes = []
            for pack in mini_batch.packs:
                with self._routed(model, pack):
                    passes.append(self._forward(model, pack, self._router is not None)[0])
        real = [outputs for outputs, pack in zip(passes, mini_batch.packs, strict=True) if pack]
        return whole_batch(real, mini_batch, self.args, self._router, self.accelerator)

    def _pack_loss(
        self, model: nn.Module, pack: list[Row], mini_batch: MiniBatch, whole: WholeBatch | None, metrics: StepMetrics
    ) -> Tensor:
        outputs, inputs = self._forward(model, pack, self._router is not None)
        if whole is None:
            whole = whole_batch([outputs] if pack else [], mini_batch, self.args, self._router, self.accelerator)
        if not pack:  # gradients of zero, so that the optimizer steps as for any other mini-batch
            return 0.0 * (outputs.logps.sum() + outputs.entropies.sum())
        tokens = pack_tokens(outputs, pack, inputs.rows, self.args)
        per_token, kl = token_loss(self.token_objective(tokens.inputs), tokens, whole, self.args)
        lengths = torch.tensor([row.num_trained for row in pack], device=per_token.device)
        loss = (row_weights(self.args.aggregation, lengths, self._counts(mini_batch))[inputs.rows] * per_token).sum()
        if self._entropy_bonus_enabled:
            bonus, count = entropy_bonus(tokens, whole)
            metrics.mean("entropy_bonus", bonus.detach(), count)
            loss = loss - self._applied_entropy_coef() * bonus / max(whole.entropy_tokens, 1.0)
        if self._router is not None:
            aux = router_loss(tokens.router_logits, whole)
            metrics.mean("aux_loss", aux.detach(), 0.0)
            loss = loss + self.router_aux_loss_coef * aux
        token_metrics(metrics, tokens, kl, self.args, self._stock_objective)
        if self.model.training and pack[0].old_logps is None:  # on-policy now; a second iteration compares with it
            set_logps(pack, "old_logps", outputs.logps.detach())
        return loss

    def _counts(self, mini_batch: MiniBatch) -> MiniBatchCounts:
        parts = self.args.num_mini_batches if self.model.training else 1
        return MiniBatchCounts(
            num_rows=len(mini_batch.rows),
            num_tokens=mini_batch.num_tokens,
            num_rollout_tokens=mini_batch.num_rollout_tokens,
            num_mini_batches=parts,
            max_completion_length=self.max_completion_length,
        )

    def _applied_entropy_coef(self) -> float:
        """TRL's adaptive control: the bonus acts only while last step's entropy was at or below the target."""
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        return self.entropy_coef

    def _log_step(self, metrics: StepMetrics, mini_batch: MiniBatch, is_update: bool) -> None:
        """Reduce the step's metrics, add what the update did, and move the entropy controller."""
        forwarded = [row for pack in mini_batch.packs for row in pack]
        per_process = 1.0 / self.accelerator.num_processes  # makes the reduced mean a total over processes
        metrics.mean("aux_loss", 0.0, 1.0)
        metrics.mean("update/skipped_rows_frac", len(mini_batch.rows) - len(forwarded), len(mini_batch.rows))
        metrics.mean("update/forwarded_tokens", float(sum(len(row) for row in forwarded)), per_process)
        metrics.mean("update/trained_tokens", float(sum(row.num_trained for row in forwarded)), per_process)
        metrics.mean("update/packs", len(mini_batch.packs), 1.0)
        names = metric_names(self.args, self._stock_objective, self.aux_loss_enabled)
        values = metrics.reduce(self.accelerator, names, MAXIMA)
        log = self._metrics["train" if is_update else "eval"]
        if self._is_routed and is_update:
            tape = tape_of(self.model)
            values |= metrics.reduce_routes(self.accelerator, tape.num_layers, tape.num_experts)
        values |= {f"mini_batch_{mini_batch.index}/{name}": values[name] for name in BY_MINI_BATCH if name in values}
        for name, value in values.items():
            log[name].append(value)
        if is_update and self._entropy_bonus_enabled:
            log["entropy_coef"].append(self.entropy_coef)
            if self.use_adaptive_entropy and "entropy_bonus" in values:
                self._move_entropy_coef(values["entropy_bonus"])

    def _move_entropy_coef(self, entropy: float) -> None:
        args, low = self.args, entropy <= self.args.entropy_target
        moved = self.entropy_coef + (args.entropy_coef_delta if low else -args.entropy_coef_delta)
        self.entropy_coef = min(max(moved, args.entropy_coef_min), args.entropy_coef_max)
        self._last_world_entropy = entropy

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
