"""What a field may hold: ranges, choices, and fields that would have no effect. The rules are in `validation.py`."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from transformers import IntervalStrategy, SchedulerType

from sapo_trl.trl_seams import INTEGRATION_TO_CALLBACK, HubStrategy, OptimizerNames, SaveStrategy

REPLAYS = ("none", "r2", "r3")
# Keys of `sapo_trl.update.aggregation.AGGREGATIONS`
LOSS_AGGREGATIONS = ("sequence-mean", "sequence-sum", "prompt-mean", "token-mean", "rollout-token-mean", "constant")
ON_COLLAPSE = ("none", "warn", "stop")
# Seconds a phase may take, generous: a limit is there for what would otherwise hang until somebody looks.
PHASE_LIMITS = {"rollout": 7200.0, "reward": 3600.0, "update": 7200.0, "save": 7200.0, "evaluation": 28800.0}


@dataclass(frozen=True)
class Range:
    """Numbers that a field may hold; an open end is excluded."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.low_open else x >= self.low
        below = x < self.high if self.high_open else x <= self.high
        return above and below  # NaN is neither

    def __str__(self) -> str:
        if self.high < math.inf:
            ends = f"{self.low:g}, {self.high:.10g}"
            return f"within {'(' if self.low_open else '['}{ends}{')' if self.high_open else ']'}"
        if self.low >= 1:
            return f"at least {self.low:g}"
        return f"a finite number {'>' if self.low_open else '>='} {self.low:g}"


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Refuse a number outside its range; `auto` and other texts are judged elsewhere."""
    for name, allowed in ranges.items():
        if values[name] is not None and not isinstance(values[name], str) and values[name] not in allowed:
            raise ValueError(f"{name}={values[name]} must be {allowed}.")


POSITIVE, NOT_NEGATIVE, COUNT = Range(0, low_open=True), Range(0), Range(1)
FRACTION, PROBABILITY = Range(0, 1), Range(0, 1, low_open=True)

RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            "max_skipped_steps", "num_mini_batches", "num_iterations", "gradient_accumulation_steps",
            "per_device_train_batch_size", "dynamic_sampling_max_rounds",
            "per_device_eval_batch_size", "max_completion_length", "num_generations_eval", "save_total_limit",
            "ref_model_sync_steps", "vllm_tensor_parallel_size", "vllm_max_model_length",
            "max_tool_calling_iterations", "ddp_timeout", "ddp_bucket_cap_mb", "dataloader_prefetch_factor",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            "beta", "weight_decay", "warmup_steps", "max_grad_norm", "entropy_coef", "entropy_coef_min",
            "entropy_coef_max", "entropy_coef_delta", "entropy_target", "router_aux_loss_coef", "eval_delay",
            "dataloader_num_workers", "dump_ratios_every", "off_policy_mask_threshold",
            "num_completions_to_print", "engine_check_every", "vllm_importance_sampling_clip_min",
        ),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            "temperature", "adam_epsilon", "vllm_server_timeout", "vllm_importance_sampling_clip_max",
            "logging_steps", "eval_steps", "save_steps", "num_train_epochs",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(("seed", "data_seed"), Range(0, 2**32 - 1)),
    "num_generations": Range(2),
    "rollouts_ahead": Range(0, 1),
    "learning_rate": Range(0, 10),
    "adam_beta1": Range(0, 1, high_open=True),
    "adam_beta2": Range(0, 1, high_open=True),
    "top_entropy_quantile": FRACTION,
    "ref_model_mixup_alpha": FRACTION,
    "vllm_gpu_memory_utilization": PROBABILITY,
    "drop_solved_above": PROBABILITY,
    "vllm_server_port": Range(1, 65535),
    "vllm_group_port": Range(1, 65535),
}  # fmt: skip

# The same for the fields of `ScriptArguments` and of TRL's `ModelConfig`.
SCRIPT_RANGES = {
    "lora_r": COUNT,
    "lora_alpha": COUNT,
    "lora_dropout": Range(0, 1, high_open=True),
    "max_unusable_gold_frac": FRACTION,
}

# Correction for the rollout engine under a name -> (mode, low, high). `icepop` keeps tokens whose ratio is within a
# factor of 2 (arXiv 2510.18855), `geometric_mask` sequences whose tokens are 1 % off in the (geometric) mean.
CORRECTION_PRESETS = {"icepop": ("token_mask", 0.5, 2.0), "geometric_mask": ("geometric_mask", 0.99, 1.01)}
TOKEN_CORRECTIONS = ("token_truncate", "token_mask", "icepop")
TRL_CLIP_MAX = 3.0  # TRL's default of vllm_importance_sampling_clip_max


def _values(kind: type[Enum]) -> tuple[str, ...]:
    return tuple(member.value for member in kind)


CHOICES: dict[str, Iterable[str]] = {
    "on_collapse": ON_COLLAPSE,
    "loss_aggregation": LOSS_AGGREGATIONS,
    "on_hang": ("stop", "warn"),
    "routing_replay": REPLAYS,
    "old_logprobs": ("trainer", "sampler"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    **dict.fromkeys(
        ("log_level", "log_level_replica"), ("debug", "info", "warning", "error", "critical", "detail", "passive")
    ),
    "report_to": ("none", "all", *INTEGRATION_TO_CALLBACK),
    **dict.fromkeys(("eval_strategy", "logging_strategy"), _values(IntervalStrategy)),
    "save_strategy": _values(SaveStrategy),
    "hub_strategy": _values(HubStrategy),
    "optim": _values(OptimizerNames),
    "lr_scheduler_type": _values(SchedulerType),
    "vllm_mode": ("colocate", "server"),
    "vllm_dtype": ("auto", "float32", "bfloat16", "float16"),
    "vllm_importance_sampling_mode": (*TOKEN_CORRECTIONS, "sequence_truncate", "sequence_mask", "geometric_mask"),
}

# Fields whose annotation admits None although TRL fails on it later.
NEVER_NONE = ("num_generations", "max_completion_length")

# Sampling settings that cut or reshape the distribution: the log-probs of the ratio are those of the full softmax
# at `temperature`, so any of these would bias it by the mass that survives.
UNBIASED_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}

# Fields that do nothing here -> (values that say so, why).
WITHOUT_EFFECT: dict[str, tuple[tuple, str]] = {
    "pad_to_multiple_of": ((None, "auto"), "the update packs rows without padding"),
    "torch_empty_cache_steps": ((None,), "memory is bounded by max_tokens_per_pack"),
    "label_smoothing_factor": ((0.0,), "the loss has no labels"),
    "label_names": ((None,), "the loss has no labels"),
    "train_sampling_strategy": (("random",), "prompts come in whole groups, in the order of the seed"),
    "data_seed": ((None,), "the order of prompts follows seed"),
    "include_for_metrics": (([],), "metrics come from the rewards"),
    "batch_eval_metrics": ((False,), "metrics come from the rewards"),
    "enable_jit_checkpoint": ((False,), "SIGTERM and SIGUSR1 finish the optimizer step and save without it"),
    "length_column_name": (("length",), "rows are packed by their numbers of tokens"),
    "average_tokens_across_devices": ((True,), "the loss is always over all processes"),
    "auto_find_batch_size": ((False,), "max_tokens_per_pack bounds memory, and a pack that does not fit is cut"),
    "prediction_loss_only": ((False,), "an evaluation gives metrics only"),
    "eval_accumulation_steps": ((None,), "an evaluation keeps no outputs of the model"),
    "eval_do_concat_batches": ((True,), "an evaluation keeps no outputs of the model"),
    "eval_use_gather_object": ((False,), "an evaluation keeps no outputs of the model"),
    "do_train": ((True,), "scripts/train.py and train() train; scripts/evaluate.py measures without training"),
    "do_predict": ((False,), "train() does not predict"),
    "torch_compile": ((False,), "packs, which all differ in shape, go around the compiled module"),
    "torch_compile_backend": ((None,), "nothing is compiled"),
    "torch_compile_mode": ((None,), "nothing is compiled"),
    "parallelism_config": ((None,), "processes share the rows, and nothing else is split"),
    "include_num_input_tokens_seen": ((False, "no"), "num_tokens counts the tokens of prompts and completions"),
    "logging_nan_inf_filter": ((False,), "the loss that is logged is the loss that was"),
    "neftune_noise_alpha": ((None, 0.0), "its noise would make the ratio r noise"),
}

# What `rollouts_ahead` can't be used with, with vLLM or without. It generates in one part, every request with a seed of
# its own; vLLM must be awake while the update runs, and a worker has the trainer's own decoding loop alone.
_NEVER_AHEAD = (
    "use_transformers_continuous_batching", "generation_kwargs", "cache_implementation", "ignore_data_skip",
    "thinking_budget", "routing_replay",
)  # fmt: skip
NOT_AHEAD = {
    True: (*_NEVER_AHEAD, "vllm_enable_sleep_mode", "vllm_tensor_parallel_size"),
    False: (*_NEVER_AHEAD, "cast_lm_head_to_fp32", "deepspeed", "fsdp"),
}


@dataclass(frozen=True)
class _Tracker:
    """Values of `report_to` that have a tracker among them."""

    name: str

    def __contains__(self, report_to: Any) -> bool:
        return bool({self.name, "all"} & {*([report_to] if isinstance(report_to, str) else report_to or [])})

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Need:
    """What another field must be for a field to act: one of `values`, the first of which a refusal shows as the fix.

    Attributes:
        instead: a third field, which will do when it is set.
    """

    other: str
    values: Container
    instead: str | None = None

    def is_met(self, fields: Mapping[str, Any]) -> bool:
        """By the values of all fields."""
        return fields[self.other] in self.values or bool(self.instead and fields[self.instead])

    def now(self, fields: Mapping[str, Any]) -> str:
        """The other field's value in words."""
        return str(getattr(fields[self.other], "value", fields[self.other])).lower()

    @property
    def fixes(self) -> list[str]:
        """The values in words."""
        values = self.values if isinstance(self.values, tuple) else (self.values,)
        return list(dict.fromkeys(str(value).lower() for value in values))


_ENGINE = Need("use_vllm", (True,), instead="rollouts_ahead")
_VLLM, _PUSHES = Need("use_vllm", (True,)), Need("push_to_hub", (True,))
_WORKERS = Need("dataloader_num_workers", COUNT)
_EVALUATES = Need("eval_strategy", ("steps", "epoch"))
_SAVES = Need("save_strategy", ("steps", "epoch", "best"))
_CHECKPOINTS = tuple(
    Need(name, (True, "true", "True", "auto", None)) for name in ("activation_checkpointing", "gradient_checkpointing")
)
_WITHOUT_WARMUP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_WITHOUT_OPTIONS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)


def _schedulers(without: tuple[SchedulerType, ...]) -> Need:
    return Need("lr_scheduler_type", tuple(kind.value for kind in SchedulerType if kind not in without))


# Fields that act only beside other ones -> what those must be.
NEEDS: dict[str, tuple[Need, ...]] = {
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), (Need("sync_ref_model", (True,)),)),
    **dict.fromkeys(("sync_ref_model", "use_bias_correction_kl"), (Need("beta", POSITIVE),)),
    **dict.fromkeys(
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        (Need("use_adaptive_entropy", (True,)),),
    ),
    "liger_kernel_config": (Need("use_liger_kernel", (True,)),),
    "dynamic_sampling_max_rounds": (Need("dynamic_sampling", (True,)),),
    "transformers_continuous_batching_config": (Need("use_transformers_continuous_batching", (True,)),),
    "cache_implementation": (Need("use_vllm", (False,)),),
    **dict.fromkeys(
        ("vllm_mode", "vllm_structured_outputs_regex"), (_VLLM,)
    ),
    "vllm_importance_sampling_correction": (_ENGINE,),
    **dict.fromkeys(
        (
            "vllm_dtype", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_max_model_length",
            "vllm_model_impl", "vllm_tensor_parallel_size",
        ),
        (_VLLM, Need("vllm_mode", ("colocate",))),
    ),
    **dict.fromkeys(
        ("vllm_group_port", "vllm_server_base_url", "vllm_server_timeout"), (_VLLM, Need("vllm_mode", ("server",)))
    ),
    **dict.fromkeys(
        ("vllm_server_host", "vllm_server_port"),
        (_VLLM, Need("vllm_mode", ("server",)), Need("vllm_server_base_url", (None,))),
    ),
    **dict.fromkeys(
        [f"vllm_importance_sampling_{name}" for name in ("mode", "cap", "clip_min", "clip_max")],
        (_ENGINE, Need("vllm_importance_sampling_correction", (True,))),
    ),
    "eval_steps": (Need("eval_strategy", ("steps",)),),
    **dict.fromkeys(
        ("do_eval", "eval_delay", "greater_is_better", "load_best_model_at_end", "metric_for_best_model"),
        (_EVALUATES,),
    ),
    "save_steps": (Need("save_strategy", ("steps",)),),
    "save_total_limit": (_SAVES,),
    "logging_steps": (Need("logging_strategy", ("steps",)),),
    **dict.fromkeys(
        ("log_completions_hub_repo", "log_multimodal", "log_unique_prompts", "num_completions_to_print"),
        (Need("log_completions", (True,)),),
    ),
    **dict.fromkeys(("hub_always_push", "hub_strategy"), (_PUSHES,)),
    **dict.fromkeys(
        ("project", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"),
        (Need("report_to", _Tracker("trackio")),),
    ),
    **dict.fromkeys(
        (
            "dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
        ),
        (_WORKERS,),
    ),
    **dict.fromkeys(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), _CHECKPOINTS),
    "warmup_steps": (_schedulers(_WITHOUT_WARMUP),),
    "lr_scheduler_kwargs": (_schedulers(_WITHOUT_OPTIONS),),
}  # fmt: skip

# The same of what only `scripts/train.py` decides: a trainer may be asked to evaluate, or to push, by its user.
SCRIPT_NEEDS: dict[str, tuple[Need, ...]] = {
    "eval_on_start": (_EVALUATES,),
    **dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_revision"), (_PUSHES,)),
    **dict.fromkeys(
        (
            "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters",
            "lora_modules_to_save", "lora_task_type", "use_rslora", "use_dora",
        ),
        (Need("use_peft", (True,)),),
    ),
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), (Need("load_in_4bit", (True,)),)
    ),
}  # fmt: skip

# Keys of generation_kwargs that leave the distribution of the next token as it is.
FREE_GENERATION_KEYS = ("use_cache", "cache_implementation", "cache_config", "prefill_chunk_size", "seed")
