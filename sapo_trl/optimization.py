"""What the optimizer and the learning-rate scheduler do with their options, tried before a model loads."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import Trainer, get_scheduler

from sapo_trl.trl_seams import OptimizerNames

# Their handlers need the model: options are read when training starts.
_OF_PARTS = ("galore", "apollo")
# Schedulers that follow a metric, by default downwards.
_FOLLOW_METRIC = ("reduce_lr_on_plateau", "greedy")


def check_optimizer(config: Any) -> None:
    """Make the optimizer's arguments with and without each option: what changes nothing is refused.

    Raises:
        ValueError: an optimizer that can't run here, an option that it does not read, or that is no option.
    """
    name = config.optim
    if "lomo" in name or "layerwise" in name:
        raise ValueError(f"optim={name!r} steps inside backward, before all packs have run. Use adamw_torch.")
    if any(kind in name for kind in _OF_PARTS):
        return
    if config.optim_target_modules:
        raise ValueError(f"optim_target_modules has no effect with optim={name!r}. Remove it.")
    options = (config.optim_args or "").replace(" ", "").split(",") if config.optim_args else []
    for option in options:
        if option.count("=") != 1:
            raise ValueError(f"optim_args={config.optim_args!r}: {option!r} is not of the form name=value.")
    whole = _arguments(config)
    for option in options:
        if not _is_read(config, option, [x for x in options if x != option]):
            raise ValueError(f"optim_args holds {option}, which optim={name!r} does not read. Remove it.")
    defaults = {f.name: f.default for f in fields(config) if f.name.startswith("adam_")}
    for option, default in defaults.items():
        if vars(config)[option] != default and _arguments(config, **{option: default}) == whole:
            raise ValueError(f"{option}={vars(config)[option]} has no effect with optim={name!r}. Remove it.")


def _is_read(config: Any, option: str, others: Sequence[str]) -> bool:
    """Whether the optimizer's arguments depend on an option of `optim_args`, whose value may be the default."""
    without = _arguments(config, optim_args=",".join(others))
    for probe in (option, f"{option.partition('=')[0]}=0.123"):
        try:
            if _arguments(config, optim_args=",".join([*others, probe])) != without:
                return True
        except ValueError:  # the probe is read, and is no value for it
            return True
    return False


def _arguments(config: Any, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The class of the optimizer and its arguments."""
    changed = copy.copy(config)
    vars(changed).update({"optim": OptimizerNames(config.optim)} | changes)
    try:
        return Trainer.get_optimizer_cls_and_kwargs(changed)
    except (ImportError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"optim={config.optim!r} with optim_args={changed.optim_args!r}: {error}") from None


def check_scheduler(config: Any) -> None:
    """Make the scheduler once, of one number: its options are otherwise read only after the model has loaded.

    Raises:
        ValueError: options that it does not take, or a metric that it would follow in the wrong direction.
    """
    kind, given = config.lr_scheduler_type, config.lr_scheduler_kwargs
    kwargs: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    try:
        # without warm-up, so that the options are used at the first step
        get_scheduler(kind, torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate), 0, 10, dict(kwargs))
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr_scheduler_type={str(kind)!r} with lr_scheduler_kwargs={given}: {error}.") from None
    mode = "min" if config.greater_is_better is False else "max"
    if kind in _FOLLOW_METRIC and kwargs.get("mode", "min") != mode:
        raise ValueError(
            f"lr_scheduler_type={str(kind)!r} would take a {'smaller' if mode == 'max' else 'larger'} "
            f"{config.metric_for_best_model or 'reward'} for a better one. Set lr_scheduler_kwargs: {{mode: {mode}}}."
        )
