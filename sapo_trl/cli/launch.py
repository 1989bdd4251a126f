"""accelerate's config file, refused where `accelerate launch` would fail on it later, or do something else silently."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from sapo_trl.cli.parse import read_yaml
from sapo_trl.config import SAPOConfig
from sapo_trl.errors import did_you_mean
from sapo_trl.trl_seams import ClusterConfig, launch_command_parser, parser_options

KINDS = ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP")
PRECISIONS = ("no", "fp16", "bf16", "fp8")
SECTIONS = {"deepspeed_config": "DEEPSPEED", "fsdp_config": "FSDP"}
DECIDED_BY_FILE = (
    "zero_stage", "offload_optimizer_device", "offload_param_device", "zero3_save_16bit_model",
    "gradient_accumulation_steps", "gradient_clipping",
)  # fmt: skip


def read_launch(path: str, num_processes: int | None) -> dict[str, Any]:
    """An accelerate config file; `zero_stage` is there even if a DeepSpeed file of its own says it.

    Args:
        num_processes: of the launcher's command line, where it wins.

    Raises:
        ValueError: an unknown key, a wrong type, or what the launcher would not do.
    """
    launch, hints = read_yaml(path), get_type_hints(ClusterConfig)
    launch |= {} if num_processes is None else {"num_processes": num_processes}
    try:
        _check_types(launch, hints)
        _check_engine(launch)
        _check_numbers(launch)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return launch


def check_launch(launch: Mapping[str, Any], config: SAPOConfig) -> None:
    """Compare the file with the run that is launched under it.

    Raises:
        ValueError: they contradict each other.
    """
    if config.fsdp and config.launch_processes < 2:
        raise ValueError("fsdp needs several processes: accelerate launch --num_processes 2 … Or remove fsdp.")
    ours, theirs = "bf16" if config.bf16 else "fp16" if config.fp16 else "no", launch.get("mixed_precision") or "no"
    if theirs not in ("no", ours):
        raise ValueError(
            f"accelerate's mixed_precision: {theirs} contradicts bf16={config.bf16}, fp16={config.fp16} of "
            f"the config, and would win silently. Set mixed_precision: '{ours}' there."
        )
    section = launch.get("deepspeed_config") or {}
    for name, field in (("gradient_accumulation_steps",) * 2, ("gradient_clipping", "max_grad_norm")):
        value = getattr(config, field)
        if section.get(name, "auto") not in ("auto", value):
            raise ValueError(
                f"deepspeed_config: {name}: {section[name]} contradicts {field}={value} of the config. Remove it."
            )


def _check_types(launch: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    for name, value in launch.items():
        if name not in hints:
            raise ValueError(f"unknown key {name!r}.{did_you_mean(str(name), hints)}")
        allowed = get_args(hints[name]) or (hints[name],)
        if name in ("distributed_type", "mixed_precision"):  # an unquoted NO is a boolean of YAML
            known = KINDS if name == "distributed_type" else PRECISIONS
            if value not in known:
                fix = f" Set it in quotes: '{known[0]}'." if value is False else did_you_mean(str(value), known)
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}.{fix}")
        elif value is not None and type(value) not in allowed and {*allowed} & {int, bool, str, dict}:
            kinds = " or ".join(kind.__name__ for kind in allowed if kind is not type(None))
            raise ValueError(f"{name}: {value!r} is a {type(value).__name__}, and {kinds} is needed.")
    options = parser_options(launch_command_parser())
    for section in SECTIONS:
        for key, value in (launch.get(section) or {}).items():
            prefix = "fsdp_" if section == "fsdp_config" and not str(key).startswith("fsdp") else ""
            option = options.get(f"{prefix}{key}")
            if option is None:
                near = did_you_mean(f"{prefix}{key}", options)
                raise ValueError(f"{section}: unknown key {key!r}, which the launcher would ignore.{near}")
            if option.type is int and type(value) is not int:
                raise ValueError(f"{section}: {key}: {value!r} is a {type(value).__name__}, and int is needed.")
            if option.choices and str(value) not in option.choices:
                raise ValueError(f"{section}: {key}: {value!r} is not one of {', '.join(option.choices)}.")


def _check_engine(launch: dict[str, Any]) -> None:
    kind = launch.get("distributed_type")
    if kind is None:
        raise ValueError(f"distributed_type is missing. Set one of {', '.join(KINDS)}.")
    for section, owner in SECTIONS.items():
        if launch.get(section) and kind != owner:
            raise ValueError(f"{section} has no effect with distributed_type: {kind}. Remove it, or set {owner}.")
        if kind == owner and not launch.get(section):
            raise ValueError(f"distributed_type: {kind} needs {section}, as in configs/accelerate/.")
        if kind == owner and launch.get("use_cpu"):
            raise ValueError(f"with use_cpu: true accelerate runs plain DDP instead of {kind}. Set use_cpu: false.")
    if kind == "FSDP" and str(launch["fsdp_config"].get("fsdp_version", 1)) != "2":
        raise ValueError("fsdp_config: only fsdp_version: 2 is supported. Set it.")
    if kind == "DEEPSPEED":
        section = launch["deepspeed_config"]
        if (file := section.get("deepspeed_config_file")) is not None:
            section["zero_stage"] = _stage_of_file(launch, section, Path(str(file)))
        if section.get("zero_stage") not in (2, 3):
            raise ValueError(f"deepspeed_config: zero_stage: {section.get('zero_stage')} is not one of 2, 3.")


def _stage_of_file(launch: Mapping[str, Any], section: Mapping[str, Any], file: Path) -> Any:
    twice = [name for name in DECIDED_BY_FILE if name in section] + ["mixed_precision"] * ("mixed_precision" in launch)
    if twice:
        raise ValueError(f"{', '.join(twice)} can't stand beside deepspeed_config_file, which decides it. Remove it.")
    if not file.is_file():
        near = did_you_mean(str(file), map(str, file.parent.glob("*.json")))
        raise ValueError(f"deepspeed_config_file {file} does not exist.{near}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]["stage"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"deepspeed_config_file {file} is no JSON with zero_optimization.stage ({error!r}).") from None


def _check_numbers(launch: Mapping[str, Any]) -> None:
    kind, machines, rank = launch["distributed_type"], launch.get("num_machines", 1), launch.get("machine_rank", 0)
    processes = launch.get("num_processes", 1 if kind == "NO" else -1)
    if processes == -1:
        raise ValueError("num_processes is missing. Set it to the number of GPUs, or add --num_processes.")
    if processes < 1 or machines < 1 or processes % machines:
        raise ValueError(f"num_processes: {processes} is no multiple of num_machines: {machines}, both at least 1.")
    if not 0 <= rank < machines:
        raise ValueError(f"machine_rank: {rank} is not below num_machines: {machines}.")
    if processes > 1 and kind == "NO":
        raise ValueError(f"distributed_type: NO starts one process, not num_processes: {processes}. Set MULTI_GPU.")
    if machines > 1 and not launch.get("main_process_ip"):
        raise ValueError(f"num_machines: {machines} needs main_process_ip, the address of the first one.")
