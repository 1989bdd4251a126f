"""What a configuration may not say: types from the annotations, values from `bounds.py`, and the rules between fields.

`SAPOConfig` calls it when it is made, before a model loads, so scripts and library users get the same sentences.
"""

from __future__ import annotations

import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from functools import cache
from typing import Any

from sapo_trl.algorithms import ALGORITHMS, Algorithm, users_of
from sapo_trl.bounds import (
    CHOICES,
    FREE_GENERATION_KEYS,
    NEEDS,
    NEVER_NONE,
    NOT_AHEAD,
    PHASE_LIMITS,
    RANGES,
    TOKEN_CORRECTIONS,
    UNBIASED_SAMPLING,
    WITHOUT_EFFECT,
    Need,
    check_ranges,
)
from sapo_trl.errors import did_you_mean
from sapo_trl.eval_sets import check_best_metric
from sapo_trl.files import masked
from sapo_trl.optimization import check_optimizer, check_scheduler
from sapo_trl.prompt_fields import check_prompts

# ---- types -----------------------------------------------------------------------------------------------------------


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def convert(config: Any) -> None:
    """Give fields the type of their annotation: numbers that came as text, JSON mappings, fields that were not given.

    Raises:
        ValueError: a value of another type, or a number that is not finite.
    """
    for f in fields(config):
        if f.init:
            vars(config)[f.name] = _converted(f, vars(config)[f.name], _hints(type(config))[f.name])


# Types beside those of the annotation. TRL takes a single text out of its list.
_AS_GIVEN = {"activation_checkpointing": bool, "gradient_checkpointing": bool, "lora_target_modules": str}


def _converted(f: Field, value: Any, hint: Any) -> Any:
    kinds = _kinds(hint)
    if value is None and (type(None) not in kinds or f.name in NEVER_NONE) and f.default is not MISSING:
        if f.default not in (False, "", "no", "none", -1):  # null could mean off, and would switch it on
            raise ValueError(f"{f.name} is null, which it can't be. Remove it for its default, {f.default}.")
        value = f.default
    if f.name == "report_to" and value is None:
        return "none"
    if f.name.endswith("_strategy") and value is False:  # YAML's no, without quotes
        return "no"
    if isinstance(value, _AS_GIVEN.get(f.name, ())):
        return value
    if f.name == "scale_rewards" and isinstance(value, bool):  # as in TRL
        return "group" if value else "none"
    if f.name == "resume_from_checkpoint" and isinstance(value, bool):  # YAML's true, like the command line's
        return str(value).lower()
    if isinstance(value, str):
        if dict in kinds and value.lstrip().startswith("{"):
            try:
                return json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"{f.name}={value!r} is not JSON: {error}.") from None
        if str not in kinds or f.name == "max_tokens_per_pack":
            value = _number(value, kinds)
    items = [(item, _kinds(hint, list)) for item in value] if isinstance(value, list) else []
    for part, allowed in ((value, kinds), *items):
        if isinstance(part, float) and not math.isfinite(part):
            raise ValueError(f"{f.name}={value} must be {RANGES.get(f.name, 'finite numbers')}.")
        if allowed and Any not in allowed and not _fits(part, allowed):
            wanted = " or ".join(sorted({kind.__name__ for kind in allowed if kind is not type(None)}))
            where = f"{f.name}={value!r}" if part is value else f"{part!r} in {f.name}"
            if isinstance(part, bool) and f.name in CHOICES:
                wanted = f"one of {', '.join(CHOICES[f.name])}; in YAML off, no, on and yes need quotes"
            raise ValueError(f"{where} is of type {type(part).__name__}; it must be {wanted}.")
    return value


def _kinds(hint: Any, inside: type | None = None) -> set[Any]:
    """The classes that an annotation names, without their parameters, or those of what is inside a container."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part, inside) for part in typing.get_args(hint)))
    if inside is not None:
        return set().union(*map(_kinds, typing.get_args(hint))) if typing.get_origin(hint) is inside else set()
    if typing.get_origin(hint) is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    return {typing.get_origin(hint) or hint}


def _fits(value: Any, kinds: set[Any]) -> bool:
    if not isinstance(value, bool | int | float | str | list | tuple | dict | None):
        return True  # an object that transformers made of the given value
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int | float) and {int, float} & kinds and (isinstance(value, int) or value.is_integer()):
        return True
    return any(isinstance(value, kind) or (isinstance(value, str) and issubclass(kind, Enum)) for kind in kinds)


def _number(text: str, kinds: set[Any]) -> Any:
    for kind in (int, float):
        if kind in kinds or float in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


# ---- values ----------------------------------------------------------------------------------------------------------


def require_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise unless `value` is one of `choices`, with the nearest of them."""
    if value not in choices:
        near = did_you_mean(str(value), choices)
        raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(choices)}.{near}")


def check(config: Any, row: Algorithm) -> None:
    """Refuse values that would fail, destroy the weights or have no effect only after the model has loaded.

    Args:
        config: a `SAPOConfig` with fields as they were given.
        row: its algorithm.
    """
    values = vars(config)
    check_ranges(values, RANGES)
    for name, choices in CHOICES.items():
        for value in values[name] if isinstance(values[name], list) else [values[name]]:
            if value is not None and not isinstance(value, bool):
                require_choice(name, value, choices)
    for name, (neutral, why) in WITHOUT_EFFECT.items():
        if values[name] not in neutral:
            raise ValueError(f"{name} has no effect: {why}. Remove it.")
    check_needs(values, {f.name: f.default for f in fields(config)}, NEEDS)
    _check_inherited(config)
    if config.max_steps != -1 and config.max_steps < 1:
        raise ValueError(f"max_steps={config.max_steps} must be at least 1, or -1 for num_train_epochs.")
    if config.ddp_broadcast_buffers:
        raise ValueError(
            "ddp_broadcast_buffers: true would hang a process that starts a mini-batch again after running out of "
            "memory. Remove it: the models' buffers are the same on every process."
        )
    for name, seconds in (config.phase_limits or {}).items():
        require_choice("phase_limits", name, PHASE_LIMITS)
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < math.inf:
            raise ValueError(f"phase_limits holds {name}: {seconds!r}; it must be seconds, 0 for no limit.")
    _check_packs(config)
    _check_ahead(config)
    _check_sampling(config)
    _check_eval_sets(config)
    check_prompts(config)
    _check_derived(config, row)
    _check_replay(config, row)


def check_needs(values: Mapping[str, Any], defaults: Mapping[str, Any], needs: Mapping[str, tuple[Need, ...]]) -> None:
    """Refuse a value that was given and does nothing, because another field switches it off.

    Raises:
        ValueError: names both, and the value of the other one under which it acts.
    """
    for name, wanted in needs.items():
        missing = next((need for need in wanted if not need.is_met(values)), None)
        if missing is not None and values[name] != defaults[name]:
            raise ValueError(
                f"{name}={values[name]} has no effect with {missing.other}: {missing.now(values)}. Set "
                f"{missing.other}: {missing.fixes[0]}, or remove {name}."
            )


def _check_inherited(config: Any) -> None:
    """Fields of transformers whose usual meaning does not hold here."""
    if config.metric_for_best_model in ("loss", "eval_loss"):
        raise ValueError(
            f"metric_for_best_model={config.metric_for_best_model!r} is 0 on-policy by construction. Set "
            "eval_pass_at_1 or eval_reward."
        )
    accumulation = config.accelerator_config if isinstance(config.accelerator_config, dict) else {}
    if (accumulation.get("gradient_accumulation_kwargs") or {}).get("num_steps") is not None:
        raise ValueError(
            "accelerator_config.gradient_accumulation_kwargs.num_steps would change the batch plan after it was made. "
            "Set gradient_accumulation_steps."
        )
    for name in ("split_batches", "dispatch_batches"):
        if accumulation.get(name):
            raise ValueError(f"accelerator_config.{name} would tear prompts and their completions apart. Remove it.")
    if (url := config.vllm_server_base_url) and not re.fullmatch(r"https?://\S+(?<!/v1)(?<!/v1/)", url):
        raise ValueError(f"vllm_server_base_url={masked(url)!r} must be like http://127.0.0.1:8000, without /v1.")
    check_optimizer(config)
    check_scheduler(config)
    reentrant = [config.activation_checkpointing_kwargs, config.gradient_checkpointing_kwargs]
    if config.launch_processes > 1 and any((kwargs or {}).get("use_reentrant") for kwargs in reentrant):
        raise ValueError("use_reentrant: true fails under DDP where weights are frozen (LoRA). Remove it.")


def _check_packs(config: Any) -> None:
    tokens = config.max_tokens_per_pack
    if tokens != "auto" and (isinstance(tokens, str) or tokens < 1):
        raise ValueError(f"max_tokens_per_pack={tokens!r} must be a number of at least 1, or 'auto'.")
    given_checkpointing(config)
    has_engine = config.use_vllm or config.rollouts_ahead
    if config.old_logprobs == "sampler" and has_engine and config.vllm_importance_sampling_correction:
        raise ValueError(
            "old_logprobs='sampler' puts the mismatch of trainer and rollout engine into the ratio, so nothing is left "
            "for vllm_importance_sampling_correction. Set vllm_importance_sampling_correction: false."
        )


def _check_ahead(config: Any) -> None:
    if not config.rollouts_ahead:
        return
    several = config.vllm_tensor_parallel_size > 1
    acting = vars(config) | {"vllm_tensor_parallel_size": several, "routing_replay": config.replay == "r3"}
    if refused := [name for name in NOT_AHEAD[config.use_vllm] if acting[name]]:
        raise ValueError(
            "rollouts_ahead=1 generates while the update runs, with vLLM awake and on one device, or in a worker, and"
            f" can't be used with {refused[0]}={vars(config)[refused[0]]}. Set it back, or rollouts_ahead: 0."
        )
    if config.old_logprobs == "trainer" and not config.vllm_importance_sampling_correction:
        raise ValueError(
            "rollouts_ahead=1 trains on completions of older weights. With old_logprobs='trainer' and without "
            "vllm_importance_sampling_correction neither the ratio nor a correction would know. Set old_logprobs: "
            "sampler, and the gate sees all of it, or vllm_importance_sampling_correction: true."
        )


def given_checkpointing(config: Any) -> str:
    """`true`, `false` or `auto`, from transformers' field and its older name."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    given = {name: str(vars(config)[name]).lower() for name in names if vars(config)[name] is not None}
    for name, value in given.items():
        require_choice(name, value, ("true", "false", "auto"))
    if len(set(given.values())) > 1:
        raise ValueError(f"{given} contradict each other. Remove gradient_checkpointing, the older name.")
    return next(iter(given.values()), "auto")


def _check_sampling(config: Any) -> None:
    extra = config.generation_kwargs or {}
    for name in extra:
        if name not in UNBIASED_SAMPLING and name not in FREE_GENERATION_KEYS:
            raise ValueError(
                f"generation_kwargs holds {name!r}, which may draw tokens from another distribution than the log-probs "
                f"of the ratio describe. Allowed: {', '.join((*UNBIASED_SAMPLING, *FREE_GENERATION_KEYS))}."
            )
    for name, unbiased in UNBIASED_SAMPLING.items():
        value = extra.get(name, vars(config)[name])
        if value not in (unbiased, None) and not (name == "top_k" and value == -1):
            raise ValueError(
                f"{name}={value} biases the ratio: tokens are then drawn from a cut or reshaped distribution, while "
                f"log-probs are those of the full one. Set {name}: {unbiased} for training; evaluation is free."
            )


def _check_eval_sets(config: Any) -> None:
    sets = config.evaluation_sets
    if not sets:
        return
    if config.metric_for_best_model is not None:
        check_best_metric(config.metric_for_best_model, sets)
    given, processes = config.per_device_eval_batch_size, config.launch_processes
    nums = {config.num_generations_eval or config.num_generations, *(one.num_samples for one in sets.values())}
    step = math.lcm(*nums) // math.gcd(math.lcm(*nums), processes)
    if given % step:
        raise ValueError(
            f"per_device_eval_batch_size={given} x {processes} process(es) is no multiple of the "
            f"{', '.join(map(str, sorted(nums)))} samples of a problem (num_samples of eval_sets, and "
            f"num_generations_eval). Set per_device_eval_batch_size: {math.ceil(given / step) * step}."
        )


# ---- what follows from the algorithm ---------------------------------------------------------------------------------


def _check_derived(config: Any, row: Algorithm) -> None:
    """TRL's names for what the algorithm sets, and options that the objective does not read."""
    for name, derived in (("loss_type", row.loss_type), ("importance_sampling_level", row.level)):
        if vars(config)[name] not in (None, derived):
            raise ValueError(
                f"{name}={vars(config)[name]!r} contradicts algorithm={config.algorithm!r}, which sets "
                f"{name}={derived!r}. Remove {name} and choose the algorithm: {', '.join(ALGORITHMS)}."
            )
    for f in fields(config):
        users = users_of(f.name)
        if users and f.name not in row.options and vars(config)[f.name] != f.default:
            raise ValueError(
                f"{f.name}={vars(config)[f.name]} has no effect with algorithm={config.algorithm!r}; it belongs to "
                f"{', '.join(users)}. Remove it."
            )
    if row.objective.corrects_engine and config.vllm_importance_sampling_mode not in TOKEN_CORRECTIONS:
        raise ValueError(
            f"algorithm={config.algorithm!r} needs vllm_importance_sampling_mode {', '.join(TOKEN_CORRECTIONS)}."
        )


def check_correction(mode: str, low: float | None, high: float | None) -> None:
    """Refuse a range of the correction for the rollout engine, a preset's bounds filled in, that holds no ratio."""
    if low is not None and high is not None and low >= high:
        raise ValueError(
            f"vllm_importance_sampling_mode={mode!r} would correct ratios within [{low:g}, {high:g}]: nothing is left. "
            "Set vllm_importance_sampling_clip_min below vllm_importance_sampling_clip_max."
        )


def check_objective_kwargs(given: Mapping[str, Any], row: Algorithm, own: set[str]) -> None:
    """Refuse options that the objective has not, that are fields of the config, or that miss a value."""
    for name in given:
        if name in own:
            raise ValueError(f"objective_kwargs holds {name!r}, which is a field of the config: set it there.")
        if name not in row.options:
            known = [option for option in row.options if option not in own]
            raise ValueError(
                f"{name!r} in objective_kwargs is no option of {row.objective.__name__}; it has "
                f"{', '.join(known) or 'none'}.{did_you_mean(name, known)}"
            )
    missing = [name for name, value in row.options.items() if value is MISSING and name not in {*own, *given}]
    if missing:
        raise ValueError(f"{row.objective.__name__} needs objective_kwargs: {{{missing[0]}: ...}}.")


def _check_replay(config: Any, row: Algorithm) -> None:
    if row.replay != "none" and config.replay != row.replay:
        raise ValueError(
            f"algorithm={config.algorithm!r} is defined with routing_replay={row.replay!r}, not {config.replay!r}. "
            f"For another replay use the algorithm without it."
        )
    if config.replay == "r2" and config.old_logprobs == "sampler":
        raise ValueError(
            "routing_replay='r2' records the routes in the old-log-prob pass, and old_logprobs='sampler' has none. Set "
            "old_logprobs: trainer."
        )
    if config.freeze_router and config.router_aux_loss_coef != 0.0:
        coef = "the model's own" if config.router_aux_loss_coef is None else config.router_aux_loss_coef
        raise ValueError(
            f"freeze_router is set and router_aux_loss_coef is {coef}: with nothing to move in the routers, the "
            "load-balancing loss would then bend the layers below the routers instead. Set router_aux_loss_coef: 0.0."
        )
    if config.replay != "r3":
        return
    if config.use_transformers_continuous_batching or (config.use_vllm and config.vllm_mode == "server"):
        raise ValueError(
            "routing_replay='r3' records the routes while transformers or vLLM generates in this process; continuous "
            "batching does not record them, and TRL 1.16 does not fetch those of a server. Nearest: "
            "routing_replay='r2', which records in the trainer's own forward."
        )
    if config.use_vllm and config.vllm_tensor_parallel_size > 1:
        raise ValueError(
            f"routing_replay='r3' was not tried with vllm_tensor_parallel_size={config.vllm_tensor_parallel_size}. Set "
            "vllm_tensor_parallel_size: 1, or routing_replay: r2."
        )


def check_batches(config: Any, steps_per_generation: int, num_processes: int) -> None:
    """Refuse sizes that contradict the rollout, and rollouts that don't hold full groups."""
    if config.steps_per_generation not in (None, steps_per_generation):
        raise ValueError(
            f"steps_per_generation={config.steps_per_generation} contradicts {config.num_mini_batches} "
            f"num_mini_batches x {config.gradient_accumulation_steps} gradient_accumulation_steps = "
            f"{steps_per_generation}. Remove steps_per_generation; num_mini_batches sets it."
        )
    rollout = config.per_device_train_batch_size * steps_per_generation * num_processes
    if config.generation_batch_size not in (None, rollout):
        raise ValueError(
            f"generation_batch_size={config.generation_batch_size} contradicts the {rollout} completions of a rollout. "
            "Remove it; num_mini_batches and per_device_train_batch_size set it."
        )
    if rollout % config.num_generations:
        unit = steps_per_generation * num_processes
        step = config.num_generations // math.gcd(unit, config.num_generations)
        fit = math.ceil(config.per_device_train_batch_size / step) * step
        raise ValueError(
            f"num_generations={config.num_generations} does not divide the rollout of {rollout} completions "
            f"({config.per_device_train_batch_size} per device x {config.gradient_accumulation_steps} accumulation "
            f"steps x {num_processes} processes x {config.num_mini_batches} mini-batches). Set "
            f"per_device_train_batch_size={fit} for {fit * unit} completions = "
            f"{fit * unit // config.num_generations} prompts x {config.num_generations}."
        )
