"""The rollouts of a `SAPOTrainer`: TRL's generation, rewards and advantages, held as rows without padding."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from sapo_trl import faults
from sapo_trl.batch_plan import BatchPlan
from sapo_trl.config import SAPOConfig
from sapo_trl.eval_sets import EvalSet
from sapo_trl.evaluation.training import sampled_as
from sapo_trl.metrics.table import check_logged
from sapo_trl.model import inner_model
from sapo_trl.moe.routing_replay import Routing, recording_generation
from sapo_trl.monitor.progress import print_completions
from sapo_trl.rewards.contract import check_scores, reward_arguments
from sapo_trl.rewards.running import start_rewards
from sapo_trl.rollout.ahead import RolloutsAhead
from sapo_trl.rollout.generation import unfinished_only
from sapo_trl.rollout.interruption import budgets, cut, is_thinking, phrase_tokens
from sapo_trl.rollout.outside import plain_sampling
from sapo_trl.rollout.rollout import Rollout, unscored
from sapo_trl.rollout.rows import Row, rows_from_padded
from sapo_trl.rollout.vllm import engine_dtype, engine_routes, recording_engine
from sapo_trl.rollout.vllm_ahead import BackgroundVLLM
from sapo_trl.trainer_evaluation import EvaluationTrainer
from sapo_trl.trl_seams import texts_stay_local
from sapo_trl.update.plan import UpdatePlan
from sapo_trl.update.update import Update

PROBE = 8  # tokens of each completion by which an engine is checked that generates ahead


class RolloutTrainer(EvaluationTrainer):
    """TRL's trainer whose rollouts are rows."""

    args: SAPOConfig
    model: PreTrainedModel
    model_wrapped: nn.Module
    num_generations: int
    ref_model: nn.Module | None
    plan: BatchPlan
    carries_images: bool
    _filling: Rollout  # TRL's hooks fill it while `_is_filling`
    _is_filling: bool
    _rollout: Rollout | None  # the one that is trained on
    _ahead: RolloutsAhead | None  # the one after it
    _rollout_is_new: bool
    _engine_is_checked: bool
    _drops_finished_rows: bool
    _routing: Routing
    _plan: UpdatePlan
    _update: Update

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @contextmanager
    def _fills(self, rollout: Rollout) -> Generator[None]:
        """TRL's rollout into `rollout`, without TRL's own old- and reference-log-prob passes: the update does them, on
        the rows that need them.

        Nor are texts gathered from all processes unless they are logged.
        """
        beta, correction = self.beta, self.vllm_importance_sampling_correction
        self.beta, self.vllm_importance_sampling_correction = 0.0, False
        self._filling, self._is_filling = rollout, True
        try:
            with nullcontext() if self.log_completions else texts_stay_local(rollout.texts):
                yield
        finally:
            self.beta, self.vllm_importance_sampling_correction, self._is_filling = beta, correction, False

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self._is_filling:
            return None, None, None
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list):
        """TRL's, but the completions of one prompt, which are neighbours, have it tokenized once."""
        if self._is_vlm or self.environment_factories is not None:
            return super()._tokenize_prompts(prompts)
        is_new = [i == 0 or prompt != prompts[i - 1] for i, prompt in enumerate(prompts)]
        different = [prompt for prompt, new in zip(prompts, is_new, strict=True) if new]
        ids, images, fields = super()._tokenize_prompts(different)
        if fields:  # a row for each prompt
            return super()._tokenize_prompts(prompts)
        return [list(ids[k - 1]) for k in accumulate(is_new)], images, fields

    def _generate(self, prompts: list):
        output = super()._generate(prompts)
        ids, masks, forced = output[1], output[2], self._filling.forced
        if forced is not None:  # in the form of the masks of tools
            masks = [[int(i not in part) for i in range(len(x))] for x, part in zip(ids, forced, strict=True)]
            frac = torch.tensor([sum(map(bool, forced)) / len(forced)], device=self.accelerator.device)
            self._log_all({"completions/interrupted_frac": self.accelerator.gather(frac).mean().item()})
        self._filling.generated = output[0], ids, masks
        pictures = output[6] and [own or [] for own in output[6]]  # TRL's None for a prompt of text fails in processors
        return (*output[:2], masks, *output[3:6], pictures, *output[7:])

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        """TRL's generation, each completion cut at the length of its dataset: what is left is distributed as if it had
        been the limit. Thoughts may be interrupted before."""
        limits = self._filling.limits if self._is_filling else []
        if self.args.thinking_budget and self._is_filling and self.model.training:
            return self._interrupted(prompt_ids, self.args.thinking_budget, *args)
        completion_ids, logprobs = self._sampled(prompt_ids, limits, *args, **kwargs)
        return cut(completion_ids, logprobs, limits) if limits else (completion_ids, logprobs)

    def _interrupted(self, prompt_ids: list, bounds: list[int], *args):
        """Generation up to the thinking budget, then of what is not finished; thoughts still open end in a phrase."""
        longest, phrase = self.args.max_completion_length or 0, phrase_tokens(self._tokenizer)
        limits = self._filling.limits or [longest] * len(prompt_ids)
        firsts = [min(pair) for pair in zip(budgets(bounds, len(prompt_ids)), limits, strict=True)]
        usual = EvalSet(temperature=self.temperature, top_p=self.top_p)
        with sampled_as(self, replace(usual, max_completion_length=bounds[-1])):
            ids, logprobs = cut(*self._sampled(prompt_ids, firsts, *args), firsts)
        self._filling.forced, rests = [range(0)] * len(ids), {}
        for i, prompt in enumerate(prompt_ids):
            if len(ids[i]) < firsts[i] or ids[i][-1] in self.eos_token_ids:
                continue
            left = limits[i] - firsts[i]
            if is_thinking(str(self._tokenizer.decode([*prompt, *ids[i]]))) and left > len(phrase):
                self._filling.forced[i] = range(firsts[i], firsts[i] + len(phrase))
                ids[i] = ids[i] + phrase
                if logprobs is not None:
                    logprobs[i] = logprobs[i] + [0.0] * len(phrase)  # not trained on
            if len(ids[i]) < limits[i]:
                rests[i] = limits[i] - len(ids[i])
        num = torch.tensor([len(rests)], device=self.accelerator.device)
        missing = int(self.accelerator.gather(num).max()) - len(rests)  # as many on every process
        if not rests and not missing:
            return ids, logprobs
        begun = [[*prompt_ids[i], *ids[i]] for i in rests] + [prompt_ids[0]] * missing
        with sampled_as(self, replace(usual, max_completion_length=longest - bounds[0])):
            lengths = [*rests.values(), *[1] * missing]
            more, more_logprobs = cut(*self._sampled(begun, lengths, *args[:-1], 1), lengths)
        for k, i in enumerate(rests):
            ids[i] = ids[i] + more[k]
            if logprobs is not None and more_logprobs is not None:
                logprobs[i] = logprobs[i] + more_logprobs[k]
        return ids, logprobs

    def _sampled(self, prompt_ids, limits: list[int], *args, **kwargs):
        """TRL's generation; under R3 the experts chosen while generating are kept for the update."""
        if self._ahead is not None:
            if self.model.training:
                return self._generate_ahead(self._ahead, prompt_ids, limits)
            if self.use_vllm:  # an evaluation takes the engine, and its weights are then those of now
                self._ahead.join()
        if not self._routing.follows_generation or not self.model.training:
            own_loop = unfinished_only(self.model, limits) if self._drops_finished_rows else nullcontext()
            as_set = sampled_as(self, self._eval_set)
            with own_loop, as_set, plain_sampling(inner_model(self.model, self.accelerator)):
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.use_vllm:
            with recording_engine(self.vllm_generation) as outputs:
                completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompt_ids, completion_ids, strict=True)]
            self._filling.routes = engine_routes(outputs, lengths, self.model)
            return completion_ids, logprobs
        with recording_generation(self.model) as record, plain_sampling(inner_model(self.model, self.accelerator)):
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self._filling.routes = record.rows([len(ids) for ids in prompt_ids], [len(ids) for ids in completion_ids])
        return completion_ids, logprobs

    @property
    def _rollout_number(self) -> int:
        """Of the rollout that begins or is trained on, in the run."""
        return self.state.global_step // self.plan.steps_per_rollout

    @property
    def _check_is_due(self) -> bool:
        """Whether the engine is compared with the policy now: after the first sync of this process, and in every n-th
        rollout of the run."""
        every = self.args.engine_check_every
        return not self._engine_is_checked or bool(every and self._rollout_number % every == 0)

    def _check_engine(self, rollout: Rollout) -> None:
        is_worker = self._ahead is not None and not self.use_vllm
        dtype = self.model.dtype if is_worker else engine_dtype(self.vllm_generation if self.use_vllm else None)
        found = self._plan.engine_check(rollout, dtype)
        if not found:
            warnings.warn("the rollout engine gave no log-probs, so nobody sees which weights it holds.", stacklevel=2)
        self._engine_is_checked = bool(found)
        self._log_all(found)

    def _prepare_ahead(self, reason: str | None) -> str:
        """Make `_ahead` where it is asked for; what to add to how completions are generated, in words.

        Args:
            reason: why the trainer's own decoding loop does not generate; None: it does.
        """
        self._ahead, vllm, where = None, None, "in a worker process with a copy of the weights"
        if not self.args.rollouts_ahead:
            return ""
        if self.use_vllm:
            step = lambda: self.state.global_step  # noqa: E731
            vllm, where = partial(BackgroundVLLM, self.vllm_generation, self.num_generations, step), "in a thread"
        self._ahead = RolloutsAhead(self.model, self.args, self.accelerator, vllm, reason)
        return f"; one rollout ahead, {where}"

    def _generate_ahead(self, ahead: RolloutsAhead, prompt_ids: list, limits: list[int]) -> tuple[list, list]:
        """(ids, log-probs) of the rollout that was generated while the one before it was trained on; the next begins.

        The first rollout of a run, one that no checkpoint had saved, and what dynamic sampling generates further are
        generated now, with the weights of now.
        """
        started = time.perf_counter()
        if not ahead.has_begun:
            place = self._rollout_number, self._filling.refills
            self._start_ahead(ahead, prompt_ids, limits, place)
        ids, logps, self._filling.weights_step = ahead.take(prompt_ids)
        names = ("ahead_wait_s", "ahead_generation_s", "ahead_generation_cpu_s")
        seconds = (time.perf_counter() - started, *ahead.seconds)
        self._log_all({f"time/{name}": value for name, value in zip(names, seconds, strict=True)})
        if not self.args.rewards_choose_prompts:
            self._begin_next(ahead)
        return ids, logps

    def _begin_next(self, ahead: RolloutsAhead) -> None:
        """Begin to generate the rollout after the one that begins now, unless no step would use it."""
        step, number = self.state.global_step, self._rollout_number + 1
        if number * self.plan.steps_per_rollout < self.state.max_steps and (rows := self._rows_ahead(number)):
            data: Any = self.train_dataset
            columns = data[rows]
            limits = self.args.completion_limits(columns.get("task", [None] * len(rows)))
            ids = self._tokenize_prompts(columns["prompt"])[0]
            if step and self.use_vllm and self._check_is_due:  # no rollout shows what it was sent after an update
                num = self.num_generations
                self._start_ahead(ahead, [ids[0]] * num, [PROBE] * num, (number, -1))
                self._check_engine(ahead.taken())
            self._start_ahead(ahead, ids, limits, (number, 0))

    def _start_ahead(self, ahead: RolloutsAhead, ids: list, limits: list[int], place: tuple[int, int]) -> None:
        sampling = None if self.use_vllm else self.generation_config
        ahead.start(ids, limits, sampling, place, self.state.global_step)

    def _rows_ahead(self, number: int) -> list[int]:
        """This process's rows of the training set, one per completion, of a rollout that has not begun."""
        plan, sampler = self.plan, cast(Any, self._get_train_sampler())
        num = plan.completions_per_rollout // plan.num_processes
        length = plan.completions_per_rollout * sampler.repeat_count  # of a rollout in the sampler's order
        epoch, place = divmod(number, len(sampler) // length)
        sampler.epoch = lambda: epoch
        start = place * length + self.accelerator.process_index * num
        return list(islice(sampler, start, start + num))

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> Tensor:
        """Reward functions side by side, each held to the contract; (B over all processes, functions), NaN for None."""
        self._filling.texts[:] = [prompts, completions]
        extra: dict[str, list] = {}

        def log_extra(column: str, values: list) -> None:
            known = extra.get(column, values)  # functions for different rows log under one name
            extra[column] = [new if old is None else old for old, new in zip(known, values, strict=True)]

        if any(isinstance(func, nn.Module) for func in self.reward_funcs):  # reward models: TRL's way, one by one
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            models = [i for i, func in enumerate(self.reward_funcs) if isinstance(func, nn.Module)]
            check_scores(rewards, {i: self.reward_func_names[i] for i in models})
        else:
            kwargs = reward_arguments(inputs, prompts, completions, completion_ids_list) | {
                "trainer_state": self.state, "log_extra": log_extra, "log_metric": self._log_metric,
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
                for column in extra:
                    self._log_completion_extra(column, extra[column])
            local = torch.tensor([[torch.nan if v is None else v for v in column] for column in values])
            rewards = self.accelerator.gather(local.T.contiguous().to(self.accelerator.device))
        self._filling.rewards = rewards
        unscorable = unscored(rewards, self.reward_weights)
        self._log_all({"rewards/unscorable_frac": unscorable.float().mean().item()})
        if unscorable.all():
            warnings.warn(
                f"step {self.state.global_step + 1}: every reward of the {self._mode} batch that counts is None, so "
                f"nothing is learned from it ({', '.join(self.reward_func_names)}).",
                stacklevel=2,
            )
        if self._mode == "eval":
            self._evaluation.add(rewards, gather_object(extra.get("extracted_answer", [])))
            return rewards
        return rewards.masked_fill(unscorable[:, None], torch.nan)  # TRL asks all functions whether a row has a reward

    def _generate_and_score_completions(self, inputs) -> dict[str, Any]:
        """TRL's, with advantages of exactly 0 where a prompt's rewards are equal: TRL's mean leaves a rounding there.

        What a subclass puts into `advantages` is trained on.
        """
        if self.model.training:
            self._filling.limits = self.args.completion_limits([row.get("task") for row in inputs])
        output = super()._generate_and_score_completions(inputs)
        if self.multi_objective_aggregation == "sum_then_normalize":
            num_generations = self.num_generations if self.model.training else self.num_generations_eval
            process, num_local = self.accelerator.process_index, len(output["advantages"])
            equal = self._filling.equal_rewards(self.reward_weights, num_generations, process, num_local)
            output["advantages"] = output["advantages"].masked_fill(equal, 0.0)
        return output

    def _generated_rows(self, rollout: Rollout, generation_batch) -> tuple[list[Row], float]:
        """(rows of this process, trained tokens of the rollout as mean over processes)."""
        with self._fills(rollout), self._timed("rollout"):
            output = self._generate_and_score_completions(generation_batch)
        self._rollout_is_new = True
        rows = rows_from_padded(output)
        if not self.carries_images and any(row.images is not None for row in rows):
            raise ValueError("prompts hold images inside their messages; put them into a column `images`.")
        rollout.give_recorded(rows)
        return rows, float(output["num_items_in_batch"]) / self.accelerator.num_processes

    def _log_all(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._metrics[self._mode][name].append(value)

    @contextmanager
    def _timed(self, phase: str) -> Generator[None]:
        """Seconds of a phase on the host's clock, as `time/<phase>_s`."""
        started = time.perf_counter()
        with self._watchdog.phase(phase, self.state.global_step + 1):
            faults.inject(phase, self.state.global_step + 1)
            yield
        self._log_all({f"time/{phase}_s": time.perf_counter() - started})

    def _log_metric(self, name: str, value: Any) -> None:
        check_logged(name, value)
        super()._log_metric(name, value)

    @property
    def mean_loss(self) -> float:
        """Of the whole run's steps; transformers divides it by those since the resume."""
        return self._total_loss_scalar / max(self.state.global_step, 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, but the table of completions shows a rollout once and not once per mini-batch, and shows control
        characters of completions instead of sending them to the terminal."""
        if "train_loss" in logs:
            logs["train_loss"] = self.mean_loss
        wanted, num = self.log_completions, self.num_completions_to_print
        self.log_completions, self.num_completions_to_print = wanted and self._rollout_is_new, 0
        try:
            if "loss" in logs:  # of training, and a callback may have left the model in evaluation
                self.model.train()
            super().log(logs, start_time)
            if "loss" in logs:  # transformers resets the sum by subtracting it from itself, which would keep a NaN
                self._tr_loss.zero_()
            if self.log_completions and num != 0 and self.accelerator.is_main_process:
                print_completions(self._logs, self.state.global_step, num)
        finally:
            self.log_completions, self.num_completions_to_print, self._rollout_is_new = wanted, num, False
